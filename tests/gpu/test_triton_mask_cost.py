"""The Triton kernels of mask_cost against the reference in float64, on the CPU: interpreted or, with --compiled, as
PTX."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module

import pytest
import torch

from fastmask import MaskTerm, Targets, mask_cost
from fastmask.testing import assert_within_budget
from tests.helpers import gpu_errors
from tests.helpers.inputs import SHAPES, TERMS, at_odd_address, half_void, random_logits, random_targets, without_labels

pytestmark = pytest.mark.usefixtures("triton_kernels")

FORMS = ("segments", "masks", "masks+valid")
WEIGHTS = {"cost_class": 1.0, "cost_mask": 20.0, "cost_dice": 1.0}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EVEN = (1, 2, 7, 3, 4, 8, 12, 32, 48)
SMALL = (2, 2, 5, 3, 4, 7, 11, 30, 41)


def triton_cost(*arguments, **options):
    return mask_cost(*arguments, backend="triton", **options)


def check_against_reference(class_logits, mask_logits, targets, **options):
    rounded = class_logits.float(), mask_logits.float()
    exact = mask_cost(rounded[0].double(), rounded[1].double(), targets, backend="reference", **options)
    same_dtype = mask_cost(*rounded, targets, backend="reference", **options)
    actual = triton_cost(class_logits, mask_logits, targets, **options)
    assert actual.dtype == torch.float32
    weights = [options.get(name, 1.0) for name in WEIGHTS]
    gpu = gpu_errors.mask_cost(*weights, options.get("term", MaskTerm()).gamma)
    assert_within_budget(actual, same_dtype, exact, name="cost", gpu=gpu)
    return actual


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape, generator):
    class_logits, mask_logits = random_logits(shape, generator)
    targets = random_targets(shape, generator, "segments")
    check_against_reference(class_logits, mask_logits, targets, **WEIGHTS)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ignore_void", [False, True])
@pytest.mark.parametrize("shape", ["odd sizes", "targets smaller than logits", "more targets than queries"])
def test_forms(shape, form, ignore_void, generator):
    class_logits, mask_logits = random_logits(SHAPES[shape], generator)
    targets = random_targets(SHAPES[shape], generator, form)
    check_against_reference(class_logits, mask_logits, targets, term=MaskTerm(ignore_void=ignore_void), **WEIGHTS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_half_precision_logits(dtype, form, generator):
    class_logits, mask_logits = (x.to(dtype) for x in random_logits(SMALL, generator))
    targets = random_targets(SMALL, generator, form)
    check_against_reference(class_logits, mask_logits, targets, term=MaskTerm(ignore_void=True), **WEIGHTS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_addresses_void_and_padding(dtype, generator):
    """Targets divide by the logits here: elsewhere void pixels may hold anything."""
    class_logits, mask_logits = (x.to(dtype) for x in random_logits(EVEN, generator))
    targets = random_targets(EVEN, generator, "segments")
    check_against_reference(at_odd_address(class_logits), at_odd_address(mask_logits), targets, **WEIGHTS)
    void, unknown = half_void(targets, mask_logits)
    check_against_reference(class_logits, unknown, void, term=MaskTerm(ignore_void=True), **WEIGHTS)
    check_against_reference(class_logits, mask_logits, without_labels(targets), **WEIGHTS)


@pytest.mark.parametrize("term", TERMS, ids=str)
def test_terms(term, generator):
    class_logits, mask_logits = random_logits(SMALL, generator)
    targets = random_targets(SMALL, generator, "segments")
    check_against_reference(class_logits, mask_logits, targets, **WEIGHTS, term=term)


@pytest.mark.parametrize("only", WEIGHTS)
def test_each_term_alone(only, generator):
    class_logits, mask_logits = random_logits(SMALL, generator)
    targets = random_targets(SMALL, generator, "masks")
    check_against_reference(class_logits, mask_logits, targets, **{name: float(name == only) for name in WEIGHTS})


@pytest.mark.parametrize("num_targets", [15, 16, 31, 32, 63, 64, 140])
def test_blocks_of_targets(num_targets, generator):
    """One bit of a word marks pixels that count, so blocks hold a power of two less one: both sides of each."""
    shape = (1, 2, 5, 3, num_targets, 9, 12, 20, 23)
    class_logits, mask_logits = random_logits(shape, generator)
    targets = random_targets(shape, generator, "masks+valid")
    check_against_reference(class_logits, mask_logits, targets, term=MaskTerm(ignore_void=True), **WEIGHTS)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
def test_wide_segment_maps(dtype, generator):
    shape = (1, 2, 5, 4, 300, 20, 20, 40, 40)
    class_logits, mask_logits = random_logits(shape, generator)
    targets = random_targets(shape, generator, "segments", dtype=dtype)
    check_against_reference(class_logits, mask_logits, targets, term=MaskTerm(ignore_void=True), **WEIGHTS)


def test_splits_and_row_blocks(generator, monkeypatch):
    """Several blocks of rows that cross layers, and splits that end beyond the pixels."""
    configs = import_module("fastmask.kernels.mask_cost").CONFIGS
    monkeypatch.setitem(configs, None, replace(configs[None], rows=16, least_pixels=128))
    shape = (3, 2, 9, 4, 5, 17, 31, 40, 50)
    class_logits, mask_logits = random_logits(shape, generator)
    targets = random_targets(shape, generator, "segments")
    check_against_reference(class_logits, mask_logits, targets, **WEIGHTS)


@pytest.mark.parametrize("scale", [30.0, 200.0, 1e6])
def test_saturated_logits(scale, generator):
    class_logits, mask_logits = random_logits(SMALL, generator, scale=scale)
    targets = random_targets(SMALL, generator, "masks")
    check_against_reference(class_logits * min(scale, 200.0), mask_logits, targets, **WEIGHTS)


def test_strided_inputs(generator):
    class_logits, mask_logits = random_logits(SMALL, generator)
    targets = random_targets(SMALL, generator, "segments")
    expected = triton_cost(class_logits, mask_logits, targets)
    flipped = Targets(targets.labels, targets.counts, segments=targets.segments.mT.contiguous().mT, void=targets.void)
    wide_classes = class_logits.repeat_interleave(2, -1)[..., ::2]
    assert torch.equal(triton_cost(wide_classes, mask_logits.mT.contiguous().mT, flipped), expected)
    outermost_images = mask_logits.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(triton_cost(class_logits, outermost_images, targets), expected)
    some = slice(1, None, 2)
    assert torch.equal(
        triton_cost(class_logits[:, :, some], outermost_images[:, :, some], targets), expected[:, :, some]
    )


def test_two_runs_give_the_same_bits_whatever_was_in_memory(generator):
    class_logits, mask_logits = random_logits(SHAPES["odd sizes"], generator)
    targets = random_targets(SHAPES["odd sizes"], generator, "masks")
    first = triton_cost(class_logits, mask_logits, targets)
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
        assert torch.equal(triton_cost(class_logits, mask_logits, targets), first)
    finally:
        torch.use_deterministic_algorithms(deterministic)


def test_void_pixels_do_not_count_whatever_their_logits(generator):
    shape = SHAPES["targets at the logits' size"]
    class_logits, mask_logits = random_logits(shape, generator)
    targets = random_targets(shape, generator, "segments")
    expected = triton_cost(class_logits, mask_logits, targets, term=MaskTerm(ignore_void=True))
    poisoned = mask_logits.masked_fill((targets.segments == targets.void)[None, :, None], float("nan"))
    assert torch.equal(triton_cost(class_logits, poisoned, targets, term=MaskTerm(ignore_void=True)), expected)
    void = Targets(targets.labels, targets.counts, segments=torch.full_like(targets.segments, 255))
    check_against_reference(class_logits, mask_logits, void, term=MaskTerm(ignore_void=True), **WEIGHTS)


def test_nan_logits_stay_in_their_row(generator):
    class_logits, mask_logits = random_logits(SMALL, generator)
    targets = random_targets(SMALL, generator, "segments")
    expected = triton_cost(class_logits, mask_logits, targets)
    mask_logits[0, 1, 3, 5, 5] = float("nan")
    class_logits[1, 1, 4, 0] = float("nan")
    cost = triton_cost(class_logits, mask_logits, targets)
    poisoned = torch.zeros_like(cost, dtype=torch.bool)
    poisoned[0, 1, 3] = poisoned[1, 1, 4] = True
    assert cost[poisoned].isnan().all()
    assert torch.equal(cost[~poisoned], expected[~poisoned])


def test_a_label_beyond_the_classes_reads_nothing_and_costs_nan(generator):
    class_logits, mask_logits = random_logits(SMALL, generator)
    targets = random_targets(SMALL, generator, "segments")
    expected = triton_cost(class_logits, mask_logits, targets)
    targets.labels[1, 2] = 1 << 40
    kernel = import_module("fastmask.kernels.mask_cost").mask_cost
    cost = kernel(
        class_logits, mask_logits, targets.labels, None, targets.segments, None, 255, False, 1.0, 1.0, 1.0, "focal",
        0.25, 2.0,
    )  # fmt: skip
    assert cost[:, 1, :, 2].isnan().all()
    cost[:, 1, :, 2] = expected[:, 1, :, 2]
    assert torch.equal(cost, expected)
