"""Instance inference: binary masks of chosen queries, what their scores need, and boxes, in two launches for the batch.

A program makes some consecutive pixels of one mask straight from its plane of logits. What it writes is 16 times what
it reads at the usual stride of 4, and each of its sums and bounds goes to a place of its own, which a second kernel
adds up in order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask.kernels._common import COMPILER_OPTIONS, _reciprocal, pick_config
from fastmask.kernels._resample import _exp2, _within_bounds, axes, count_nans, make_taps, strides


@dataclass(frozen=True)
class InstanceConfig:
    """Tuning: groups of eight pixels that a program owns."""

    groups: int = 256
    num_warps: int = 4


CONFIGS = {None: InstanceConfig()}


@triton.jit
def _instance_fwd_kernel(
    logits_ptr, stride_b, stride_n, stride_h, stride_w, queries_ptr,
    row_index_ptr, row_weight_ptr, column_index_ptr, column_weight_ptr, masks_ptr, sums_ptr, bounds_ptr,
    N, R, H, W, groups_x, out_top,
    TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr, PACKED: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """mask = x > 0 for some groups of eight pixels of one query, x interpolated from its logits; NaN is not above 0.

        logits   (B, N, h, w), any strides;  queries (B, R), -1 for none
        masks    (B, R, H, W) bytes, or bits (B, R, H, groups_x) with PACKED
        sums     (B * R, parts), the sum of sigmoid(x) over the mask
        bounds   (B * R, parts, 5) int32: pixels of the mask, then its left, top, right and bottom
    """
    pair = tl.program_id(0).to(tl.int64)
    query = tl.load(queries_ptr + pair)
    group = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)  # [BLOCK_G]
    y = group // groups_x
    x = (group % groups_x * 8)[:, None] + tl.arange(0, 8)[None, :]  # [BLOCK_G, 8]
    inside = (y < H)[:, None] & (x < W)
    wanted = (y < H)[:, None] & (x < tl.where((query >= 0) & (query < N), W, 0))
    plane_ptr = logits_ptr + pair // R * stride_b + query * stride_n
    z = tl.zeros([BLOCK_G, 8], dtype=tl.float32)
    for ty in tl.static_range(TAPS_Y):
        row = tl.load(row_index_ptr + ty * H + y, mask=y < H, other=0).to(tl.int64) * stride_h
        weight_y = tl.load(row_weight_ptr + ty * H + y, mask=y < H, other=0.0)
        for tx in tl.static_range(TAPS_X):
            column = tl.load(column_index_ptr + tx * W + x, mask=inside, other=0).to(tl.int64) * stride_w
            weight = weight_y[:, None] * tl.load(column_weight_ptr + tx * W + x, mask=inside, other=0.0)
            value = _within_bounds(tl.load(plane_ptr + (row[:, None] + column), mask=wanted, other=-1.0), True)
            z = tl.fma(value, weight, z)
    mask = wanted & (z > 0.0)
    bits = mask.to(tl.int32)
    if PACKED:
        packed = tl.sum(bits << tl.arange(0, 8)[None, :], 1)
        tl.store(masks_ptr + pair * H * groups_x + group, packed.to(tl.uint8), mask=y < H)
    else:
        tl.store(masks_ptr + pair * H * W + y.to(tl.int64)[:, None] * W + x, bits.to(tl.uint8), mask=inside)

    probability = tl.where(mask, _reciprocal(1.0 + _exp2(tl.minimum(z * -1.44269504, 0.0))), 0.0)
    part = pair * tl.num_programs(1) + tl.program_id(1)
    tl.store(sums_ptr + part, tl.sum(tl.sum(probability, 1), 0))
    top = (out_top + y)[:, None]
    far = 1 << 30
    tl.store(bounds_ptr + part * 5, tl.sum(tl.sum(bits, 1), 0))
    tl.store(bounds_ptr + part * 5 + 1, tl.min(tl.min(tl.where(mask, x, far), 1), 0))
    tl.store(bounds_ptr + part * 5 + 2, tl.min(tl.min(tl.where(mask, top, far), 1), 0))
    tl.store(bounds_ptr + part * 5 + 3, tl.max(tl.max(tl.where(mask, x + 1, 0), 1), 0))
    tl.store(bounds_ptr + part * 5 + 4, tl.max(tl.max(tl.where(mask, top + 1, 0), 1), 0))


@triton.jit
def _instance_reduce_kernel(sums_ptr, bounds_ptr, sum_ptr, area_ptr, box_ptr, parts, BLOCK_P: tl.constexpr):
    """The parts of one mask together: foreground sum, area, and box; zeros for an empty mask."""
    pair = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK_P], dtype=tl.float64)
    area = tl.zeros([BLOCK_P], dtype=tl.int32)
    left = tl.full([BLOCK_P], 1 << 30, dtype=tl.int32)
    top = tl.full([BLOCK_P], 1 << 30, dtype=tl.int32)
    right = tl.zeros([BLOCK_P], dtype=tl.int32)
    bottom = tl.zeros([BLOCK_P], dtype=tl.int32)
    for begin in range(0, parts, BLOCK_P):
        part = begin + tl.arange(0, BLOCK_P)  # [BLOCK_P]
        present = part < parts
        bound_ptrs = bounds_ptr + (pair * parts + part) * 5
        total += tl.load(sums_ptr + pair * parts + part, mask=present, other=0.0)
        area += tl.load(bound_ptrs, mask=present, other=0)
        left = tl.minimum(left, tl.load(bound_ptrs + 1, mask=present, other=1 << 30))
        top = tl.minimum(top, tl.load(bound_ptrs + 2, mask=present, other=1 << 30))
        right = tl.maximum(right, tl.load(bound_ptrs + 3, mask=present, other=0))
        bottom = tl.maximum(bottom, tl.load(bound_ptrs + 4, mask=present, other=0))
    pixels = tl.sum(area, 0)
    tl.store(sum_ptr + pair, tl.sum(total, 0).to(tl.float32))
    tl.store(area_ptr + pair, pixels)
    tl.store(box_ptr + pair * 4, tl.where(pixels > 0, tl.min(left, 0), 0))
    tl.store(box_ptr + pair * 4 + 1, tl.where(pixels > 0, tl.min(top, 0), 0))
    tl.store(box_ptr + pair * 4 + 2, tl.max(right, 0))
    tl.store(box_ptr + pair * 4 + 3, tl.max(bottom, 0))


def instance_masks(
    mask_logits: Tensor,
    queries: Tensor,
    packed: bool,
    grid: list[int],
    padded_size: list[int] | None,
    valid_size: list[int] | None,
    size: list[int],
    in_top: int,
    out_top: int,
    out_rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``fastmask::instance_masks``: masks (B, R, out_rows, W) bool or packed (B, R, out_rows, ceil(W / 8)) uint8, the
    foreground sum, area, box (left, top, right, bottom) and number of NaN logits of each."""
    device = mask_logits.device
    chosen, height, width = queries.shape[1], out_rows, size[1]
    count = mask_logits.shape[1]
    groups_x = triton.cdiv(width, 8)
    shape = (*queries.shape, height, groups_x if packed else width)
    masks = torch.empty(shape, dtype=torch.uint8 if packed else torch.bool, device=device)
    foreground_sum = torch.empty(queries.shape, dtype=torch.float32, device=device)
    area = torch.empty(queries.shape, dtype=torch.int32, device=device)
    boxes = torch.empty((*queries.shape, 4), dtype=torch.int32, device=device)
    pairs = queries.numel()
    if pairs == 0 or count == 0:
        return masks.zero_(), foreground_sum.zero_(), area.zero_(), boxes.zero_(), torch.zeros_like(area)
    real = (queries >= 0) & (queries < count)
    nan_logits = torch.where(real, count_nans(mask_logits).gather(1, queries.clamp(0, count - 1)), 0)
    config = pick_config(CONFIGS, device)
    parts = triton.cdiv(height * groups_x, config.groups)
    sums = torch.empty((pairs, parts), dtype=torch.float32, device=device)
    bounds = torch.empty((pairs, parts, 5), dtype=torch.int32, device=device)
    rows, columns = axes(grid, padded_size, valid_size, size)
    taps = make_taps(rows, columns, out_top, height, in_top, mask_logits.shape[2], width, device)
    _instance_fwd_kernel[(pairs, parts)](
        logits_ptr=mask_logits,
        **strides(mask_logits),
        queries_ptr=queries.contiguous(),
        **taps.arguments(),
        masks_ptr=masks.view(torch.uint8),
        sums_ptr=sums,
        bounds_ptr=bounds,
        N=count,
        R=chosen,
        H=height,
        W=width,
        groups_x=groups_x,
        out_top=out_top,
        PACKED=packed,
        BLOCK_G=config.groups,
        num_warps=config.num_warps,
        **COMPILER_OPTIONS,
    )
    _instance_reduce_kernel[(pairs,)](
        sums_ptr=sums,
        bounds_ptr=bounds,
        sum_ptr=foreground_sum,
        area_ptr=area,
        box_ptr=boxes,
        parts=parts,
        BLOCK_P=256,
        num_warps=1,
        **COMPILER_OPTIONS,
    )
    return masks, foreground_sum, area, boxes, nan_logits
