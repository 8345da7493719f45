"""Multi-scale deformable attention: forward reads four rows of a head's channels for each point, and adds them up in
registers. benchmarks/NOTES.md has the counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from fastmask.kernels._common import (
    COMPILER_OPTIONS,
    ceil_div,
    pick_config,
    power_of_two,
    with_contiguous_rows,
)
from fastmask.kernels._launch import Launch, cached_plan, kernel
from fastmask.kernels._layout import words
from fastmask.kernels._taps import _halves, _row_at, _taps

MAX_GRID = 65535  # of the grid's second and third dimension, which are the heads and images of forward
MAX_LEVELS = 8  # that the kernels have arguments for; `fastmask.ops` refuses more, and more than 256 channels


@dataclass(frozen=True)
class DeformableConfig:
    """Tuning of forward.

    Args:
        queries: of a program, at most.
        row_elements: channels times queries of a program, at most.
    """

    queries: int = 64
    row_elements: int = 4096
    num_warps: int = 4


CONFIGS = {None: DeformableConfig()}


class AttentionSizes(NamedTuple):
    """The sizes of a call: of values (B, S, heads, dim) with contiguous rows, and of Q queries with P points per level.
    ``levels`` are heights and widths by turns."""

    device: torch.device
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    aligned: bool
    levels: tuple[int, ...]
    queries: int
    points: int

    def arguments(self) -> dict[str, int]:
        """The arguments that most kernels share."""
        count = len(self.levels) // 2
        sides = {
            f"{side}_{level}": self.levels[2 * level + first] if level < count else 1
            for first, side in enumerate("hw")
            for level in range(MAX_LEVELS)
        }
        return sides | {"heads": self.shape[2], "Q": self.queries, "LEVELS": count}

    def value_arguments(self) -> dict[str, int]:
        """Those that locate the rows of the values: strides and alignment in bytes."""
        strides = [stride * self.itemsize for stride in self.strides[:3]]
        aligned = self.aligned and all(size % 16 == 0 for size in (*strides, self.shape[3] * self.itemsize))
        return dict(zip(("stride_b", "stride_s", "stride_h"), strides, strict=True)) | {
            "WIDE": self.shape[1] * strides[1] >= 1 << 31,
            "ALIGNMENT": 16 if aligned else self.itemsize,
        }

    def tiles(self, lanes: int) -> dict[str, int]:
        """The shape in which threads read rows, 16 bytes at a time: ``lanes`` threads a row, or one for 32 channels."""
        block = power_of_two(self.shape[3], 16, 256)
        tile = min(max(lanes, block // 32) * 16 // self.itemsize, block)
        return {"TILES": block // tile, "TILE_D": tile}


def sizes_of(value: Tensor, locations: Tensor, shapes: list[int]) -> AttentionSizes:
    return AttentionSizes(
        value.device, value.shape, value.stride(), value.element_size(), value.data_ptr() % 16 == 0, tuple(shapes),
        locations.shape[1], locations.shape[4],
    )  # fmt: skip


@kernel
def _deformable_attention_fwd_kernel(
    value_ptr, stride_b, stride_s, stride_h, zeros_ptr, locations_ptr, weights_ptr, out_ptr,
    h_0, h_1, h_2, h_3, h_4, h_5, h_6, h_7, w_0, w_1, w_2, w_3, w_4, w_5, w_6, w_7,
    Q, heads, P: tl.constexpr, LEVELS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDE: tl.constexpr,
    ALIGNMENT: tl.constexpr, BLOCK_Q: tl.constexpr, TILES: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    """sum_l sum_p A_lp V_l(x_lp, y_lp) for BLOCK_Q queries of one head (Deformable DETR, arXiv:2010.04159, equation 3).

    A row is read in TILES parts, which the same threads read one after another: the coordinates of a point are computed
    by two of them (up to 64 channels of 2 bytes), and not once for every 16 bytes of its row.

        value  (B, S, heads, HEAD_DIM), strides in bytes;  zeros  (HEAD_DIM)
        locations  (B, Q, heads, LEVELS, P), x and y of each as 64 bits;  weights  (B, Q, heads, LEVELS, P)
        out  (B, Q, heads * HEAD_DIM)
    """
    image, head = tl.program_id(2).to(tl.int64), tl.program_id(1)
    q = (tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q))[None, :, None]  # [1, BLOCK_Q, 1]
    part = tl.arange(0, TILES)[:, None, None] * TILE_D  # [TILES, 1, 1]
    channel = tl.arange(0, TILE_D)[None, None, :]  # [1, 1, TILE_D]
    of_head = part + channel < HEAD_DIM
    there = q < Q
    row = (image * Q + tl.minimum(q, Q - 1)) * heads + head
    base = (value_ptr + channel).to(tl.int64) + (image * stride_b + head.to(tl.int64) * stride_h)
    zeros = (zeros_ptr + channel).to(tl.int64)
    first_pixel = 0
    point = row * (LEVELS * P)
    out = tl.zeros([TILES, BLOCK_Q, TILE_D], dtype=tl.float32)
    DTYPE: tl.constexpr = value_ptr.dtype.element_ty
    WHOLE: tl.constexpr = HEAD_DIM == TILES * TILE_D
    heights, widths = (h_0, h_1, h_2, h_3, h_4, h_5, h_6, h_7), (w_0, w_1, w_2, w_3, w_4, w_5, w_6, w_7)
    for level in tl.static_range(LEVELS):
        h, w = heights[level], widths[level]
        level_start = base + tl.cast(first_pixel, tl.int64) * stride_s
        for p in tl.range(P, loop_unroll_factor=4):
            i = point + (level * P + p)
            x, y = _halves(tl.load(locations_ptr + i))
            weight = tl.load(weights_ptr + i)
            inside, _, _, a, b, c, d, left, right, upper, lower = _taps(level_start, zeros, stride_s, x, y, h, w, WIDE)
            weight = tl.where(inside, weight, 0.0)  # outside it may be NaN
            of_upper, of_lower = weight * upper, weight * lower
            out = tl.fma(_row_at(a, part, of_head, DTYPE, TILE_D, ALIGNMENT, WHOLE), of_upper * left, out)
            out = tl.fma(_row_at(b, part, of_head, DTYPE, TILE_D, ALIGNMENT, WHOLE), of_upper * right, out)
            out = tl.fma(_row_at(c, part, of_head, DTYPE, TILE_D, ALIGNMENT, WHOLE), of_lower * left, out)
            out = tl.fma(_row_at(d, part, of_head, DTYPE, TILE_D, ALIGNMENT, WHOLE), of_lower * right, out)
        first_pixel += h * w
    out_ptrs = out_ptr + row * HEAD_DIM + part + channel
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=there & of_head)


@cached_plan
def plan_forward(config: DeformableConfig, sizes: AttentionSizes) -> Launch:
    batch_size, _, heads, dim = sizes.shape
    tiles = sizes.tiles(2)
    block = min(config.queries, config.row_elements // (tiles["TILES"] * tiles["TILE_D"]))
    return _deformable_attention_fwd_kernel.plan(
        (ceil_div(sizes.queries, block), heads, batch_size),
        **sizes.value_arguments(),
        **sizes.arguments(),
        **tiles,
        P=sizes.points,
        HEAD_DIM=dim,
        BLOCK_Q=block,
        num_warps=config.num_warps,
        # Otherwise ptxas computes all addresses first, in 243 registers; in float32, that of Triton 3.6 spills.
        maxnreg=168 if sizes.itemsize == 2 else 255,
        **COMPILER_OPTIONS,
    )


def deformable_attention(value: Tensor, locations: Tensor, weights: Tensor, shapes: list[int]) -> Tensor:
    """``fastmask::deformable_attention``."""
    batch_size, _, heads, dim = value.shape
    out = torch.empty((batch_size, locations.shape[1], heads * dim), dtype=value.dtype, device=value.device)
    if out.numel() == 0:
        return out
    for axis in (0, 2):
        if value.shape[axis] > MAX_GRID:
            parts = zip(*(x.split(MAX_GRID, axis) for x in (value, locations, weights)), strict=True)
            return torch.cat([deformable_attention(*part, shapes) for part in parts], axis)
    value = with_contiguous_rows(value)
    plan_forward(pick_config(CONFIGS, value.device), sizes_of(value, locations, shapes))(
        value_ptr=value,
        zeros_ptr=torch.zeros(dim, dtype=value.dtype, device=value.device),
        locations_ptr=words(locations),
        weights_ptr=weights.contiguous(),
        out_ptr=out,
    )
    return out
