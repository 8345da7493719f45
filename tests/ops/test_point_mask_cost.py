from __future__ import annotations

from functools import partial

import pytest
import torch

import fastmask
from fastmask import MaskTerm, Targets
from fastmask.testing import assert_within_budget, simd_level, simd_levels
from tests.helpers.inputs import SHAPES, random_logits, random_points, random_targets

mask_cost = partial(fastmask.mask_cost, term=MaskTerm("bce"))  # as Mask2Former has it
FORMS = ("segments", "masks", "masks+valid")
WEIGHTS = {"cost_class": 2.0, "cost_mask": 5.0, "cost_dice": 5.0}


def check_against_reference(class_logits, mask_logits, targets, points, **options):
    rounded = class_logits.float(), mask_logits.float()
    doubled = [x.double() for x in rounded]
    exact = mask_cost(*doubled, targets, points, backend="reference", **WEIGHTS, **options)
    same_dtype = mask_cost(*rounded, targets, points, backend="reference", **WEIGHTS, **options)
    actual = mask_cost(class_logits, mask_logits, targets, points, backend="native", **WEIGHTS, **options)
    assert actual.dtype == torch.float32
    assert_within_budget(actual, same_dtype, exact)
    return actual


def inputs_of(shape, generator, form, *, num_points=400, **options):
    targets = random_targets(shape, generator, form, **options)
    return *random_logits(shape, generator), targets, random_points(generator, shape[1], num_points)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("ignore_void", [False, True])
def test_equals_the_reference(shape, form, ignore_void, generator):
    check_against_reference(*inputs_of(shape, generator, form), term=MaskTerm("bce", ignore_void=ignore_void))


@pytest.mark.parametrize(
    "term",
    [
        MaskTerm(),
        MaskTerm(gamma=0.0),
        MaskTerm(gamma=1.5),
        MaskTerm(alpha=0.0),
    ],
)
def test_terms(term, generator):
    check_against_reference(*inputs_of(SHAPES["odd sizes"], generator, "segments"), term=term)


@pytest.mark.parametrize("num_points", [1, 31, 12544])
def test_numbers_of_points(num_points, generator):
    check_against_reference(*inputs_of(SHAPES["odd sizes"], generator, "segments", num_points=num_points))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits(dtype, generator):
    class_logits, mask_logits, *others = inputs_of(SHAPES["odd sizes"], generator, "masks")
    check_against_reference(class_logits.to(dtype), mask_logits.to(dtype), *others)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
def test_wide_segment_maps(dtype, generator):
    inputs = inputs_of((1, 2, 310, 4, 300, 6, 6, 30, 30), generator, "segments", dtype=dtype)
    check_against_reference(*inputs, term=MaskTerm("bce", ignore_void=True))


@pytest.mark.parametrize("scale", [30.0, 200.0])
def test_saturated_logits(scale, generator):
    class_logits, mask_logits, *others = inputs_of(SHAPES["odd sizes"], generator, "masks")
    check_against_reference(class_logits, mask_logits * scale, *others)


@pytest.mark.parametrize("level", simd_levels())
@pytest.mark.parametrize("form", ["segments", "masks+valid"])
def test_every_simd_level(level, form, generator):
    class_logits, mask_logits, *others = inputs_of(SHAPES["odd sizes"], generator, form)
    with simd_level(level):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            check_against_reference(
                class_logits.to(dtype), mask_logits.to(dtype), *others, term=MaskTerm("bce", ignore_void=True)
            )


def test_points_beyond_the_map_and_nan_are_background(generator):
    class_logits, mask_logits, targets, points = inputs_of(SHAPES["usual"], generator, "segments", num_points=6)
    points[:] = torch.tensor([[-0.5, 0.5], [2.0, 0.1], [0.3, -7.0], [1e30, 0.2], [-1e30, 1e30], [0.5, 1.5]])
    expected = mask_cost(torch.zeros_like(class_logits), torch.zeros_like(mask_logits), targets, points[:, :1])
    for these in (points, torch.full_like(points, float("nan"))):
        actual = mask_cost(torch.zeros_like(class_logits), mask_logits, targets, these, cost_dice=0.0)
        without_dice = mask_cost(
            torch.zeros_like(class_logits), torch.zeros_like(mask_logits), targets, points[:, :1], cost_dice=0.0
        )
        torch.testing.assert_close(actual, without_dice)
    assert expected.isfinite().all()


def test_equal_masks_and_segments_cost_the_same(generator):
    class_logits, mask_logits, targets, points = inputs_of(SHAPES["odd sizes"], generator, "segments")
    masks = Targets(targets.labels, targets.counts, masks=targets.dense_masks(), valid=targets.valid_pixels())
    for ignore_void in (False, True):
        one, other = (
            mask_cost(class_logits, mask_logits, form, points, term=MaskTerm("bce", ignore_void=ignore_void))
            for form in (targets, masks)
        )
        assert torch.equal(one, other)


def test_non_contiguous_inputs_and_leading_dimensions(generator):
    class_logits, mask_logits, targets, points = inputs_of(SHAPES["usual"], generator, "masks")
    expected = mask_cost(class_logits, mask_logits, targets, points)
    flipped = Targets(targets.labels, targets.counts, masks=targets.masks.mT.contiguous().mT)
    for strided in (mask_logits.mT.contiguous().mT, mask_logits.transpose(0, 1).contiguous().transpose(0, 1)):
        actual = mask_cost(class_logits.mT.contiguous().mT, strided, flipped, points.mT.contiguous().mT)
        assert torch.equal(actual, expected)
    assert torch.equal(mask_cost(class_logits[1], mask_logits[1], targets, points), expected[1])


def test_two_runs_give_the_same_bits_on_any_number_of_threads(generator):
    inputs = inputs_of(SHAPES["usual"], generator, "masks")
    first = mask_cost(*inputs)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        second = mask_cost(*inputs)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(first, second)


def test_nan_logits_reach_only_their_query(generator):
    class_logits, mask_logits, targets, points = inputs_of(SHAPES["usual"], generator, "segments")
    expected = mask_cost(class_logits, mask_logits, targets, points)
    mask_logits[1, 0, 3] = float("nan")
    class_logits[0, 1, 2, 0] = float("nan")
    actual = mask_cost(class_logits, mask_logits, targets, points)
    present = targets.labels >= 0
    assert actual[1, 0, 3][present[0]].isnan().all()
    assert actual[0, 1, 2][present[1]].isnan().all()
    actual[1, 0, 3] = expected[1, 0, 3]
    actual[0, 1, 2] = expected[0, 1, 2]
    assert torch.equal(actual, expected)


def test_void_points_hide_nan_logits(generator):
    class_logits, mask_logits, targets, points = inputs_of(SHAPES["usual"], generator, "segments")
    void = Targets(targets.labels, targets.counts, segments=torch.full_like(targets.segments, 255))
    inner = 0.2 + 0.6 * points
    expected = mask_cost(class_logits, mask_logits, void, inner, term=MaskTerm("bce", ignore_void=True), cost_dice=2.0)
    mask_logits[:] = float("nan")
    assert torch.equal(
        mask_cost(class_logits, mask_logits, void, inner, term=MaskTerm("bce", ignore_void=True)), expected
    )


@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form, generator):
    class_logits, mask_logits, targets, points = inputs_of((1, 2, 4, 3, 2, 5, 6, 11, 13), generator, form)
    torch.library.opcheck(
        torch.ops.fastmask.point_mask_cost.default,
        (
            class_logits, mask_logits, targets.labels, targets.masks, targets.segments, targets.valid, targets.void,
            True, points, 2.0, 5.0, 5.0, "bce", 0.25, 2.0,
        ),
    )  # fmt: skip


def test_compiles_to_one_graph(generator):
    class_logits, mask_logits, targets, points = inputs_of(SHAPES["odd sizes"], generator, "segments")
    compiled = torch.compile(fastmask.mask_cost, fullgraph=True, backend="aot_eager")
    assert torch.equal(
        compiled(class_logits, mask_logits, targets, points, term=MaskTerm("bce")),
        mask_cost(class_logits, mask_logits, targets, points),
    )


BAD_ARGUMENTS = {
    "points of one image": (lambda c, m, t, p: (c, m, t, p[0]), {}, ValueError, "points has shape \\(400, 2\\)"),
    "points of another batch": (lambda c, m, t, p: (c, m, t, p[:1]), {}, ValueError, "points has shape"),
    "points in three dimensions": (lambda c, m, t, p: (c, m, t, p.repeat(1, 1, 2)), {}, ValueError, "points has shape"),
    "no points": (lambda c, m, t, p: (c, m, t, p[:, :0]), {}, ValueError, "at least one point"),
    "points of integers": (lambda c, m, t, p: (c, m, t, p.long()), {}, TypeError, "points must be float32 or float64"),
    "points of half precision": (lambda c, m, t, p: (c, m, t, p.half()), {}, TypeError, "points must be float32"),
    "points in a list": (lambda c, m, t, p: (c, m, t, p.tolist()), {}, TypeError, "points must be a tensor"),
    "another batch": (lambda c, m, t, p: (c[:, :1], m[:, :1], t, p), {}, ValueError, "targets has 2 images"),
    "no term": (
        lambda c, m, t, p: (c, m, t, p),
        {"term": "bce"},
        TypeError,
        "term must be a fastmask.MaskTerm, got str",
    ),
}


@pytest.mark.parametrize(("change", "options", "error", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments(change, options, error, message, generator):
    inputs = inputs_of(SHAPES["usual"], generator, "segments")
    with pytest.raises(error, match=message):
        fastmask.mask_cost(*change(*inputs), **options)
