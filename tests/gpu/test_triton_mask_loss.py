"""The Triton kernels of mask_loss against the reference in float64, on the CPU: interpreted or, with
--compiled, as PTX.

The interpreter takes a millisecond for each output row of each pair, so most shapes here are small.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module

import pytest
import torch

from fastmask import MaskTerm, Targets, mask_loss
from fastmask.testing import assert_within_budget
from tests.helpers import gpu_errors
from tests.helpers import inputs as shared
from tests.helpers.inputs import TERMS, at_odd_address, half_void, random_assignment, random_logits, random_targets

pytestmark = pytest.mark.usefixtures("triton_kernels")

NAMES = ("loss_mask", "loss_dice", "gradient")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMS = ("segments", "masks", "masks+valid")
SMALL = (1, 2, 3, 3, 2, 4, 6, 7, 11)
TWO_LAYERS = (2, *SMALL[1:])
SHAPES = {
    name: shared.SHAPES[name]
    for name in (
        "one of everything",
        "one dimension, h = 1",
        "targets smaller than logits",
        "no targets",
    )
} | {
    "one logit, many pixels": (1, 1, 3, 2, 2, 1, 1, 4, 13),
    "four outputs a logit": (1, 1, 4, 3, 2, 3, 8, 12, 32),
    "no ratio": (2, 1, 4, 3, 2, 5, 7, 9, 19),
    "targets at the logits' size": (1, 1, 3, 2, 2, 9, 14, 9, 14),
    "more outputs of a logit than one step": (1, 1, 2, 2, 1, 2, 2, 5, 37),
    "many logits of an output": (1, 1, 2, 2, 1, 23, 34, 3, 5),
    "more targets than queries": (1, 2, 2, 3, 5, 3, 4, 5, 9),
}


def losses_and_gradient(mask_logits, targets, assignment, weights, **options):
    """Losses of each pair, and the gradient of their weighted sum, so that every pair has a gradient of its own."""
    mask_logits = mask_logits.detach().requires_grad_()
    pairs = mask_loss(mask_logits, targets, assignment, reduction="none", **options)
    total = sum((loss * weight).sum() for loss, weight in zip(pairs, weights, strict=True))
    (gradient,) = torch.autograd.grad(total, mask_logits)
    return *(loss.detach() for loss in pairs), gradient


def triton_losses(mask_logits, targets, assignment, **options):
    weights = torch.linspace(-1, 1, 2 * assignment.numel()).view(2, *assignment.shape)
    return losses_and_gradient(mask_logits, targets, assignment, weights, backend="triton", **options)


def check_against_reference(mask_logits, targets, assignment, generator, **options):
    weights = torch.randn(2, *assignment.shape, generator=generator)
    rounded = mask_logits.float()
    exact = losses_and_gradient(rounded.double(), targets, assignment, weights.double(), backend="reference", **options)
    same_dtype = losses_and_gradient(rounded, targets, assignment, weights, backend="reference", **options)
    actual = losses_and_gradient(mask_logits, targets, assignment, weights, backend="triton", **options)
    assert actual[2].dtype == mask_logits.dtype
    gpu = gpu_errors.mask_loss(options.get("term", MaskTerm()).gamma)
    for name, *results, error in zip(NAMES, actual, same_dtype, exact, gpu, strict=True):
        assert_within_budget(*results, name=name, gpu=error)
    return actual


def inputs_of(shape, generator, form, **options):
    targets = random_targets(shape, generator, form, **options)
    return random_logits(shape, generator)[1], targets, random_assignment(shape, targets, generator)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape, generator):
    check_against_reference(*inputs_of(shape, generator, "segments"), generator)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ignore_void", [False, True])
def test_forms(form, ignore_void, generator):
    check_against_reference(*inputs_of(SMALL, generator, form), generator, term=MaskTerm(ignore_void=ignore_void))


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("form", FORMS)
def test_half_precision_logits(dtype, form, generator):
    mask_logits, targets, assignment = inputs_of(SMALL, generator, form)
    check_against_reference(mask_logits.to(dtype), targets, assignment, generator, term=MaskTerm(ignore_void=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_addresses_void_and_padding(dtype, generator):
    mask_logits, targets, assignment = inputs_of((1, 1, 4, 3, 2, 8, 12, 32, 48), generator, "segments")
    mask_logits = mask_logits.to(dtype)
    check_against_reference(at_odd_address(mask_logits), targets, assignment, generator)
    void, unknown = half_void(targets, mask_logits)
    check_against_reference(unknown, void, assignment, generator, term=MaskTerm(ignore_void=True))
    nothing = triton_losses(mask_logits, targets, torch.full_like(assignment, -1))
    assert not any(result.any() for result in nothing)


@pytest.mark.parametrize("term", TERMS, ids=str)
def test_terms(term, generator):
    check_against_reference(*inputs_of(SMALL, generator, "segments"), generator, term=term)


def test_blocks_of_rows_and_columns(generator, monkeypatch):
    """Programs that own a few rows and columns of logits each, and share the outputs between them."""
    inputs = inputs_of((1, 1, 3, 2, 1, 5, 70, 9, 150), generator, "segments")
    expected = triton_losses(*inputs)
    configs = import_module("fastmask.kernels.mask_loss").CONFIGS
    small = replace(configs[None], cells=32, outputs=2, least_rows=4, backward_rows=2)
    monkeypatch.setitem(configs, None, small)
    check_against_reference(*inputs, generator)
    for actual, wanted in zip(triton_losses(*inputs), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
def test_wide_segment_maps(dtype, generator):
    shape = (1, 1, 3, 4, 300, 3, 4, 6, 9)
    targets = random_targets(shape, generator, "segments", dtype=dtype)
    assignment = torch.full((1, 1, 300), -1)
    assignment[0, 0, [0, 270, 299]] = torch.tensor([2, 0, 1])
    mask_logits = random_logits(shape, generator)[1]
    check_against_reference(mask_logits, targets, assignment, generator, term=MaskTerm(ignore_void=True))


@pytest.mark.parametrize("scale", [30.0, 200.0])
def test_saturated_logits(scale, generator):
    mask_logits, targets, assignment = inputs_of(SMALL, generator, "masks")
    check_against_reference(mask_logits * scale, targets, assignment, generator)


def test_a_query_matched_twice_gets_both_gradients(generator):
    mask_logits, targets, _ = inputs_of(SMALL, generator, "segments")
    assignment = torch.where(targets.labels >= 0, 2, -1)[None]
    check_against_reference(mask_logits, targets, assignment, generator)


def test_strided_inputs_and_the_layout_of_the_gradient(generator):
    mask_logits, targets, assignment = inputs_of(TWO_LAYERS, generator, "masks")
    expected = triton_losses(mask_logits, targets, assignment)
    flipped = Targets(targets.labels, targets.counts, masks=targets.masks.mT.contiguous().mT)
    outermost_images = mask_logits.transpose(0, 1).contiguous().transpose(0, 1)
    for strided in (mask_logits.mT.contiguous().mT, outermost_images):
        results = triton_losses(strided, flipped, assignment.repeat_interleave(2, -1)[..., ::2])
        for actual, wanted in zip(results, expected, strict=True):
            assert torch.equal(actual, wanted)
    assert results[2].stride() == outermost_images.stride() != mask_logits.stride()


def test_two_runs_give_the_same_bits_whatever_was_in_memory(generator):
    inputs = inputs_of(SMALL, generator, "masks")
    first = triton_losses(*inputs)
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
        second = triton_losses(*inputs)
    finally:
        torch.use_deterministic_algorithms(deterministic)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_all_void(generator):
    mask_logits, targets, assignment = inputs_of(SMALL, generator, "segments")
    void = Targets(targets.labels, targets.counts, segments=torch.full_like(targets.segments, 255))
    assert not any(
        result.any() for result in triton_losses(mask_logits, void, assignment, term=MaskTerm(ignore_void=True))
    )


def test_nan_logits_reach_only_their_pair(generator):
    mask_logits, targets, assignment = inputs_of(TWO_LAYERS, generator, "segments")
    expected = triton_losses(mask_logits, targets, assignment)
    image = targets.batch_size - 1
    matched = assignment[0, image, 0]
    unmatched = next(n for n in range(mask_logits.shape[2]) if n not in assignment[1, image])
    mask_logits[0, image, matched, 3, 3] = float("nan")
    mask_logits[1, image, unmatched] = float("nan")
    actual = triton_losses(mask_logits, targets, assignment)
    for losses, wanted in zip(actual[:2], expected[:2], strict=True):
        assert losses[0, image, 0].isnan()
        losses[0, image, 0] = wanted[0, image, 0]
        assert torch.equal(losses, wanted)
    assert actual[2][0, image, matched].isnan().any()
    actual[2][0, image, matched] = expected[2][0, image, matched]
    assert torch.equal(actual[2], expected[2])


def test_a_query_beyond_the_last_reads_nothing(generator):
    mask_logits, targets, assignment = inputs_of(SMALL, generator, "segments")
    image = targets.batch_size - 1
    assignment[0, image, 0] = 1 << 40
    kernel = import_module("fastmask.kernels.mask_loss").mask_loss
    arguments = targets.labels, None, targets.segments, None, 255, False, "focal", 0.25, 2.0
    for result in kernel(mask_logits, assignment, *arguments):
        assert not result[0, image, 0].any()
