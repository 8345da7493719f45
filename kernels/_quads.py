"""Segment maps with the four pixels around a point in one word, so that each point reads targets once.

There is a word for each four neighboring pixels, and for those at the border, which lack some: (B, H + 1, W + 1). A
byte is a pixel's target, or one of two numbers beyond them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask.kernels._common import COMPILER_OPTIONS, TargetSizes
from fastmask.kernels._launch import Launch, kernel
from fastmask.kernels._points import _between, _point_taps, _weight

OTHER = tl.constexpr(254)  # of no target, or beyond the border
VOID = tl.constexpr(255)  # all bits


@kernel
def _quads_kernel(
    segments_ptr, quads_ptr, void_value, M, H, W, HAS_VOID: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The words below and to the right of a row of pixels of one image: the upper left pixel is in the lowest byte.

    segments  (B, H, W);  quads  (B, H + 1, W + 1)
    """
    image = (tl.program_id(0) // (H + 1)).to(tl.int64)
    row = tl.program_id(0) % (H + 1) - 1
    row_ptr = segments_ptr + (image * H + row) * W
    for start in range(0, W + 1, BLOCK):
        column = start - 1 + tl.arange(0, BLOCK)  # [BLOCK]
        word = tl.zeros([BLOCK], dtype=tl.int32)
        for corner in tl.static_range(4):
            of_row, of_column = row + corner // 2, column + corner % 2
            pixels = tl.where((of_row >= 0) & (of_row < H), W, 0)
            on = (of_column >= 0) & (of_column < pixels)
            value = tl.load(row_ptr + corner // 2 * W + of_column, mask=on, other=0).to(tl.int32)
            code = tl.where(on & (value >= 0) & (value < M), value, OTHER)
            if HAS_VOID:
                code = tl.where(on & (value == void_value), VOID, code)
            word |= code << (8 * corner)
        tl.store(quads_ptr + (image * (H + 1) + row + 1) * (W + 1) + column + 1, word, mask=column < W)


@triton.jit
def _equal_bytes(word, other):
    """Which of the four bytes of two words are equal: 1 or 0."""
    different = word ^ other
    a, b = tl.where(different & 0xFF == 0, 1.0, 0.0), tl.where(different & 0xFF00 == 0, 1.0, 0.0)
    c, d = tl.where(different & 0xFF0000 == 0, 1.0, 0.0), tl.where(different & -0x1000000 == 0, 1.0, 0.0)
    return a, b, c, d


@triton.jit
def _target_of_quads(x, y, inside, image, target, quads_ptr, H, W, HAS_VOID: tl.constexpr):
    """The same as ``_target_at``."""
    column, right = _point_taps(x, W)
    row, lower = _point_taps(y, H)
    image_ptr = quads_ptr + image * (tl.cast(H + 1, tl.int64) * (W + 1))
    word = tl.load(image_ptr + ((row + 1) * (W + 1) + column + 1), mask=inside, other=0)
    twice = target | target << 8
    a, b, c, d = _equal_bytes(word, twice | twice << 16)
    t = _between(a, b, c, d, right, lower)
    void_share = 0.0
    if HAS_VOID:
        a, b, c, d = _equal_bytes(word, -1)
        void_share = _between(a, b, c, d, right, lower)
    v = _weight(void_share, inside, HAS_VOID)
    return tl.where(v > 0.0, t, 0.0), v


def plan_quads(batch: int, targets: TargetSizes, num_targets: int) -> Launch | None:
    """The launch of ``with_quads``; None unless the targets are segment maps, and few enough for a byte."""
    if not targets.HAS_SEGMENTS or num_targets > OTHER.value:
        return None
    return _quads_kernel.plan(
        (batch * (targets.H + 1),),
        void_value=targets.void_value,
        M=num_targets,
        H=targets.H,
        W=targets.W,
        HAS_VOID=targets.HAS_VOID,
        BLOCK=128,
        num_warps=4,
        **COMPILER_OPTIONS,
    )


def with_quads(launch: Launch | None, tensors: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """The tensors of a kernel, with quads in the place of segments if there is a launch that makes them."""
    segments = tensors["target_ptr"]
    if launch is None or segments is None:
        return tensors
    batch, height, width = segments.shape
    quads = torch.empty((batch, height + 1, width + 1), dtype=torch.int32, device=segments.device)
    if batch > 0:
        launch(segments_ptr=segments, quads_ptr=quads)
    return tensors | {"target_ptr": quads}
