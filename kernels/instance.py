"""Instance inference: binary masks of chosen queries, sums for their scores, and boxes, in two launches per batch.

A program computes some rows and columns of one mask directly from its plane of logits: at the usual stride of 4 it
writes 16 times as many pixels as it reads logits, and interpolates in columns once for the four rows that lie between
the same two rows of logits. A second kernel combines the programs' sums and bounds in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask.kernels._common import COMPILER_OPTIONS, INTERPRETED, _exp2, _reciprocal, ceil_div, pick_config
from fastmask.kernels._launch import Launch, cached_plan, kernel
from fastmask.kernels._layout import with_contiguous_planes
from fastmask.kernels._resample import Resampling, TapsPlan, _table_pitch, _within_bounds, plan_taps
from fastmask.kernels._stage import count_nans


@dataclass(frozen=True)
class InstanceConfig:
    """Tuning of the main kernel.

    Args:
        groups: groups of eight pixels in a row that a program owns; a thread owns one group.
        rows: rows of the result that a program owns, a multiple of 4; at most 127, whose areas fit in 8 bits.
    """

    groups: int = 32
    rows: int = 32


CONFIGS = {None: InstanceConfig()}


@triton.jit
def _stretched(row_ptr, columns, column_weights, TAPS_X: tl.constexpr):
    """A row of logits, interpolated at the eight pixels of each group: eight tensors ``[BLOCK_G]``."""
    line = ()
    for place in tl.static_range(8):
        x = column_weights[place] * 0.0
        for tx in tl.static_range(TAPS_X):
            value = _within_bounds(tl.load(row_ptr + columns[tx * 8 + place]), True)
            x = tl.fma(value, column_weights[tx * 8 + place], x)
        line = line + (x,)  # noqa: RUF005 (Triton has no stars)
    return line


@triton.jit
def _count_pixel(z, of_row, bytes_of_row, PLACE: tl.constexpr):
    """If z > 0, adds its sigmoid to of_row and sets byte PLACE of bytes_of_row. Both are instructions with a predicate;
    what Triton makes of a selection takes two each."""
    p = _reciprocal(1.0 + _exp2(z * -1.44269504))
    BYTE: tl.constexpr = 1 << (8 * PLACE)
    if INTERPRETED:
        return of_row + tl.where(z > 0.0, p, 0.0), bytes_of_row | tl.where(z > 0.0, BYTE, 0)
    return tl.inline_asm_elementwise(
        "{.reg .pred q; setp.gt.f32 q, $2, 0f00000000; @q add.f32 $0, $0, $3; @q or.b32 $1, $1, $6;}",
        "=f,=r,f,f,0,1,r", [z, p, of_row, bytes_of_row, BYTE], (tl.float32, tl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@kernel
def _instance_fwd_kernel(
    logits_ptr, stride_b, stride_n, queries_ptr,
    row_index_ptr, row_weight_ptr, column_index_ptr, column_weight_ptr, masks_ptr, sums_ptr, bounds_ptr,
    N, R, w, H, groups_x, column_blocks, out_top, lead, alike, rows_per_program,
    TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr, PACKED: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """mask = x > 0 for some rows and columns of one query, with x interpolated from its logits; NaN is not above 0.

    logits   (B, N, h, w), planes contiguous;  queries (B, R), -1 for padding
    masks    (B, R, H, groups_x, 8) bytes, or bits (B, R, H, groups_x) with PACKED; zero beyond the result's width
    sums     (B * R, parts), the sum of sigmoid(x) over the mask
    bounds   (B * R, parts, 5) int32: pixels of the mask, then its left, top, right and bottom

    Groups of ``alike`` rows of the result read the same rows of logits; the first begins ``lead`` rows before it.
    """
    pair = tl.program_id(0).to(tl.int64)
    query = tl.load(queries_ptr + pair)
    group = tl.program_id(1) % column_blocks * BLOCK_G + tl.arange(0, BLOCK_G)
    inside = group < groups_x
    # Padding reads the first query, with weights of 0.
    real = (query >= 0) & (query < N)
    plane_ptr = logits_ptr + pair // R * stride_b + tl.where(real, query, 0) * stride_n
    # Eight tensors, not one with eight columns: whatever layout Triton takes, a thread has the pixels of one group.
    columns = ()
    column_weights = ()
    for tx in tl.static_range(TAPS_X):
        for place in tl.static_range(8):
            at = tx * (groups_x * 8) + group * 8 + place
            column = tl.load(column_index_ptr + at, mask=inside, other=0)
            columns = columns + (column,)  # noqa: RUF005
            weight = tl.load(column_weight_ptr + at, mask=inside & real, other=0.0)
            column_weights = column_weights + (weight,)  # noqa: RUF005

    # The rows of logits that the last group of rows read, stretched; the next one may read all but the first again.
    zero = tl.zeros([BLOCK_G], dtype=tl.float32)
    lines = ()
    held = ()
    for _ in tl.static_range(TAPS_Y):
        lines = lines + ((zero, zero, zero, zero, zero, zero, zero, zero),)  # noqa: RUF005
        held = held + (tl.full([], -1, dtype=tl.int32),)  # noqa: RUF005
    total = zero
    areas = tl.zeros([BLOCK_G], dtype=tl.int32)  # four sums of 8 bits
    met_first = tl.zeros([BLOCK_G], dtype=tl.int32)
    met_second = tl.zeros([BLOCK_G], dtype=tl.int32)
    group_end = tl.program_id(1) // column_blocks * rows_per_program - lead
    end = tl.minimum(group_end + rows_per_program, H)
    y = tl.maximum(group_end, 0)
    top = tl.zeros([BLOCK_G], dtype=tl.int32) + y  # the number of rows before the first with a pixel of the mask
    bottom = tl.zeros([BLOCK_G], dtype=tl.int32)
    # These pointers move with y: an address that is computed from it takes more instructions.
    row_index_ptr += y
    row_weight_ptr += y
    store_ptrs = masks_ptr.to(tl.pointer_type(tl.uint8 if PACKED else tl.int64)) + (pair * H + y) * groups_x + group
    while y < end:
        group_end = tl.minimum(group_end + alike, end)
        new_lines = ()
        new_held = ()
        for ty in tl.static_range(TAPS_Y):
            row = tl.load(row_index_ptr + ty * _table_pitch(H))
            line = lines[ty]
            if row != held[ty]:
                line = lines[min(ty + 1, TAPS_Y - 1)]
                if row != held[min(ty + 1, TAPS_Y - 1)]:
                    line = _stretched(plane_ptr + row.to(tl.int64) * w, columns, column_weights, TAPS_X)
            new_lines = new_lines + (line,)  # noqa: RUF005
            new_held = new_held + (row,)  # noqa: RUF005
        lines = new_lines
        held = new_held
        row_index_ptr += group_end - y
        while y < group_end:
            row_weights = ()
            for ty in tl.static_range(TAPS_Y):
                row_weights = row_weights + (tl.load(row_weight_ptr + ty * _table_pitch(H)),)  # noqa: RUF005
            # The mask's eight bytes.
            first = tl.zeros([BLOCK_G], dtype=tl.int32)
            second = tl.zeros([BLOCK_G], dtype=tl.int32)
            of_row = zero  # a sum of its own, as one of all pixels would round more
            for place in tl.static_range(8):
                z = zero
                for ty in tl.static_range(TAPS_Y):
                    z = tl.fma(lines[ty][place], row_weights[ty], z)
                if place < 4:
                    of_row, first = _count_pixel(z, of_row, first, place)
                else:
                    of_row, second = _count_pixel(z, of_row, second, place - 4)
            total += of_row
            if PACKED:
                # A product that moves the bits of four bytes to bits 24 to 27.
                bits = ((first * 0x01020408 >> 24) & 15) | ((second * 0x01020408 >> 20) & 240)
                tl.store(store_ptrs, bits.to(tl.uint8), mask=inside)
            else:
                pixels = first.to(tl.uint32, bitcast=True).to(tl.int64) | (second.to(tl.int64) << 32)
                tl.store(store_ptrs, pixels, mask=inside)
            y += 1
            row_weight_ptr += 1
            store_ptrs += groups_x
            areas += first + second
            met_first |= first
            met_second |= second
            top = tl.where((met_first | met_second) != 0, top, y)
            bottom = tl.where((first | second) != 0, y, bottom)

    empty = (met_first | met_second) == 0
    top = tl.where(empty, 1 << 30, out_top + top)
    bottom = tl.where(empty, 0, out_top + bottom)
    part = pair * tl.num_programs(1) + tl.program_id(1)
    bound_ptr = bounds_ptr + part * 5
    left = tl.full([BLOCK_G], 1 << 30, dtype=tl.int32)
    right = tl.zeros([BLOCK_G], dtype=tl.int32)
    for place in tl.static_range(8):
        met = (((met_first if place < 4 else met_second) >> (8 * (place % 4))) & 1) != 0
        left = tl.minimum(left, tl.where(met, group * 8 + place, 1 << 30))
        right = tl.where(met, group * 8 + (place + 1), right)
    area = (areas & 255) + ((areas >> 8) & 255) + ((areas >> 16) & 255) + ((areas >> 24) & 255)
    tl.store(sums_ptr + part, tl.sum(total, 0))
    tl.store(bound_ptr, tl.sum(area, 0))
    tl.store(bound_ptr + 1, tl.min(left, 0))
    tl.store(bound_ptr + 2, tl.min(top, 0))
    tl.store(bound_ptr + 3, tl.max(right, 0))
    tl.store(bound_ptr + 4, tl.max(bottom, 0))


@kernel
def _instance_reduce_kernel(
    sums_ptr, bounds_ptr, queries_ptr, count_ptr, sum_ptr, area_ptr, box_ptr, nan_ptr, N, R, parts,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Combines the parts of one mask: foreground sum, area, and box; zeros for an empty mask. The mask's number of NaN
    logits is that of its query in count (B, N); 0 for padding."""
    pair = tl.program_id(0).to(tl.int64)
    query = tl.load(queries_ptr + pair)
    real = (query >= 0) & (query < N)
    tl.store(nan_ptr + pair, tl.load(count_ptr + pair // R * N + query, mask=real, other=0))
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


class InstancePlan(NamedTuple):
    """The launches for some sizes, and the number of parts of each mask."""

    parts: int
    taps: TapsPlan
    forward: Launch
    reduction: Launch


@cached_plan
def plan(
    device: torch.device, config: InstanceConfig, shape: tuple[int, ...], strides: tuple[int, ...],
    queries: tuple[int, ...], packed: bool, resampling: Resampling,
) -> InstancePlan:  # fmt: skip
    """For mask logits of this shape and these strides, and queries (B, R)."""
    height, width, out_top = resampling.out_rows, resampling.size[1], resampling.out_top
    groups_x = ceil_div(width, 8)
    column_blocks = ceil_div(groups_x, config.groups)
    rows, columns = resampling.axes()
    alike, phase = rows.alike()
    lead = (out_top - phase) % alike
    pairs, parts = queries[0] * queries[1], column_blocks * ceil_div(height + lead, config.rows)
    taps = plan_taps(rows, columns, out_top, height, resampling.in_top, shape[2], width)
    forward = _instance_fwd_kernel.plan(
        (pairs, parts),
        stride_b=strides[0],
        stride_n=strides[1],
        **taps.arguments,
        N=shape[1],
        R=queries[1],
        w=shape[3],
        H=height,
        groups_x=groups_x,
        column_blocks=column_blocks,
        out_top=out_top,
        lead=lead,
        alike=alike,
        rows_per_program=config.rows,
        PACKED=packed,
        BLOCK_G=config.groups,
        num_warps=config.groups // 32,
        **COMPILER_OPTIONS,
    )
    reduction = _instance_reduce_kernel.plan(
        (pairs,), N=shape[1], R=queries[1], parts=parts, BLOCK_P=256, num_warps=1, **COMPILER_OPTIONS
    )
    return InstancePlan(parts, taps, forward, reduction)


def instance_masks(
    mask_logits: Tensor,
    queries: Tensor,
    packed: bool,
    *geometry: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``fastmask::instance_masks``: masks (B, R, out_rows, W) bool or packed (B, R, out_rows, ceil(W / 8)) uint8, the
    foreground sum, area, box (left, top, right, bottom) and number of NaN logits of each. ``geometry``: see
    ``Resampling``."""
    device = mask_logits.device
    resampling = Resampling.of(*geometry)
    height, width = resampling.out_rows, resampling.size[1]
    mask_logits = with_contiguous_planes(mask_logits)
    count = mask_logits.shape[1]
    groups_x = ceil_div(width, 8)
    # Rows of bytes are padded to whole groups, so that each group is stored at once.
    shape = (*queries.shape, height, groups_x if packed else 8 * groups_x)
    rows_of_masks = torch.empty(shape, dtype=torch.uint8 if packed else torch.bool, device=device)
    masks = rows_of_masks if packed else rows_of_masks[..., :width]
    foreground_sum = torch.empty(queries.shape, dtype=torch.float32, device=device)
    area = torch.empty(queries.shape, dtype=torch.int32, device=device)
    boxes = torch.empty((*queries.shape, 4), dtype=torch.int32, device=device)
    pairs = queries.numel()
    if pairs == 0 or count == 0:
        return masks.zero_(), foreground_sum.zero_(), area.zero_(), boxes.zero_(), torch.zeros_like(area)
    config, queries = pick_config(CONFIGS, device), queries.contiguous()
    steps = plan(device, config, mask_logits.shape, mask_logits.stride(), queries.shape, packed, resampling)
    sums = torch.empty((pairs, steps.parts), dtype=torch.float32, device=device)
    bounds = torch.empty((pairs, steps.parts, 5), dtype=torch.int32, device=device)
    steps.forward(
        logits_ptr=mask_logits,
        queries_ptr=queries,
        **steps.taps.tables(device),
        masks_ptr=rows_of_masks.view(torch.uint8),
        sums_ptr=sums,
        bounds_ptr=bounds,
    )
    nan_logits = torch.empty_like(area)
    steps.reduction(
        sums_ptr=sums,
        bounds_ptr=bounds,
        queries_ptr=queries,
        count_ptr=count_nans(mask_logits),
        sum_ptr=foreground_sum,
        area_ptr=area,
        box_ptr=boxes,
        nan_ptr=nan_logits,
    )
    return masks, foreground_sum, area, boxes, nan_logits
