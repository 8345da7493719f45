"""Gradients of mask logits wherever these lie in memory: the values are those of a contiguous copy's, and fake kernels
say where they lie."""

from __future__ import annotations

import pytest
import torch

import fastmask
from fastmask import MaskTerm
from tests.helpers.inputs import random_assignment, random_points, random_targets

# (L, B, N, h, w) each, of memory enough for all.
SHAPE = (2, 2, 5, 3, 16)
LAYOUTS = {
    "rows that overlap by all but one": lambda m: m[:64].as_strided((1, 1, 5, 1, 16), (64, 64, 1, 16, 1)),
    "planes that overlap": lambda m: m.as_strided(SHAPE, (400, 200, 20, 16, 1)),
    "queries within each other": lambda m: m.as_strided(SHAPE, (200, 100, 1, 16, 1)),
    "rows that overlap": lambda m: m.as_strided(SHAPE, (240, 120, 24, 4, 1)),
    "one layer for all": lambda m: m.as_strided(SHAPE, (0, 240, 48, 16, 1)),
    "one image for all": lambda m: m.as_strided(SHAPE, (240, 0, 48, 16, 1)),
    "one query for all": lambda m: m.as_strided(SHAPE, (96, 48, 0, 16, 1)),
    "one logit for all": lambda m: m.as_strided(SHAPE, (0, 0, 0, 0, 0)),
    "one row for all": lambda m: m.as_strided(SHAPE, (160, 80, 16, 0, 1)),
    "images outermost": lambda m: m.as_strided(SHAPE, (240, 480, 48, 16, 1)),
    "queries outermost": lambda m: m.as_strided(SHAPE, (48, 96, 192, 16, 1)),
    "gaps between queries": lambda m: m.as_strided(SHAPE, (480, 960, 96, 16, 1)),
    "columns before rows": lambda m: m.as_strided(SHAPE, (480, 240, 48, 1, 3)),
    "one column": lambda m: m.as_strided((2, 2, 5, 3, 1), (1, 1, 1, 1, 7)),
    "no images": lambda m: m.as_strided((2, 0, 5, 3, 16), (240, 240, 48, 16, 1)),
}


# One of each kind, for the interpreter's sake: planes, rows or logits that overlap, axes in another order, none at all.
TRITON_LAYOUTS = (
    "rows that overlap", "one layer for all", "one logit for all", "images outermost", "columns before rows",
    "one column", "no images",
)  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "backend"),
    [*((layout, "native") for layout in LAYOUTS), *((layout, "triton") for layout in TRITON_LAYOUTS)],
    indirect=["backend"],
)
@pytest.mark.parametrize("at_points", [False, True], ids=["all pixels", "points"])
def test_values(at_points, layout, backend, generator):
    mask_logits = LAYOUTS[layout](torch.randn(4000, generator=generator))
    layers, batch, queries, h, w = mask_logits.shape
    shape = (layers, batch, queries, 3, 3, h, w, 2 * h, w)
    targets = random_targets(shape, generator, "segments") if batch > 0 else no_images(2 * h, w)
    assignment = random_assignment(shape, targets, generator)
    points = random_points(generator, *assignment.shape, 20) if at_points else None
    options = {"term": MaskTerm("bce" if at_points else "focal"), "reduction": "none"}
    weights = torch.randn(assignment.shape, generator=generator)
    results = []
    for logits in (mask_logits, mask_logits.contiguous().clone()):
        logits.requires_grad_()
        pairs = fastmask.mask_loss(logits, targets, assignment, points, backend=backend, **options)
        (gradient,) = torch.autograd.grad(sum((x * weights).sum() for x in pairs), logits)
        results.append((*pairs, gradient))
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)


def no_images(height: int, width: int) -> fastmask.Targets:
    labels, counts = torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    return fastmask.Targets(labels, counts, segments=torch.zeros(0, height, width, dtype=torch.uint8))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("operator", ["mask_loss", "point_mask_loss"])
def test_fake_kernels(operator, layout, generator):
    mask_logits = layout(torch.randn(4000, generator=generator))
    layers, batch, queries, h, w = mask_logits.shape
    shape = (layers, batch, queries, 3, 3, h, w, 2 * h, w)
    targets = random_targets(shape, generator, "masks") if batch > 0 else no_images(2 * h, w)
    assignment = random_assignment(shape, targets, generator)
    points = (random_points(generator, *assignment.shape, 20),) if operator == "point_mask_loss" else ()
    arguments = (
        mask_logits, assignment, targets.labels, targets.masks, targets.segments, targets.valid, targets.void, True,
        *points, "bce", 0.25, 2.0,
    )  # fmt: skip
    outputs = getattr(torch.ops.fastmask, operator)(*arguments, layers % 2 == 0)
    backward = getattr(torch.ops.fastmask, f"{operator}_backward").default
    torch.library.opcheck(backward, (*outputs, *arguments), test_utils="test_faketensor")
    gradient = backward(*outputs, *arguments)
    order = sorted(range(3), key=lambda d: (mask_logits.stride(d), -d))
    assert order == sorted(range(3), key=lambda d: (gradient.stride(d), -d)) or not gradient[..., 0, 0].stride()
