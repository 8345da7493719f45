"""The mask loss, at all pixels and at points: what the battery of operators does not ask of every operator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastmask import MaskTerm, Targets, mask_loss
from tests.helpers.backends import KERNELS, kernels
from tests.helpers.inputs import SHAPES, random_assignment, random_logits, random_points, random_targets
from tests.helpers.op_info import Arguments

AT_POINTS = pytest.mark.parametrize("at_points", [False, True], ids=["all pixels", "points"])


def inputs_of(shape: tuple[int, ...], generator: torch.Generator, at_points: bool) -> Arguments:
    targets = random_targets(shape, generator, "segments")
    assignment = random_assignment(shape, targets, generator)
    points = random_points(generator, *assignment.shape, 300) if at_points else None
    mask_logits = random_logits(shape, generator)[1]
    return {"mask_logits": mask_logits, "targets": targets, "assignment": assignment, "points": points}


def losses_and_gradient(inputs: Arguments, **options: Any) -> tuple[Tensor, ...]:
    mask_logits = inputs["mask_logits"].detach().requires_grad_()
    losses = mask_loss(**inputs | {"mask_logits": mask_logits}, reduction="none", **options)
    (gradient,) = torch.autograd.grad(losses[0].sum() + losses[1].sum(), mask_logits)
    return *losses, gradient


@AT_POINTS
def test_sums_over_the_number_of_masks(at_points, generator):
    inputs = inputs_of(SHAPES["usual"], generator, at_points)
    pairs = mask_loss(**inputs, reduction="none")
    for pair, total, by_three in zip(pairs, mask_loss(**inputs), mask_loss(**inputs, num_masks=3.0), strict=True):
        torch.testing.assert_close(total, pair.sum((-2, -1)) / inputs["targets"].counts.sum())
        torch.testing.assert_close(by_three, pair.sum((-2, -1)) / 3)


@AT_POINTS
def test_leading_dimensions(at_points, generator):
    inputs = inputs_of(SHAPES["usual"], generator, at_points)
    names = ("mask_logits", "assignment", *(["points"] if at_points else []))
    one = mask_loss(**inputs | {name: inputs[name][1] for name in names})
    for loss, layers in zip(one, mask_loss(**inputs), strict=True):
        assert loss.shape == ()
        assert torch.equal(loss, layers[1])


@AT_POINTS
def test_unmatched_queries_get_no_gradient(at_points, generator):
    inputs = inputs_of(SHAPES["usual"], generator, at_points)
    gradient = losses_and_gradient(inputs)[2]
    matched = torch.zeros(gradient.shape[:3], dtype=torch.bool)
    assignment = inputs["assignment"]
    for layer, image, target in (assignment >= 0).nonzero().tolist():
        matched[layer, image, assignment[layer, image, target]] = True
    assert (gradient[~matched] == 0).all()
    assert gradient[matched].flatten(1).any(1).all()


def test_equal_masks_and_segments_lose_the_same_at_points(generator):
    inputs = inputs_of(SHAPES["odd sizes"], generator, at_points=True)
    of = inputs["targets"]
    masks = Targets(of.labels, of.counts, masks=of.dense_masks(), valid=of.valid_pixels())
    for ignore_void in (False, True):
        term = MaskTerm("bce", ignore_void=ignore_void)
        results = [losses_and_gradient(inputs | {"targets": targets}, term=term) for targets in (of, masks)]
        assert all(map(torch.equal, *results))


def test_points_of_nan_are_background(generator):
    inputs = inputs_of(SHAPES["usual"], generator, at_points=True)
    nowhere = inputs | {"points": torch.full_like(inputs["points"], torch.nan)}
    loss_mask, _, gradient = losses_and_gradient(nowhere, term=MaskTerm("bce"))
    matched = inputs["assignment"] >= 0
    torch.testing.assert_close(loss_mask[matched], torch.tensor(2.0).log().expand(int(matched.sum())))
    assert not gradient.any()


@AT_POINTS
def test_large_half_precision_logits_do_not_overflow(at_points, generator):
    mask_logits = torch.tensor([[6e4, -6e4], [6e4, 6e4]], dtype=torch.float16).reshape(1, 1, 2, 2)
    targets = Targets.from_segments(torch.zeros(1, 8, 8, dtype=torch.uint8), [torch.tensor([0])])
    points = random_points(generator, 1, 1, 100) if at_points else None
    inputs = {"mask_logits": mask_logits, "targets": targets, "assignment": torch.zeros(1, 1, dtype=torch.int64)}
    assert all(result.isfinite().all() for result in losses_and_gradient(inputs | {"points": points}))


def test_extra_memory_does_not_grow_with_the_targets(generator):
    inputs = inputs_of(SHAPES["usual"], generator, at_points=False)
    targets = inputs["targets"]
    inputs["mask_logits"].requires_grad_()
    large = targets.segments.repeat_interleave(4, 1).repeat_interleave(4, 2).contiguous()
    sizes = []
    for these in (targets, Targets(targets.labels, targets.counts, segments=large)):
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, out=saved: out.append(x) or x, lambda x: x):
            mask_loss(**inputs | {"targets": these})
        sizes.append(sum(x.numel() for x in saved if x.data_ptr() != these.segments.data_ptr()))
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("term", [MaskTerm("bce"), MaskTerm(), MaskTerm(gamma=1.5)], ids=str)
@pytest.mark.parametrize("logit", [1.7, 3.0, 14.0])
def test_small_losses_are_right_in_relation_to_themselves(logit, term, name, generator):
    """All pixels are on the right side: 1 + exp(-14) would hold four digits of exp(-14), of which the loss is made."""
    targets = Targets.from_segments(torch.zeros(1, 12, 32, dtype=torch.uint8), [torch.tensor([0])])
    mask_logits = logit + torch.randn(1, 1, 3, 8, generator=generator) / 8
    assignment = torch.zeros(1, 1, dtype=torch.int64)
    with kernels(name) as backend:
        loss, _ = mask_loss(mask_logits, targets, assignment, term=term, backend=backend)
    exact, _ = mask_loss(mask_logits.double(), targets, assignment, term=term, backend="reference")
    torch.testing.assert_close(loss, exact.float(), rtol=5e-6, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["segments", "masks"])
def test_sums_of_four_megapixels_do_not_overflow(form):
    """float16 ends at 65504, float32 counts ones up to 2^24: the sums must hold 2^22 pixels of either sign."""
    size = 2048
    mask_logits = torch.full((1, 1, 2, 32, 32), 20.0, dtype=torch.float16)
    mask_logits[0, 0, 1] = -20.0
    labels, counts = torch.zeros(1, 2, dtype=torch.int64), torch.tensor([2])
    segments = torch.zeros(1, size, size, dtype=torch.uint8)
    segments[:, size // 2 :] = 1
    targets = Targets(labels, counts, segments=segments)
    if form == "masks":
        targets = Targets(labels, counts, masks=targets.dense_masks())
    inputs = {"mask_logits": mask_logits, "targets": targets, "assignment": torch.tensor([[[0, 1]]])}
    *losses, gradient = losses_and_gradient(inputs)
    exact = mask_loss(**inputs | {"mask_logits": mask_logits.double()}, reduction="none", backend="reference")
    for loss, expected in zip(losses, exact, strict=True):
        torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=1e-6)
    assert gradient.dtype == torch.float16 and gradient.isfinite().all()
