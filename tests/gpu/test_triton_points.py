"""The Triton kernels of points against the reference in float64, on the CPU: interpreted or, with
--compiled, as PTX.

The interpreter takes milliseconds for each program, so shapes and numbers of points are small.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from functools import partial

import pytest
import torch

import fastmask
from fastmask import MaskTerm, Targets, uncertain_points
from fastmask.testing import assert_within_budget
from tests.helpers import gpu_errors
from tests.helpers.inputs import (
    at_odd_address,
    random_assignment,
    random_logits,
    random_points,
    random_targets,
    without_labels,
)
from tests.ops.test_uncertain_points import check_choice

pytestmark = pytest.mark.usefixtures("triton_kernels")

mask_cost, mask_loss = (
    partial(f, term=MaskTerm("bce")) for f in (fastmask.mask_cost, fastmask.mask_loss)
)  # Mask2Former's
NAMES = ("loss_mask", "loss_dice", "gradient")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMS = ("segments", "masks", "masks+valid")
SMALL = (1, 2, 3, 3, 2, 4, 6, 7, 11)
SHAPES = {
    "small": SMALL,
    "one of everything": (1, 1, 1, 1, 1, 1, 1, 1, 1),
    "two layers, odd sizes": (2, 1, 4, 3, 2, 5, 7, 9, 19),
    "no targets": (2, 2, 4, 3, 0, 8, 8, 16, 16),
    "more targets than queries": (1, 2, 2, 3, 5, 3, 4, 5, 9),
}
WEIGHTS = {"cost_class": 2.0, "cost_mask": 5.0, "cost_dice": 5.0}
REFERENCES = ((torch.float32, "reference"), (torch.float64, "reference"))


def costs(class_logits, mask_logits, targets, points, backend="triton", **options):
    return mask_cost(class_logits, mask_logits, targets, points, backend=backend, **WEIGHTS, **options)


def losses_and_gradient(mask_logits, targets, assignment, points, backend="triton", **options):
    """Losses of each pair, and the gradient of their weighted sum, so that every pair has a gradient of its own."""
    mask_logits = mask_logits.detach().requires_grad_()
    pairs = mask_loss(mask_logits, targets, assignment, points, reduction="none", backend=backend, **options)
    weights = torch.linspace(-1, 1, 2 * assignment.numel()).view(2, *assignment.shape)
    total = sum((loss * weight).sum() for loss, weight in zip(pairs, weights, strict=True))
    (gradient,) = torch.autograd.grad(total, mask_logits)
    return *(loss.detach() for loss in pairs), gradient


def check_costs(class_logits, mask_logits, *others, **options):
    same_dtype, exact = (
        costs(class_logits.to(dtype), mask_logits.to(dtype), *others, backend, **options)
        for dtype, backend in REFERENCES
    )
    gpu = gpu_errors.mask_cost(*WEIGHTS.values(), options.get("term", MaskTerm("bce")).gamma)
    assert_within_budget(costs(class_logits, mask_logits, *others, **options), same_dtype, exact, gpu=gpu)


def check_losses(mask_logits, *others, **options):
    actual = losses_and_gradient(mask_logits, *others, **options)
    references = (
        losses_and_gradient(mask_logits.to(dtype), *others, backend, **options) for dtype, backend in REFERENCES
    )
    assert actual[2].dtype == mask_logits.dtype
    gpu = gpu_errors.mask_loss(options.get("term", MaskTerm("bce")).gamma)
    for name, *results, error in zip(NAMES, actual, *references, gpu, strict=True):
        assert_within_budget(*results, name=name, gpu=error)


def cost_inputs(shape, generator, form, num_points=70, **options):
    targets = random_targets(shape, generator, form, **options)
    return *random_logits(shape, generator), targets, random_points(generator, shape[1], num_points)


def loss_inputs(shape, generator, form, num_points=70, **options):
    targets = random_targets(shape, generator, form, **options)
    assignment = random_assignment(shape, targets, generator)
    points = random_points(generator, *assignment.shape, num_points)
    return random_logits(shape, generator)[1], targets, assignment, points


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape, generator):
    check_costs(*cost_inputs(shape, generator, "segments"))
    check_losses(*loss_inputs(shape, generator, "segments"))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ignore_void", [False, True])
def test_forms(form, ignore_void, generator):
    check_costs(*cost_inputs(SMALL, generator, form), term=MaskTerm("bce", ignore_void=ignore_void))
    check_losses(*loss_inputs(SMALL, generator, form), term=MaskTerm("bce", ignore_void=ignore_void))


@pytest.mark.parametrize("term", [MaskTerm(), MaskTerm(gamma=0.0), MaskTerm(gamma=1.5), MaskTerm(alpha=0.0)], ids=str)
def test_focal_terms(term, generator):
    check_costs(*cost_inputs(SMALL, generator, "segments"), term=term)
    check_losses(*loss_inputs(SMALL, generator, "segments"), term=term)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("form", FORMS)
def test_half_precision_logits(dtype, form, generator):
    class_logits, mask_logits, *others = cost_inputs(SMALL, generator, form)
    check_costs(class_logits.to(dtype), mask_logits.to(dtype), *others, term=MaskTerm("bce", ignore_void=True))
    mask_logits, *others = loss_inputs(SMALL, generator, form)
    check_losses(mask_logits.to(dtype), *others, term=MaskTerm("bce", ignore_void=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_addresses_and_padding(dtype, generator):
    class_logits, mask_logits, targets, points = cost_inputs(SMALL, generator, "segments")
    logits = [x.to(dtype) for x in (class_logits, mask_logits)]
    check_costs(*(at_odd_address(x) for x in logits), targets, at_odd_address(points))
    check_costs(*logits, without_labels(targets), points)
    mask_logits, targets, assignment, points = loss_inputs(SMALL, generator, "segments")
    check_losses(at_odd_address(mask_logits.to(dtype)), targets, assignment, at_odd_address(points))
    nothing = losses_and_gradient(mask_logits.to(dtype), targets, torch.full_like(assignment, -1), points)
    assert not any(result.any() for result in nothing)


def test_blocks_and_splits_of_points(generator, monkeypatch):
    for name, small in (
        ("point_mask_cost", {"programs": 64, "least_points": 32}),
        ("point_mask_loss", {"points": 16, "points_per_split": 32, "cells": 16}),
    ):
        configs = importlib.import_module(f"fastmask.kernels.{name}").CONFIGS
        monkeypatch.setitem(configs, None, replace(configs[None], **small))
    check_costs(*cost_inputs(SHAPES["two layers, odd sizes"], generator, "segments"))
    check_losses(*loss_inputs(SHAPES["two layers, odd sizes"], generator, "segments"))


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
def test_wide_segment_maps(dtype, generator):
    shape = (1, 1, 3, 4, 70, 3, 4, 6, 9)
    class_logits, mask_logits, targets, points = cost_inputs(shape, generator, "segments", 40, dtype=dtype)
    check_costs(class_logits, mask_logits, targets, points, term=MaskTerm("bce", ignore_void=True))
    assignment = torch.full((1, 1, 70), -1)
    assignment[0, 0, [0, 69]] = torch.tensor([2, 1])
    points = random_points(generator, 1, 1, 70, 20)
    check_losses(mask_logits, targets, assignment, points, term=MaskTerm("bce", ignore_void=True))


@pytest.mark.parametrize("scale", [30.0, 200.0])
def test_saturated_logits(scale, generator):
    class_logits, mask_logits, *others = cost_inputs(SMALL, generator, "masks")
    check_costs(class_logits, mask_logits * scale, *others)
    mask_logits, *others = loss_inputs(SMALL, generator, "masks")
    check_losses(mask_logits * scale, *others)


def test_a_query_matched_twice_gets_both_gradients(generator):
    mask_logits, targets, _, points = loss_inputs(SMALL, generator, "segments")
    check_losses(mask_logits, targets, torch.where(targets.labels >= 0, 2, -1)[None], points)


def test_strided_logits_and_the_layout_of_the_gradient(generator):
    mask_logits, *others = loss_inputs(SHAPES["two layers, odd sizes"], generator, "masks")
    expected = losses_and_gradient(mask_logits, *others)
    outermost_images = mask_logits.transpose(0, 1).contiguous().transpose(0, 1)
    for strided in (mask_logits.mT.contiguous().mT, outermost_images):
        actual = losses_and_gradient(strided, *others)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert actual[2].stride() == outermost_images.stride()


def test_two_runs_give_the_same_bits_whatever_was_in_memory(generator):
    inputs = loss_inputs(SMALL, generator, "masks"), cost_inputs(SMALL, generator, "masks")
    first = *losses_and_gradient(*inputs[0]), costs(*inputs[1])
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
        second = *losses_and_gradient(*inputs[0]), costs(*inputs[1])
    finally:
        torch.use_deterministic_algorithms(deterministic)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_gradient_does_not_depend_on_the_order_of_the_points(generator):
    """Its sums are exact, and so it does not matter in which order a GPU's atomics arrive."""
    mask_logits, targets, assignment, points = loss_inputs(SMALL, generator, "masks")
    kernels = importlib.import_module("fastmask.kernels.point_mask_loss")
    of_targets = targets.labels, targets.masks, None, None, 255, False
    sums = kernels.point_mask_loss(mask_logits, assignment, *of_targets, points, "bce", 0.25, 2.0)[2]
    pair = torch.ones(assignment.shape)
    gradients = [
        kernels.point_mask_loss_backward(
            pair, pair, sums, mask_logits, assignment, *of_targets, these, "bce", 0.25, 2.0
        )
        for these in (points, points.flip(-2).contiguous())
    ]
    assert torch.equal(*gradients)


def test_nan_logits_reach_only_their_pair(generator):
    mask_logits, targets, assignment, points = loss_inputs(SMALL, generator, "segments")
    expected = losses_and_gradient(mask_logits, targets, assignment, points)
    image = targets.batch_size - 1
    matched = assignment[0, image, 0]
    mask_logits[0, image, matched] = float("nan")
    actual = losses_and_gradient(mask_logits, targets, assignment, points)
    for losses, wanted in zip(actual[:2], expected[:2], strict=True):
        assert losses[0, image, 0].isnan()
        losses[0, image, 0] = wanted[0, image, 0]
        assert torch.equal(losses, wanted)
    assert actual[2][0, image, matched].isnan().all()
    actual[2][0, image, matched] = expected[2][0, image, matched]
    assert torch.equal(actual[2], expected[2])


def test_all_void(generator):
    mask_logits, targets, assignment, points = loss_inputs(SMALL, generator, "segments")
    void = Targets(targets.labels, targets.counts, segments=torch.full_like(targets.segments, 255))
    inner = 0.2 + 0.6 * points
    mask_logits[:] = float("nan")
    results = losses_and_gradient(mask_logits, void, assignment, inner, term=MaskTerm("bce", ignore_void=True))
    assert not any(result.any() for result in results)


def test_a_query_beyond_the_last_reads_nothing(generator):
    mask_logits, targets, assignment, points = loss_inputs(SMALL, generator, "segments")
    image = targets.batch_size - 1
    assignment[0, image, 0] = 1 << 40
    kernels = importlib.import_module("fastmask.kernels.point_mask_loss")
    arguments = targets.labels, None, targets.segments, None, 255, False, points, "bce", 0.25, 2.0
    for result in kernels.point_mask_loss(mask_logits, assignment, *arguments):
        assert not result[0, image, 0].any()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("num_points", [1, 90])
def test_uncertain_points_are_those_of_the_reference(shape, num_points, generator):
    mask_logits = random_logits(shape, generator)[1]
    assignment = random_assignment(shape, random_targets(shape, generator, "masks"), generator)
    if mask_logits[0, 0, 0].numel() > 1:  # of equals each may take others
        mask_logits[..., 0, 0] = float("nan")
    one, other = (
        uncertain_points(
            mask_logits, assignment, num_points, generator=torch.Generator().manual_seed(3), backend=backend
        )
        for backend in ("triton", "reference")
    )
    assert one.shape == other.shape
    for points in (one, other):
        # In an order of their own: the top-k of a GPU returns them in another than the candidates'.
        order = points[..., 0].argsort(-1)
        points.copy_(torch.take_along_dim(points, order[..., None], -2))
    assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_uncertain_points_of_half_precision_logits(dtype, generator):
    """Many logits are equally sure, and any of those may be taken."""
    mask_logits, _, assignment, _ = loss_inputs(SMALL, generator, "masks")
    mask_logits = at_odd_address(mask_logits.to(dtype))
    seed = torch.randint(2**63 - 1, (1,), generator=torch.Generator().manual_seed(3))
    draws = torch.Generator().manual_seed(3)
    points = uncertain_points(mask_logits, assignment, 90, generator=draws, backend="triton")
    check_choice(points, mask_logits, assignment, 90, stream_seed=seed)


def test_points_without_a_choice(generator):
    mask_logits, _, assignment, _ = loss_inputs(SMALL, generator, "masks")
    for ratio in (0.0, 1.0):
        one, other = (
            uncertain_points(
                mask_logits,
                assignment,
                40,
                oversample_ratio=1.0,
                importance_sample_ratio=ratio,
                generator=torch.Generator().manual_seed(3),
                backend=backend,
            ).sort(-2)
            for backend in ("triton", "reference")
        )
        assert torch.equal(one.values, other.values)
