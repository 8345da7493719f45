"""Semantic maps from several views: against averages of whole score maps."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn
from torch.nn.functional import interpolate

from fastmask import semantic_inference
from fastmask.functional import SemanticView, merge_views
from fastmask.models import MaskFormer, MaskFormerConfig
from fastmask.models._views import EvaluationViews
from fastmask.ops import semantic_views
from fastmask.testing import assert_within_budget

SIZE = (50, 70)
# (top, left, size, logits' grid, mirrored): rectangles of all kinds that together cover the map, sorted by top.
RECTANGLES = {
    "whole": [(0, 0, SIZE, (13, 18), False)],
    "scales and mirror images": [
        (0, 0, SIZE, grid, mirrored) for grid in ((7, 9), (13, 18), (60, 80)) for mirrored in (False, True)
    ],
    "windows": [
        (0, 0, (30, 40), (8, 10), False),
        (0, 30, (30, 40), (8, 10), True),
        (20, 0, (30, 40), (8, 10), False),
        (20, 30, (30, 40), (8, 10), False),
    ],
    "windows upon the whole": [
        (0, 0, SIZE, (13, 18), False),
        (3, 11, (1, 9), (4, 4), True),
        (3, 60, (47, 10), (5, 5), False),
    ],
}


def random_views(rectangles, generator, *, num_classes=7, embeddings=False):
    for top, left, size, grid, mirrored in rectangles:
        num_queries = 5 + top % 3
        class_logits = 2 * torch.randn(num_queries, num_classes + 1, generator=generator)
        if embeddings:
            masks = torch.randn(num_queries, 8, generator=generator), torch.randn(8, *grid, generator=generator)
        else:
            masks = 4 * torch.randn(num_queries, *grid, generator=generator)
        yield SemanticView(class_logits, masks, top, left, size, mirrored)


def average(views, *, dtype=torch.float64, **options):
    """``(K, H, W)``: each view's whole score map added in place, by the reference."""
    total, coverage = 0, torch.zeros(SIZE, dtype=dtype)
    for view in views:
        masks = view.mask_logits
        if not isinstance(masks, torch.Tensor):
            masks = torch.einsum("nc,chw->nhw", *masks)
        scores = semantic_inference(
            view.class_logits[None].to(dtype),
            masks[None].to(dtype),
            view.size,
            output="scores",
            backend="reference",
            **options,
        )[0]
        scores = scores.flip(-1) if view.mirrored else scores
        canvas = torch.zeros(len(scores), *SIZE, dtype=dtype)
        canvas[:, view.top : view.end, view.left : view.left + view.size[1]] = scores
        total = total + canvas
        coverage[view.top : view.end, view.left : view.left + view.size[1]] += 1
    return total / coverage


@pytest.mark.parametrize("order", ["masks", "scores"])
@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("rectangles", RECTANGLES.values(), ids=RECTANGLES)
@pytest.mark.parametrize("band_rows", [1, 7, 100])
def test_views_are_averaged(rectangles, backend, embeddings, order, band_rows, generator, monkeypatch):
    monkeypatch.setattr(semantic_views, "BAND_BYTES", band_rows * 7 * SIZE[1] * 4)
    views = list(random_views(rectangles, generator, embeddings=embeddings))
    expected, same_dtype = (average(views, dtype=dtype, order=order) for dtype in (torch.float64, torch.float32))
    scores = merge_views(views, SIZE, order=order, output="scores", backend=backend)
    assert scores.dtype == torch.float32
    assert_within_budget(scores, same_dtype, expected)
    labels = merge_views(iter(views), SIZE, order=order, backend=backend)
    assert labels.dtype == torch.uint8
    assert torch.equal(labels.long(), scores.argmax(0))


def test_views_are_made_when_needed_and_dropped_afterwards(generator):
    alive, most = [0], [0]

    class Counted(torch.Tensor):
        """A tensor whose end can be noticed."""

    def views():
        for top in range(0, 96, 8):
            masks = torch.randn(3, 6, 6, generator=generator).as_subclass(Counted)
            alive[0] += 1
            most[0] = max(most[0], alive[0])
            weakref.finalize(masks, lambda: alive.__setitem__(0, alive[0] - 1))
            yield SemanticView(torch.randn(3, 5, generator=generator), masks, top, 0, (24, 40))
            del masks

    assert merge_views(views(), (112, 40)).shape == (112, 40)
    assert most[0] <= 6


@pytest.mark.parametrize(
    ("rectangles", "message"),
    [
        ([], "leave row 0 uncovered"),
        ([(0, 0, (20, 70), (4, 4), False)], "leave row 20 uncovered"),
        ([(0, 0, (50, 60), (4, 4), False)], "leave columns of rows 0..50 uncovered"),
        ([(0, 0, (50, 71), (4, 4), False)], "expected views to lie within 50 x 70"),
        ([(0, 0, SIZE, (4, 4), False), (20, 0, (30, 70), (4, 4), False), (10, 0, (9, 9), (4, 4), False)], "by top"),
    ],
)
def test_views_that_do_not_cover_the_map(rectangles, message, generator):
    with pytest.raises(ValueError, match=message):
        merge_views(random_views(rectangles, generator), SIZE)


def test_plans():
    views = EvaluationViews((32, 20), (1.0, 2.0), True, 1)
    plans = views.plan((50, 30))
    assert [plan.top for plan in plans] == sorted(plan.top for plan in plans)
    ones = [plan for plan in plans if plan.input_size == (32, 30)]
    assert {(plan.top, plan.left, plan.size) for plan in ones} == {(0, 0, (32, 30)), (18, 0, (32, 30))}
    twos = [plan for plan in plans if plan.input_size == (32, 32)]
    assert {plan.top for plan in twos} == {0, 10, 20, 30, 34} and {plan.left for plan in twos} == {0, 10, 14}
    assert len(plans) == len(ones) + len(twos) == 2 * (2 + 15)
    for size in ((1, 1), (7, 200), (33, 32)):
        for scale in (0.3, 0.5, 1.75):
            covered = torch.zeros(size)
            for plan in EvaluationViews((16, 16), (scale,), False, 1).plan(size):
                covered[plan.top : plan.top + plan.size[0], plan.left : plan.left + plan.size[1]] += 1
            assert covered.all()


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = MaskFormer(MaskFormerConfig.preset("tiny", 4, num_queries=6))
    nn.init.normal_(model.predictor.class_embed.weight)
    nn.init.normal_(model.pixel_decoder.mask_features.weight)
    return model.double().eval()  # convolutions of a batch round otherwise than those of its images alone


@pytest.mark.parametrize("order", ["masks", "scores"])
def test_multi_scale_prediction(model, order):
    image = torch.rand(3, 60, 90).double()
    expected = 0
    for scale in (0.5, 1.5):
        size = round(60 * scale), round(90 * scale)
        pixels = interpolate(image[None], size, mode="bilinear", antialias=True).clamp(0, 1)
        for flip in (False, True):
            seen = pixels.flip(-1) if flip else pixels
            scores = model.predict(seen, sizes=(60, 90), output="scores", order=order)[0]
            expected = expected + (scores.flip(-1) if flip else scores) / 4
    options = {"scales": (0.5, 1.5), "flip": True, "order": order}
    torch.testing.assert_close(model.predict([image], output="scores", **options)[0], expected)
    labels = model.predict(image[None], **options)[0]
    sure = expected.sort(0).values.diff(dim=0)[-1] > 1e-5
    assert torch.equal(labels[sure].long(), expected.argmax(0)[sure]) and sure.float().mean() > 0.99


def test_windows(model):
    images = [torch.rand(3, 70, 90).double(), torch.rand(3, 40, 64).double()]
    expected, coverage = torch.zeros(4, 70, 90).double(), torch.zeros(70, 90)
    for top in (0, 6):
        for left in (0, 26):
            window = images[0][None, :, top : top + 64, left : left + 64]
            expected[:, top : top + 64, left : left + 64] += model.predict(window, output="scores")[0]
            coverage[top : top + 64, left : left + 64] += 1
    for view_batch in (1, 3):
        scores = model.predict(images, window=(64, 48), output="scores", view_batch=view_batch)
        torch.testing.assert_close(scores[0], expected / coverage)
        torch.testing.assert_close(scores[1], model.predict(images[1][None], output="scores")[0])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"window": 64}, TypeError, r"window must be \(size, stride\)"),
        ({"window": (64, 65)}, ValueError, "window must have a stride"),
        ({"scales": ()}, ValueError, "scales must be positive"),
        ({"scales": (1.0, 0.0)}, ValueError, "scales must be positive"),
        ({"flip": True, "view_batch": 0}, ValueError, "view_batch must be at least 1"),
        ({"flip": True, "task": "panoptic"}, ValueError, 'go with task "semantic"'),
        ({"window": (64, 64), "sizes": (30, 30)}, ValueError, "has the size of the image"),
        ({"flip": True, "details": True}, TypeError, "details"),
    ],
)
def test_bad_options(model, options, error, message):
    with pytest.raises(error, match=message):
        model.predict(torch.rand(1, 3, 70, 70).double(), **options)
