"""The whole criterion at random points, against the reference and transformers' Mask2FormerLoss."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from transformers import Mask2FormerConfig
from transformers.models.mask2former import modeling_mask2former as theirs

from fastmask import FixedMatcher, HungarianMatcher, MaskTerm, PointSampling, SetCriterion, Targets, assign
from fastmask.modules import Predictions
from fastmask.testing import assert_within_budget
from tests.helpers.inputs import SHAPES, random_logits, random_targets
from tests.modules.test_criterion import as_outputs

COSTS = {"cost_class": 2.0, "cost_mask": 5.0, "cost_dice": 5.0}
WEIGHTS = {"loss_ce": 2.0, "loss_mask": 5.0, "loss_dice": 5.0}
SAMPLING = PointSampling(num_points=80)


def make_criterion(num_classes, backend="auto", **options):
    compared = {"term": MaskTerm("bce", **options), "points": SAMPLING, "backend": backend}
    matcher = HungarianMatcher(**COSTS, **compared)
    return SetCriterion(num_classes, matcher, WEIGHTS, 0.1, ["labels", "masks"], **compared)


def weighted(losses):
    return sum(WEIGHTS[name.rstrip("_0123456789")] * loss for name, loss in losses.items())


def seeded(seed=5):
    return torch.Generator().manual_seed(seed)


def run(criterion, class_logits, mask_logits, targets, *, stacked=True, generator=None):
    leaves = [x.detach().requires_grad_() for x in (class_logits, mask_logits)]
    losses = criterion(as_outputs(*leaves, stacked=stacked), targets, generator=generator)
    gradients = torch.autograd.grad(weighted(losses), leaves, allow_unused=True)
    return {**losses, **dict(zip(("class gradient", "mask gradient"), gradients, strict=True))}


@pytest.mark.parametrize("shape", ["usual", "more targets than queries", "no targets", "one of everything"])
@pytest.mark.parametrize("form", ["segments", "masks"])
@pytest.mark.parametrize("ignore_void", [False, True])
def test_losses_and_gradients_equal_the_reference(shape, form, ignore_void, generator):
    """On maps whose sizes are powers of two, where float32 and float64 choose the same uncertain points."""
    logits = random_logits(SHAPES[shape], generator)
    targets = random_targets(SHAPES[shape], generator, form)
    results = [
        run(
            make_criterion(SHAPES[shape][3], backend, ignore_void=ignore_void),
            *(x.to(dtype) for x in logits),
            targets,
            generator=seeded(),
        )
        for backend, dtype in (("native", torch.float32), ("reference", torch.float32), ("reference", torch.float64))
    ]
    for name in results[0]:
        assert_within_budget(results[0][name], results[1][name], results[2][name], name=name)


class Recorder:
    """Makes transformers' criterion take given points for the matcher, and notes those that it takes for the losses."""

    def __init__(self, shared, noted=None):
        self.shared = shared
        self.noted = [] if noted is None else list(noted)
        self.replay = noted is not None
        self.calls = 0
        self.sample = theirs.Mask2FormerLoss.sample_points_using_uncertainty

    def rand(self, *size, **_):
        if size[0] == 1 and not self.sampling:
            self.calls += 1
            return self.shared[(self.calls - 1) % len(self.shared)][None]
        return self.random(*size)

    def uncertain(self, criterion, logits, *arguments):
        if self.replay:
            return self.noted.pop(0).to(logits.dtype)
        self.sampling = True
        points = self.sample(criterion, logits, *arguments)
        self.sampling = False
        self.noted.append(points)
        return points

    def run(self, class_logits, mask_logits, images):
        config = Mask2FormerConfig(
            num_labels=class_logits.shape[-1] - 1,
            no_object_weight=0.1,
            class_weight=2.0,
            mask_weight=5.0,
            dice_weight=5.0,
            train_num_points=SAMPLING.num_points,
        )
        criterion = theirs.Mask2FormerLoss(config, WEIGHTS).to(mask_logits.dtype)
        leaves = [x.detach().requires_grad_() for x in (class_logits, mask_logits)]
        layers = [
            {"class_queries_logits": classes, "masks_queries_logits": masks}
            for classes, masks in zip(*leaves, strict=True)
        ]
        self.random, self.sampling = torch.rand, False
        with (
            mock.patch.object(torch, "rand", self.rand),
            mock.patch.object(
                theirs.Mask2FormerLoss,
                "sample_points_using_uncertainty",
                lambda criterion, *arguments: self.uncertain(criterion, *arguments),
            ),
        ):
            losses = criterion(
                **layers[-1],
                mask_labels=[image["masks"].to(mask_logits.dtype) for image in images],
                class_labels=[image["labels"] for image in images],
                auxiliary_predictions=layers[:-1],
            )
        losses = {name.replace("cross_entropy", "ce"): loss for name, loss in losses.items()}
        gradients = torch.autograd.grad(weighted(losses), leaves)
        return {**losses, **dict(zip(("class gradient", "mask gradient"), gradients, strict=True))}


def points_of_targets(noted, assignment):
    """(L, B, M, P, 2) from transformers' points: the last layer first, then images, then queries in ascending order."""
    layers, batch_size, num_targets = assignment.shape
    points = torch.zeros(layers, batch_size, num_targets, SAMPLING.num_points, 2)
    for layer, of_layer in zip((layers - 1, *range(layers - 1)), noted, strict=True):
        pairs = iter(of_layer)
        for b in range(batch_size):
            matched = (assignment[layer, b] >= 0).nonzero().squeeze(1)
            for m in matched[assignment[layer, b, matched].argsort()].tolist():
                points[layer, b, m] = next(pairs)
        assert next(pairs, None) is None
    return points


@pytest.mark.parametrize("seed", range(3))
def test_equals_transformers_at_the_same_points(seed, monkeypatch):
    generator = seeded(seed)
    class_logits, mask_logits = random_logits((3, 2, 12, 5, 6, 16, 16, 64, 64), generator)
    images = [
        {
            "labels": torch.randint(0, 5, (count,), generator=generator),
            "masks": torch.rand(count, 64, 64, generator=generator) < 0.3,
        }
        for count in (6, 2)
    ]
    shared = torch.rand(2, SAMPLING.num_points, 2, generator=generator)
    recorder = Recorder(shared)
    torch.manual_seed(seed)
    same_dtype = recorder.run(class_logits, mask_logits, images)
    exact = Recorder(shared.double(), recorder.noted).run(class_logits.double(), mask_logits.double(), images)

    monkeypatch.setattr(PointSampling, "shared", lambda *_: shared)
    monkeypatch.setattr(
        PointSampling, "uncertain", lambda _, logits, assignment, **__: points_of_targets(recorder.noted, assignment)
    )
    actual = run(make_criterion(5), class_logits, mask_logits, images)
    assert actual.keys() == exact.keys()
    assert len(exact) == 11
    for name, wanted in exact.items():
        assert_within_budget(actual[name], same_dtype[name], wanted, name=name)


@pytest.mark.parametrize("stacked", [True, False])
def test_the_generator_decides(stacked, generator):
    logits = random_logits(SHAPES["usual"], generator)
    targets = random_targets(SHAPES["usual"], generator, "segments")
    criterion = make_criterion(5)
    first = run(criterion, *logits, targets, stacked=stacked, generator=seeded())
    second = run(criterion, *logits, targets, stacked=stacked, generator=seeded())
    other = run(criterion, *logits, targets, stacked=stacked, generator=seeded(6))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["loss_mask"], other["loss_mask"])
    torch.manual_seed(5)
    default = run(criterion, *logits, targets, stacked=stacked)
    assert all(torch.equal(first[name], default[name]) for name in first)


def test_layers_share_the_points_of_an_image(generator):
    class_logits, mask_logits = random_logits(SHAPES["usual"], generator)
    targets = random_targets(SHAPES["usual"], generator, "segments")
    matcher = make_criterion(5).matcher
    points = matcher.draw_points(targets, seeded())
    assert points.shape == (2, 80, 2)
    costs = matcher.cost(class_logits, mask_logits, targets, points)
    expected = assign(costs, targets.counts)
    stacked = [Predictions(class_logits, mask_logits)]
    assert torch.equal(matcher.match(stacked, targets, generator=seeded()), expected)
    groups = [Predictions(c[None], m[None]) for c, m in zip(class_logits, mask_logits, strict=True)]
    assert torch.equal(matcher.match(groups, targets, generator=seeded()), expected)
    pairs = matcher({"pred_logits": class_logits[0], "pred_masks": mask_logits[0]}, targets, generator=seeded())
    for (queries, matched), assigned in zip(pairs, expected[0], strict=True):
        assert torch.equal(assigned[matched], queries)
    assert not torch.equal(matcher.cost(class_logits, mask_logits, targets), costs)


def test_embeddings_and_logits_lose_the_same(generator):
    class_logits = torch.randn(2, 2, 9, 6, generator=generator)
    mask_embed = torch.randn(2, 2, 9, 4, generator=generator)
    pixel_embed = torch.randn(2, 4, 16, 16, generator=generator)
    targets = random_targets((2, 2, 9, 5, 4, 16, 16, 64, 64), generator, "segments")
    criterion = make_criterion(5)
    mask_logits = torch.einsum("lbnc,bchw->lbnhw", mask_embed, pixel_embed)
    one = criterion({"class_logits": class_logits, "mask_logits": mask_logits}, targets, generator=seeded())
    other = criterion(
        {"class_logits": class_logits, "mask_embed": mask_embed, "pixel_embed": pixel_embed},
        targets,
        generator=seeded(),
    )
    for name, loss in one.items():
        torch.testing.assert_close(other[name], loss, rtol=1e-4, atol=1e-5)


def test_fixed_matching_loses_at_points(generator):
    class_logits, mask_logits = random_logits((2, 2, 5, 5, 4, 16, 16, 64, 64), generator)
    targets = random_targets((2, 2, 5, 5, 4, 16, 16, 64, 64), generator, "segments")
    all_pixels = SetCriterion(5, FixedMatcher(), {}, term=MaskTerm("bce"))
    at_points = SetCriterion(5, FixedMatcher(), {}, term=MaskTerm("bce"), points=PointSampling(12544, 1.0, 0.0))
    outputs = {"class_logits": class_logits, "mask_logits": mask_logits}
    one, other = all_pixels(outputs, targets), at_points(outputs, targets, generator=seeded())
    assert torch.equal(one["loss_ce"], other["loss_ce"])
    for name in ("loss_mask", "loss_dice"):  # uniform points estimate the losses over all pixels
        torch.testing.assert_close(other[name], one[name], rtol=0.02, atol=0.01)


def test_images_without_objects(generator):
    logits = random_logits(SHAPES["usual"], generator)
    images = [{"labels": torch.zeros(0, dtype=torch.int64), "masks": torch.zeros(0, 40, 40)} for _ in range(2)]
    result = run(make_criterion(5), *logits, images)
    assert result["loss_mask"] == result["loss_dice"] == 0
    assert result["class gradient"].isfinite().all()
    assert not result["mask gradient"].any()


def test_nan_logits_of_an_unmatched_query_do_no_harm(generator):
    class_logits, mask_logits = random_logits(SHAPES["usual"], generator)
    targets = random_targets(SHAPES["usual"], generator, "segments")
    mask_logits[:, :, 3] = float("nan")
    result = run(make_criterion(5), class_logits, mask_logits, targets)
    assert all(result[name].isfinite().all() for name in result)


def test_compiles_to_one_graph(generator):
    class_logits, mask_logits = random_logits(SHAPES["usual"], generator)
    targets = random_targets(SHAPES["usual"], generator, "segments")
    criterion = make_criterion(5)

    def total(class_logits, mask_logits):
        return weighted(criterion({"class_logits": class_logits, "mask_logits": mask_logits}, targets))

    results = []
    for function in (total, torch.compile(total, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(2)
        leaves = [x.clone().requires_grad_() for x in (class_logits, mask_logits)]
        loss = function(*leaves)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_bfloat16_logits(generator):
    logits = [x.bfloat16() for x in random_logits(SHAPES["usual"], generator)]
    result = run(make_criterion(5), *logits, random_targets(SHAPES["usual"], generator, "masks"))
    assert result["loss_mask"].dtype == torch.float32
    assert result["mask gradient"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_points": 0}, "num_points must be at least 1"),
        ({"oversample_ratio": 0.9}, "oversample_ratio must be at least 1"),
        ({"importance_sample_ratio": -0.1}, "importance_sample_ratio must lie in 0..1"),
    ],
)
def test_bad_sampling(options, message):
    with pytest.raises(ValueError, match=message):
        PointSampling(**options)


def test_segments_and_masks_lose_the_same(generator):
    logits = random_logits(SHAPES["usual"], generator)
    targets = random_targets(SHAPES["usual"], generator, "segments")
    masks = Targets(targets.labels, targets.counts, masks=targets.dense_masks())
    one, other = (run(make_criterion(5), *logits, form, generator=seeded()) for form in (targets, masks))
    assert all(torch.equal(one[name], other[name]) for name in one)
