from __future__ import annotations

from functools import partial

import pytest
import torch

import fastmask
from fastmask import MaskTerm, Targets
from fastmask.testing import assert_within_budget, simd_level, simd_levels
from tests.helpers.inputs import SHAPES, random_assignment, random_logits, random_points, random_targets

mask_loss = partial(fastmask.mask_loss, term=MaskTerm("bce"))  # as Mask2Former has it
FORMS = ("segments", "masks", "masks+valid")


def losses_and_gradient(mask_logits, targets, assignment, points, weights, **options):
    """Losses of each pair, and the gradient of their weighted sum, so that every pair has a gradient of its own."""
    mask_logits = mask_logits.detach().clone().requires_grad_()
    pairs = mask_loss(mask_logits, targets, assignment, points, reduction="none", **options)
    total = sum((loss * weight).sum() for loss, weight in zip(pairs, weights, strict=True))
    (gradient,) = torch.autograd.grad(total, mask_logits)
    return *(loss.detach() for loss in pairs), gradient


def check_against_reference(mask_logits, targets, assignment, points, generator, **options):
    weights = torch.randn(2, *assignment.shape, generator=generator)
    rounded, others = mask_logits.float(), (targets, assignment, points)
    exact = losses_and_gradient(rounded.double(), *others, weights.double(), backend="reference", **options)
    same_dtype = losses_and_gradient(rounded, *others, weights, backend="reference", **options)
    actual = losses_and_gradient(mask_logits, *others, weights, backend="native", **options)
    assert actual[2].dtype == mask_logits.dtype
    for name, *results in zip(("loss_mask", "loss_dice", "gradient"), actual, same_dtype, exact, strict=True):
        assert_within_budget(*results, name=name)
    return actual


def inputs_of(shape, generator, form, *, num_points=300, **options):
    targets = random_targets(shape, generator, form, **options)
    assignment = random_assignment(shape, targets, generator)
    points = random_points(generator, *assignment.shape, num_points)
    return random_logits(shape, generator)[1], targets, assignment, points


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("ignore_void", [False, True])
def test_equals_the_reference(shape, form, ignore_void, generator):
    check_against_reference(
        *inputs_of(shape, generator, form), generator, term=MaskTerm("bce", ignore_void=ignore_void)
    )


@pytest.mark.parametrize(
    "term",
    [
        MaskTerm(),
        MaskTerm(gamma=0.0),
        MaskTerm(gamma=1.5),
        MaskTerm(alpha=0.0),
        MaskTerm(alpha=1.0),
    ],
)
def test_terms(term, generator):
    check_against_reference(*inputs_of(SHAPES["odd sizes"], generator, "segments"), generator, term=term)


@pytest.mark.parametrize("num_points", [1, 17, 12544])
def test_numbers_of_points(num_points, generator):
    inputs = inputs_of(SHAPES["odd sizes"], generator, "segments", num_points=num_points)
    check_against_reference(*inputs, generator)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits(dtype, generator):
    mask_logits, *others = inputs_of(SHAPES["odd sizes"], generator, "masks")
    check_against_reference(mask_logits.to(dtype), *others, generator)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
@pytest.mark.parametrize("size", [(30, 30), (1, 1), (1, 3), (5, 1)])
def test_wide_segment_maps(dtype, size, generator):
    inputs = inputs_of((1, 2, 310, 4, 300, 6, 6, *size), generator, "segments", dtype=dtype, num_points=40)
    check_against_reference(*inputs, generator, term=MaskTerm("bce", ignore_void=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (3, 1), (2, 2)])
def test_targets_of_few_pixels(form, size, generator):
    """Reads of four bytes at once must not go beyond the map."""
    check_against_reference(
        *inputs_of((1, 1, 3, 2, 2, 4, 5, *size), generator, form), generator, term=MaskTerm("bce", ignore_void=True)
    )


@pytest.mark.parametrize("scale", [30.0, 200.0])
def test_saturated_logits(scale, generator):
    mask_logits, *others = inputs_of(SHAPES["odd sizes"], generator, "masks")
    check_against_reference(mask_logits * scale, *others, generator)


@pytest.mark.parametrize("level", simd_levels())
@pytest.mark.parametrize("form", ["segments", "masks+valid"])
def test_every_simd_level(level, form, generator):
    mask_logits, *others = inputs_of(SHAPES["odd sizes"], generator, form)
    with simd_level(level):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            check_against_reference(mask_logits.to(dtype), *others, generator, term=MaskTerm("bce", ignore_void=True))


def test_equal_masks_and_segments_lose_the_same(generator):
    mask_logits, targets, *others = inputs_of(SHAPES["odd sizes"], generator, "segments")
    masks = Targets(targets.labels, targets.counts, masks=targets.dense_masks(), valid=targets.valid_pixels())
    weights = torch.ones(2, *others[0].shape)
    for ignore_void in (False, True):
        results = [
            losses_and_gradient(mask_logits, form, *others, weights, term=MaskTerm("bce", ignore_void=ignore_void))
            for form in (targets, masks)
        ]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_reductions(generator):
    inputs = inputs_of(SHAPES["usual"], generator, "segments")
    pairs = mask_loss(*inputs, reduction="none")
    sums = mask_loss(*inputs)
    given = mask_loss(*inputs, num_masks=3.0)
    for pair, total, by_three in zip(pairs, sums, given, strict=True):
        torch.testing.assert_close(total, pair.sum((-2, -1)) / inputs[1].counts.sum())
        torch.testing.assert_close(by_three, pair.sum((-2, -1)) / 3)


def test_unmatched_queries_get_no_gradient(generator):
    mask_logits, targets, assignment, points = inputs_of(SHAPES["usual"], generator, "segments")
    mask_logits.requires_grad_()
    sum(loss.sum() for loss in mask_loss(mask_logits, targets, assignment, points)).backward()
    matched = torch.zeros(mask_logits.shape[:3], dtype=torch.bool)
    for layer, image, target in (assignment >= 0).nonzero().tolist():
        matched[layer, image, assignment[layer, image, target]] = True
    assert (mask_logits.grad[~matched] == 0).all()
    assert mask_logits.grad[matched].flatten(1).any(1).all()


def test_a_query_matched_twice_gets_both_gradients(generator):
    mask_logits, targets, _, points = inputs_of(SHAPES["usual"], generator, "segments")
    assignment = torch.where(targets.labels >= 0, 4, -1).expand(2, -1, -1)
    check_against_reference(mask_logits, targets, assignment, points, generator)


def test_non_contiguous_inputs_and_leading_dimensions(generator):
    mask_logits, targets, assignment, points = inputs_of(SHAPES["usual"], generator, "masks")
    weights = torch.ones(2, *assignment.shape)
    expected = losses_and_gradient(mask_logits, targets, assignment, points, weights)
    flipped = Targets(targets.labels, targets.counts, masks=targets.masks.mT.contiguous().mT)
    strided = assignment.repeat_interleave(2, -1)[..., ::2]
    for logits in (mask_logits.mT.contiguous().mT, mask_logits.transpose(0, 1).contiguous().transpose(0, 1)):
        actual = losses_and_gradient(logits, flipped, strided, points.mT.contiguous().mT, weights)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    one = mask_loss(mask_logits[1], targets, assignment[1], points[1], reduction="none")
    assert torch.equal(one[0], expected[0][1])


def test_the_gradient_is_laid_out_like_the_logits(generator):
    mask_logits, *others = inputs_of(SHAPES["usual"], generator, "segments")
    strided = mask_logits.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(sum(loss.sum() for loss in mask_loss(strided, *others)), strided)
    assert gradient.stride() == strided.stride() != mask_logits.stride()


def test_two_runs_give_the_same_bits_on_any_number_of_threads(generator):
    inputs = inputs_of(SHAPES["usual"], generator, "masks")
    weights = torch.ones(2, *inputs[2].shape)
    first = losses_and_gradient(*inputs, weights)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        second = losses_and_gradient(*inputs, weights)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_points_beyond_the_map_and_nan_are_background(generator):
    mask_logits, targets, assignment, points = inputs_of(SHAPES["usual"], generator, "segments", num_points=6)
    points[:] = torch.tensor([[-0.5, 0.5], [2.0, 0.1], [0.3, -7.0], [1e30, 0.2], [-1e30, 1e30], [0.5, 1.5]])
    weights = torch.ones(2, *assignment.shape)
    check_against_reference(mask_logits, targets, assignment, points, generator)
    loss_mask, _, gradient = losses_and_gradient(
        mask_logits, targets, assignment, torch.full_like(points, float("nan")), weights
    )
    torch.testing.assert_close(loss_mask[assignment >= 0], torch.tensor(2.0).log().expand((assignment >= 0).sum()))
    assert not gradient.any()


def test_all_void(generator):
    mask_logits, targets, assignment, points = inputs_of(SHAPES["usual"], generator, "segments")
    void = Targets(targets.labels, targets.counts, segments=torch.full_like(targets.segments, 255))
    weights = torch.ones(2, *assignment.shape)
    mask_logits[:] = float("nan")
    inner = 0.2 + 0.6 * points
    results = losses_and_gradient(mask_logits, void, assignment, inner, weights, term=MaskTerm("bce", ignore_void=True))
    assert not any(result.any() for result in results)


def test_nan_logits_reach_only_their_pair(generator):
    mask_logits, targets, assignment, points = inputs_of(SHAPES["usual"], generator, "segments")
    weights = torch.ones(2, *assignment.shape)
    expected = losses_and_gradient(mask_logits, targets, assignment, points, weights)
    image = targets.batch_size - 1
    matched = assignment[0, image, 0]
    unmatched = next(n for n in range(mask_logits.shape[2]) if n not in assignment[1, image])
    mask_logits[0, image, matched] = float("nan")
    mask_logits[1, image, unmatched] = float("nan")
    actual = losses_and_gradient(mask_logits, targets, assignment, points, weights)
    for losses, wanted in zip(actual[:2], expected[:2], strict=True):
        assert losses[0, image, 0].isnan()
        losses[0, image, 0] = wanted[0, image, 0]
        assert torch.equal(losses, wanted)
    assert actual[2][0, image, matched].isnan().any()
    actual[2][0, image, matched] = expected[2][0, image, matched]
    assert torch.equal(actual[2], expected[2])


def test_large_half_precision_logits_do_not_overflow():
    mask_logits = torch.tensor([[6e4, -6e4], [6e4, 6e4]], dtype=torch.float16).reshape(1, 1, 2, 2).requires_grad_()
    targets = Targets.from_segments(torch.zeros(1, 8, 8, dtype=torch.uint8), [torch.tensor([0])])
    points = torch.rand(1, 1, 100, 2, generator=torch.Generator().manual_seed(0))
    losses = mask_loss(mask_logits, targets, torch.zeros(1, 1, dtype=torch.int64), points)
    sum(losses).backward()
    assert all(loss.isfinite() for loss in losses)
    assert mask_logits.grad.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form, generator):
    mask_logits, targets, assignment, points = inputs_of((1, 2, 4, 3, 2, 5, 6, 11, 13), generator, form, num_points=9)
    arguments = (
        mask_logits.requires_grad_(), assignment, targets.labels, targets.masks, targets.segments, targets.valid,
        targets.void, True, points, "bce", 0.25, 2.0,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.fastmask.point_mask_loss.default, arguments)
    pair_mask, _, sums = torch.ops.fastmask.point_mask_loss(*arguments)
    gradients = torch.randn_like(pair_mask), torch.randn_like(pair_mask)
    for layout in (lambda x: x, lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), lambda x: x.mT):
        logits = layout(mask_logits.detach())
        torch.library.opcheck(
            torch.ops.fastmask.point_mask_loss_backward.default, (*gradients, sums.detach(), logits, *arguments[1:])
        )


def test_compiles_to_one_graph(generator):
    mask_logits, *others = inputs_of(SHAPES["odd sizes"], generator, "segments")

    def total(mask_logits):
        loss_mask, loss_dice = mask_loss(mask_logits, *others)
        return (5 * loss_mask + 5 * loss_dice).sum()

    gradients = []
    for function in (total, torch.compile(total, fullgraph=True, backend="aot_eager")):
        logits = mask_logits.clone().requires_grad_()
        function(logits).backward()
        gradients.append(logits.grad)
    assert torch.equal(*gradients)


BAD_ARGUMENTS = {
    "points of one target": (lambda m, t, a, p: (m, t, a, p[:, :, 0]), {}, ValueError, "points has shape"),
    "points of other targets": (lambda m, t, a, p: (m, t, a, p[:, :, :2]), {}, ValueError, "points has shape"),
    "no points": (lambda m, t, a, p: (m, t, a, p[..., :0, :]), {}, ValueError, "at least one point"),
    "points of half precision": (lambda m, t, a, p: (m, t, a, p.half()), {}, TypeError, "points must be float32"),
    "float assignment": (lambda m, t, a, p: (m, t, a.float(), p), {}, TypeError, "assignment must have dtype int64"),
    "query beyond N": (lambda m, t, a, p: (m, t, a + 20, p), {}, ValueError, "assignment holds"),
    "integer logits": (lambda m, t, a, p: (m.int(), t, a, p), {}, TypeError, "mask_logits must be floating point"),
    "unknown reduction": (lambda m, t, a, p: (m, t, a, p), {"reduction": "mean"}, ValueError, "reduction must be"),
    "no term": (
        lambda m, t, a, p: (m, t, a, p),
        {"term": "bce"},
        TypeError,
        "term must be a fastmask.MaskTerm, got str",
    ),
}


@pytest.mark.parametrize(("change", "options", "error", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments(change, options, error, message, generator):
    inputs = inputs_of(SHAPES["usual"], generator, "segments")
    with pytest.raises(error, match=message):
        fastmask.mask_loss(*change(*inputs), **options)
