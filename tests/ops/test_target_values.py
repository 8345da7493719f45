"""What the values in targets mean, with any backend: a void value that the segment map's dtype does not hold marks no
pixel, and any byte but 0 is foreground in a mask."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastmask import MaskTerm, Targets, mask_cost, mask_loss
from fastmask.models._images import fit_targets, pad_images
from tests.helpers.inputs import random_assignment, random_logits, random_points, random_targets

SHAPE = (1, 2, 3, 3, 2, 3, 4, 6, 8)
ONE_IMAGE = (1, 1, 2, 3, 2, 3, 4, 6, 8)
# What would be -1 (or 255) if it were cut down to the map's dtype; and what would be the index of a target then, in any
# dtype up to 32 bits.
OUTSIDE = {
    torch.uint8: (-1, 2**40 + 1),
    torch.int16: (2**16 - 1, 2**40 + 1),
    torch.int32: (2**32 - 1, 2**40 + 1),
}
CASES = [(dtype, void) for dtype, voids in OUTSIDE.items() for void in voids]
IDS = [f"{dtype}, {void}".removeprefix("torch.") for dtype, void in CASES]


BACKENDS = pytest.mark.parametrize("backend", ["reference", "native", "triton"], indirect=True)


def targets_of(dtype: torch.dtype, generator: torch.Generator, shape: tuple[int, ...] = SHAPE) -> Targets:
    """Segments with pixels of each target, of background, and of -1 (or 255), which is void by default."""
    targets = random_targets(shape, generator, "segments", dtype=dtype)
    assert (targets.segments == targets.void).any() and (targets.segments == 1).any()
    return targets


def results(targets: Targets, backend: str) -> list[Tensor]:
    """Of every operator that reads targets, with its gradient."""
    generator = torch.Generator().manual_seed(1)
    class_logits, mask_logits = random_logits(ONE_IMAGE, generator)
    mask_logits.requires_grad_()
    assignment = random_assignment(ONE_IMAGE, targets, generator)
    shared = random_points(generator, targets.batch_size, 40)
    own = random_points(generator, *assignment.shape, 40)
    options = {"term": MaskTerm(ignore_void=True), "backend": backend}
    at_points = {"term": MaskTerm("bce", ignore_void=True), "backend": backend}
    costs = [
        mask_cost(class_logits, mask_logits.detach(), targets, **options),
        mask_cost(class_logits, mask_logits.detach(), targets, shared, **at_points),
    ]
    losses = [
        *mask_loss(mask_logits, targets, assignment, num_masks=3.0, **options),
        *mask_loss(mask_logits, targets, assignment, own, num_masks=3.0, **at_points),
    ]
    (gradient,) = torch.autograd.grad(sum(loss.sum() for loss in losses), mask_logits)
    return [*costs, *(loss.detach() for loss in losses), gradient]


@BACKENDS
@pytest.mark.parametrize("dtype", OUTSIDE)
def test_no_operator_takes_a_pixel_for_void(dtype, backend, generator):
    targets = targets_of(dtype, generator, ONE_IMAGE)
    unused = 200 if dtype == torch.uint8 else -7
    assert not (targets.segments == unused).any()
    expected = results(replace(targets, void=unused), backend)
    for void in OUTSIDE[dtype]:
        for ours, other in zip(results(replace(targets, void=void), backend), expected, strict=True):
            assert torch.equal(ours, other), void
    # The values that the dtype holds do mark pixels.
    assert not any(map(torch.equal, results(targets, backend), expected))


@BACKENDS
def test_any_byte_but_zero_is_foreground(backend, generator):
    targets = random_targets(ONE_IMAGE, generator, "masks+valid")
    values = torch.tensor([1, 2, 128, 255], dtype=torch.uint8)
    values = values[torch.randint(0, 4, targets.masks.shape, generator=generator)]
    changed = replace(targets, masks=targets.masks * values)
    for ours, expected in zip(results(changed, backend), results(targets, backend), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize(("dtype", "void"), CASES, ids=IDS)
def test_the_container_takes_no_pixel_for_void(dtype, void, generator):
    targets = replace(targets_of(dtype, generator), void=void)
    assert targets.valid_pixels().all()
    assert targets.merged_by_class().valid_pixels().all()
    assert torch.equal(targets.class_map(-9) >= 0, targets.dense_masks().any(1))


@pytest.mark.parametrize(("dtype", "void"), CASES, ids=IDS)
def test_padding_of_images_is_void_all_the_same(dtype, void, generator):
    """The map has no value for void, and its padding must be neither a target nor background."""
    targets = replace(targets_of(dtype, generator), void=void)
    height, width = targets.size
    images = pad_images([torch.rand(3, height, width), torch.rand(3, height - 3, width)], 32)
    fitted = fit_targets(targets, images, 3)
    inside = torch.zeros(2, 32, 32, dtype=torch.bool)
    inside[0, :height, :width] = inside[1, : height - 3, :width] = True
    assert torch.equal(fitted.valid_pixels(), inside)
    assert torch.equal(
        fitted.dense_masks()[..., :height, :width] & inside[:, None, :height, :width],
        targets.dense_masks() & inside[:, None, :height, :width],
    )
    assert not (fitted.dense_masks() & ~inside[:, None]).any()
