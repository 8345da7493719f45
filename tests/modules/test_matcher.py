from __future__ import annotations

import pytest
import torch
from transformers.models.maskformer.modeling_maskformer import MaskFormerHungarianMatcher

from fastmask import FixedMatcher, HungarianMatcher, MaskTerm, SetCriterion, mask_loss
from fastmask.modules import Predictions
from tests.helpers.inputs import SHAPES, random_logits, random_targets

COSTS = {"cost_class": 1.0, "cost_mask": 20.0, "cost_dice": 1.0}


def outputs_and_targets(shape, generator, form="masks"):
    class_logits, mask_logits = random_logits(shape, generator)
    outputs = {"pred_logits": class_logits[0], "pred_masks": mask_logits[0]}
    return outputs, random_targets(shape, generator, form)


@pytest.mark.parametrize("shape", ["usual", "odd sizes", "more targets than queries", "no targets"])
def test_equals_the_reference_backend(shape, generator):
    outputs, targets = outputs_and_targets(SHAPES[shape], generator)
    pairs = HungarianMatcher(**COSTS)(outputs, targets.to_list())
    expected = HungarianMatcher(**COSTS, backend="reference")(outputs, targets.to_list())
    for image_pairs, image_expected in zip(pairs, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(image_pairs, image_expected, strict=True))


@pytest.mark.parametrize("seed", range(4))
def test_equals_transformers(seed):
    # At least one target an image: transformers' matcher fails on none.
    shape = (1, 2, 12, 5, 6, 16, 16, 64, 64)
    generator = torch.Generator().manual_seed(seed)
    outputs, targets = outputs_and_targets(shape, generator)
    images = targets.to_list()
    images[0] = {"labels": torch.tensor([1, 4]), "masks": torch.rand(2, 64, 64, generator=generator) < 0.3}
    theirs = MaskFormerHungarianMatcher(cost_class=1.0, cost_mask=20.0, cost_dice=1.0)(
        outputs["pred_masks"],
        outputs["pred_logits"],
        [image["masks"].float() for image in images],
        [image["labels"] for image in images],
    )
    ours = HungarianMatcher(**COSTS)(outputs, images)
    for image_pairs, image_expected in zip(ours, theirs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(image_pairs, image_expected, strict=True))


def test_returns_index_pairs_on_the_host_by_ascending_query(generator):
    outputs, targets = outputs_and_targets(SHAPES["usual"], generator)
    for (queries, matched), count in zip(HungarianMatcher()(outputs, targets), targets.counts, strict=True):
        assert queries.dtype == matched.dtype == torch.int64
        assert queries.device.type == matched.device.type == "cpu"
        assert torch.equal(queries, queries.sort().values)
        assert torch.equal(matched.sort().values, torch.arange(count))


def test_matches_all_layers_at_once(generator):
    class_logits, mask_logits = random_logits(SHAPES["usual"], generator)
    targets = random_targets(SHAPES["usual"], generator, "segments")
    matcher = HungarianMatcher(**COSTS)
    assignment = matcher.match([Predictions(class_logits, mask_logits)], targets)
    assert assignment.shape == (2, 2, 6)
    for layer in range(2):
        alone = Predictions(class_logits[layer : layer + 1], mask_logits[layer : layer + 1])
        assert torch.equal(matcher.match([alone], targets)[0], assignment[layer])


def test_nan_queries_are_taken_last(generator):
    outputs, targets = outputs_and_targets(SHAPES["usual"], generator)
    outputs["pred_masks"][:, 3] = float("nan")
    assert all(3 not in queries for queries, _ in HungarianMatcher()(outputs, targets))


def test_bad_arguments(generator):
    outputs, targets = outputs_and_targets(SHAPES["usual"], generator)
    with pytest.raises(ValueError, match="all 0"):
        HungarianMatcher(0, 0, 0)
    with pytest.raises(ValueError, match="targets is an empty list"):
        HungarianMatcher()(outputs, [])
    with pytest.raises(ValueError, match="targets has 1 images"):
        HungarianMatcher()(outputs, targets.to_list()[:1])
    beyond = [{"labels": image["labels"] + 5, "masks": image["masks"]} for image in targets.to_list()]
    with pytest.raises(ValueError, match=r"expected 0\.\.4"):
        HungarianMatcher()(outputs, beyond)


def test_fixed_matching_gives_each_class_its_query(generator):
    shape = (2, 2, 5, 5, 6, 8, 8, 32, 32)
    class_logits, mask_logits = random_logits(shape, generator)
    targets = random_targets(shape, generator, "segments").merged_by_class()
    assignment = FixedMatcher().match([Predictions(class_logits, mask_logits)], targets)
    assert assignment.equal(targets.labels.expand(2, -1, -1))
    criterion = SetCriterion(5, FixedMatcher(), {})
    losses = criterion({"class_logits": class_logits, "mask_logits": mask_logits}, targets)
    expected = [
        part[-1] for part in mask_loss(mask_logits, targets, assignment, num_masks=targets.counts.sum().clamp(min=1))
    ]
    torch.testing.assert_close([losses["loss_mask"], losses["loss_dice"]], expected)
    with pytest.raises(ValueError, match="5 queries and 6 classes"):
        FixedMatcher().match([Predictions(torch.zeros(1, 2, 5, 7), mask_logits[:1])], targets)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "dice"}, "kind must be one of focal, bce, got 'dice'"),
        ({"alpha": 1.5}, "alpha must lie in 0..1"),
        ({"gamma": -1.0}, "gamma must be at least 0"),
        ({"gamma": float("nan")}, "gamma must be at least 0"),
    ],
)
def test_bad_mask_terms(options, message):
    with pytest.raises(ValueError, match=message):
        MaskTerm(**options)


def test_a_matcher_or_criterion_without_a_mask_term():
    with pytest.raises(TypeError, match="term must be a fastmask.MaskTerm, got str"):
        HungarianMatcher(term="bce")
    with pytest.raises(TypeError, match="term must be a fastmask.MaskTerm, got str"):
        SetCriterion(2, FixedMatcher(), {}, term="bce")
