from __future__ import annotations

import pytest
import torch

import fastmask
from fastmask import MaskTerm, Targets, mask_loss
from fastmask.testing import assert_within_budget, simd_level, simd_levels
from tests.helpers.inputs import SHAPES, TERMS, random_assignment, random_logits, random_targets

FORMS = ("segments", "masks", "masks+valid")


def losses_and_gradient(mask_logits, targets, assignment, weights, **options):
    """Losses of each pair, and the gradient of their weighted sum, so that every pair has a gradient of its own."""
    mask_logits = mask_logits.detach().clone().requires_grad_()
    pairs = mask_loss(mask_logits, targets, assignment, reduction="none", **options)
    total = sum((loss * weight).sum() for loss, weight in zip(pairs, weights, strict=True))
    (gradient,) = torch.autograd.grad(total, mask_logits)
    return *(loss.detach() for loss in pairs), gradient


def check_against_reference(mask_logits, targets, assignment, generator, **options):
    weights = torch.randn(2, *assignment.shape, generator=generator)
    rounded = mask_logits.float()
    exact = losses_and_gradient(rounded.double(), targets, assignment, weights.double(), backend="reference", **options)
    same_dtype = losses_and_gradient(rounded, targets, assignment, weights, backend="reference", **options)
    actual = losses_and_gradient(mask_logits, targets, assignment, weights, backend="native", **options)
    assert actual[2].dtype == mask_logits.dtype
    for name, *results in zip(("loss_mask", "loss_dice", "gradient"), actual, same_dtype, exact, strict=True):
        assert_within_budget(*results, name=name)
    return actual


def inputs_of(shape, generator, form, **options):
    targets = random_targets(shape, generator, form, **options)
    return random_logits(shape, generator)[1], targets, random_assignment(shape, targets, generator)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("ignore_void", [False, True])
def test_equals_the_reference(shape, form, ignore_void, generator):
    check_against_reference(*inputs_of(shape, generator, form), generator, term=MaskTerm(ignore_void=ignore_void))


@pytest.mark.parametrize("term", TERMS, ids=str)
def test_terms(term, generator):
    check_against_reference(*inputs_of(SHAPES["odd sizes"], generator, "segments"), generator, term=term)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits(dtype, generator):
    mask_logits, targets, assignment = inputs_of(SHAPES["odd sizes"], generator, "masks")
    check_against_reference(mask_logits.to(dtype), targets, assignment, generator)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
def test_wide_segment_maps(dtype, generator):
    inputs = inputs_of((1, 2, 310, 4, 300, 6, 6, 30, 30), generator, "segments", dtype=dtype)
    check_against_reference(*inputs, generator, term=MaskTerm(ignore_void=True))


@pytest.mark.parametrize("scale", [30.0, 200.0])
def test_saturated_logits(scale, generator):
    mask_logits, targets, assignment = inputs_of(SHAPES["odd sizes"], generator, "masks")
    check_against_reference(mask_logits * scale, targets, assignment, generator)


@pytest.mark.parametrize("level", simd_levels())
def test_every_simd_level(level, generator):
    mask_logits, targets, assignment = inputs_of(SHAPES["odd sizes"], generator, "masks+valid")
    with simd_level(level):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            check_against_reference(
                mask_logits.to(dtype), targets, assignment, generator, term=MaskTerm(ignore_void=True)
            )


def test_gradient_of_the_sum_over_the_number_of_masks(generator):
    mask_logits, targets, assignment = inputs_of(SHAPES["usual"], generator, "segments")
    pairs = mask_loss(mask_logits, targets, assignment, reduction="none")
    sums = mask_loss(mask_logits, targets, assignment)
    given = mask_loss(mask_logits, targets, assignment, num_masks=3.0)
    for pair, total, by_three in zip(pairs, sums, given, strict=True):
        torch.testing.assert_close(total, pair.sum((-2, -1)) / targets.counts.sum())
        torch.testing.assert_close(by_three, pair.sum((-2, -1)) / 3)


def test_unmatched_queries_get_no_gradient(generator):
    mask_logits, targets, assignment = inputs_of(SHAPES["usual"], generator, "segments")
    mask_logits.requires_grad_()
    sum(loss.sum() for loss in mask_loss(mask_logits, targets, assignment)).backward()
    matched = torch.zeros(mask_logits.shape[:3], dtype=torch.bool)
    for layer, image, target in (assignment >= 0).nonzero().tolist():
        matched[layer, image, assignment[layer, image, target]] = True
    assert (mask_logits.grad[~matched] == 0).all()
    assert mask_logits.grad[matched].flatten(1).any(1).all()


def test_a_query_matched_twice_gets_both_gradients(generator):
    mask_logits, targets, _ = inputs_of(SHAPES["usual"], generator, "segments")
    assignment = torch.where(targets.labels >= 0, 4, -1).expand(2, -1, -1)
    check_against_reference(mask_logits, targets, assignment, generator)


def test_non_contiguous_inputs(generator):
    mask_logits, targets, assignment = inputs_of(SHAPES["odd sizes"], generator, "masks")
    expected = mask_loss(mask_logits, targets, assignment)
    transposed = mask_logits.mT.contiguous().mT
    flipped = Targets(targets.labels, targets.counts, masks=targets.masks.mT.contiguous().mT)
    strided = assignment.repeat_interleave(2, -1)[..., ::2]
    assert not transposed.is_contiguous()
    assert not strided.is_contiguous()
    for actual, wanted in zip(mask_loss(transposed, flipped, strided), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_layers_inside_images_are_read_in_place_and_the_gradient_is_laid_out_alike(generator):
    mask_logits, targets, assignment = inputs_of(SHAPES["usual"], generator, "segments")
    weights = torch.randn(2, *assignment.shape, generator=generator)
    strided = mask_logits.transpose(0, 1).contiguous().transpose(0, 1)
    expected = losses_and_gradient(mask_logits, targets, assignment, weights)
    strided.requires_grad_()
    losses = mask_loss(strided, targets, assignment, reduction="none")
    (gradient,) = torch.autograd.grad(sum((x * y).sum() for x, y in zip(losses, weights, strict=True)), strided)
    assert gradient.stride() == strided.stride() != mask_logits.stride()
    for actual, wanted in zip((*losses, gradient), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_leading_dimensions(generator):
    mask_logits, targets, assignment = inputs_of(SHAPES["usual"], generator, "segments")
    layers = mask_loss(mask_logits, targets, assignment)
    one = mask_loss(mask_logits[1], targets, assignment[1])
    assert one[0].shape == ()
    assert torch.equal(one[0], layers[0][1])
    assert torch.equal(one[1], layers[1][1])


def test_two_runs_give_the_same_bits(generator):
    mask_logits, targets, assignment = inputs_of(SHAPES["usual"], generator, "masks")
    weights = torch.ones(2, *assignment.shape)
    first = losses_and_gradient(mask_logits, targets, assignment, weights)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        second = losses_and_gradient(mask_logits, targets, assignment, weights)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_all_void(generator):
    mask_logits, targets, assignment = inputs_of(SHAPES["usual"], generator, "segments")
    void = Targets(targets.labels, targets.counts, segments=torch.full_like(targets.segments, 255))
    loss_mask, loss_dice, gradient = check_against_reference(
        mask_logits, void, assignment, generator, term=MaskTerm(ignore_void=True)
    )
    assert not loss_mask.any()
    assert not loss_dice.any()
    assert not gradient.any()


def test_nan_logits_reach_only_their_pair(generator):
    mask_logits, targets, assignment = inputs_of(SHAPES["usual"], generator, "segments")
    expected = mask_loss(mask_logits, targets, assignment, reduction="none")
    image = targets.batch_size - 1
    matched = assignment[0, image, 0]
    unmatched = next(n for n in range(mask_logits.shape[2]) if n not in assignment[1, image])
    mask_logits[0, image, matched, 3, 3] = float("nan")
    mask_logits[1, image, unmatched] = float("nan")
    for actual, wanted in zip(mask_loss(mask_logits, targets, assignment, reduction="none"), expected, strict=True):
        assert actual[0, image, 0].isnan()
        actual[0, image, 0] = wanted[0, image, 0]
        assert torch.equal(actual, wanted)


def test_large_half_precision_logits_do_not_overflow():
    mask_logits = torch.tensor([[6e4, -6e4], [6e4, 6e4]], dtype=torch.float16).reshape(1, 1, 2, 2).requires_grad_()
    targets = Targets.from_segments(torch.zeros(1, 8, 8, dtype=torch.uint8), [torch.tensor([0])])
    losses = mask_loss(mask_logits, targets, torch.zeros(1, 1, dtype=torch.int64))
    sum(losses).backward()
    assert all(loss.isfinite() for loss in losses)
    assert mask_logits.grad.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form, generator):
    shape = (1, 2, 4, 3, 2, 5, 6, 11, 13)
    mask_logits, targets, assignment = inputs_of(shape, generator, form)
    arguments = (
        mask_logits.requires_grad_(), assignment, targets.labels, targets.masks, targets.segments, targets.valid,
        targets.void, True, "focal", 0.25, 2.0,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.fastmask.mask_loss.default, arguments)
    pair_mask, _, sums = torch.ops.fastmask.mask_loss(*arguments)
    gradients = torch.randn_like(pair_mask), torch.randn_like(pair_mask)
    arguments = (*gradients, sums.detach(), mask_logits.detach(), *arguments[1:])
    for layout in (
        lambda x: x,
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x.mT.contiguous().mT,
        lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
    ):
        arguments = (*arguments[:3], layout(arguments[3]), *arguments[4:])
        torch.library.opcheck(torch.ops.fastmask.mask_loss_backward.default, arguments)


def test_compiles_to_one_graph(generator):
    mask_logits, targets, assignment = inputs_of(SHAPES["odd sizes"], generator, "segments")

    def total(mask_logits):
        loss_mask, loss_dice = mask_loss(mask_logits, targets, assignment)
        return (20 * loss_mask + loss_dice).sum()

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    gradients = []
    for function in (total, compiled):
        logits = mask_logits.clone().requires_grad_()
        function(logits).backward()
        gradients.append(logits.grad)
    assert torch.equal(*gradients)


def test_extra_memory_does_not_grow_with_the_targets(generator):
    mask_logits, targets, assignment = inputs_of(SHAPES["usual"], generator, "segments")
    mask_logits.requires_grad_()
    large = targets.segments.repeat_interleave(4, 1).repeat_interleave(4, 2).contiguous()
    large = Targets(targets.labels, targets.counts, segments=large)
    sizes = []
    for these in (targets, large):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, out=saved: out.append(x) or x, lambda x: x):
            mask_loss(mask_logits, these, assignment)
        sizes.append(sum(x.numel() for x in saved if x.data_ptr() != these.segments.data_ptr()))
    assert sizes[0] == sizes[1]


BAD_ARGUMENTS = {
    "float assignment": (lambda m, t, a: (m, t, a.float()), {}, TypeError, "assignment must have dtype int64"),
    "another number of targets": (lambda m, t, a: (m, t, a[..., :2]), {}, ValueError, "assignment has shape"),
    "query beyond N": (lambda m, t, a: (m, t, a + 20), {}, ValueError, "assignment holds"),
    "query below -1": (lambda m, t, a: (m, t, a - 2), {}, ValueError, "assignment holds"),
    "another batch": (lambda m, t, a: (m[:, :1], t, a[:, :1]), {}, ValueError, "targets has 2 images"),
    "integer logits": (lambda m, t, a: (m.int(), t, a), {}, TypeError, "mask_logits must be floating point"),
    "unknown reduction": (lambda m, t, a: (m, t, a), {"reduction": "mean"}, ValueError, "reduction must be one of"),
    "no term": (lambda m, t, a: (m, t, a), {"term": "bce"}, TypeError, "term must be a fastmask.MaskTerm, got str"),
}


@pytest.mark.parametrize(("change", "options", "error", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments(change, options, error, message, generator):
    inputs = inputs_of(SHAPES["usual"], generator, "segments")
    with pytest.raises(error, match=message):
        fastmask.mask_loss(*change(*inputs), **options)


@pytest.mark.parametrize("form", ["segments", "masks"])
def test_sums_of_four_megapixels_do_not_overflow(form, generator):
    """float16 ends at 65504, float32 counts ones up to 2^24: the sums must hold 2^22 pixels of either sign."""
    size = 2048
    mask_logits = torch.full((1, 1, 2, 32, 32), 20.0, dtype=torch.float16)
    mask_logits[0, 0, 1] = -20.0
    mask_logits.requires_grad_()
    labels, counts = torch.zeros(1, 2, dtype=torch.int64), torch.tensor([2])
    segments = torch.zeros(1, size, size, dtype=torch.uint8)
    segments[:, size // 2 :] = 1
    targets = Targets(labels, counts, segments=segments)
    if form == "masks":
        targets = Targets(labels, counts, masks=targets.dense_masks())
    assignment = torch.tensor([[[0, 1]]])
    losses = mask_loss(mask_logits, targets, assignment, reduction="none")
    (gradient,) = torch.autograd.grad(sum(loss.sum() for loss in losses), mask_logits)
    exact = mask_loss(mask_logits.double(), targets, assignment, reduction="none", backend="reference")
    for loss, expected in zip(losses, exact, strict=True):
        torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=1e-6)
    assert gradient.dtype == torch.float16 and gradient.isfinite().all()
