"""The gradient of multi-scale deformable attention.

The gradients of a point's location and weight follow from the rows that forward reads, and the point's own gradient is
added to four pixels. Points are unordered: atomic additions of floats would add in a different order each time, and of
64-bit integers there would be 1.06 G at the sizes of benchmarks/NOTES.md, which has the counts. Instead the points are
sorted by cell, the square between the centers of four neighboring pixels, in four launches:

1. Each warp ranks the points of one chunk within their cells, in order, and counts them.
2. The sum of the counts is where the points of each cell and chunk begin.
3. The gradients of locations and weights; each point, 16 bytes, is written to its place.
4. The points of two cells side by side are added up in order, for the two pixels that the cells have in common.

Between launches there are 16 bytes per point, a rank of 4 bytes per point, and two counters of 4 bytes per cell and
chunk: 211 MB at these sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask.kernels._common import COMPILER_OPTIONS, INTERPRETED, ceil_div, pick_config, with_contiguous_rows
from fastmask.kernels._launch import Launch, cached_plan, kernel
from fastmask.kernels._layout import words
from fastmask.kernels._taps import _halves, _load_row, _pair, _row_at, _tap, _taps
from fastmask.kernels.deformable_attention import AttentionSizes, sizes_of


@dataclass(frozen=True)
class DeformableBackwardConfig:
    """Tuning: the points of a level are counted in chunks of ``chunk`` points, and in ``chunks`` chunks at most."""

    chunk: int = 2048
    chunks: int = 8


CONFIGS = {None: DeformableBackwardConfig()}


@triton.jit
def _same_before(key, k):
    """For each of 32 keys, one per lane: the number of equal keys before it, and the number of all equal keys."""
    if INTERPRETED:
        same = key[:, None] == key[None, :]
        return tl.sum((same & (k[None, :] < k[:, None])).to(tl.int32), 1), tl.sum(same.to(tl.int32), 1)
    return tl.inline_asm_elementwise(
        """{
            .reg .b32 same, before;
            match.any.sync.b32 same, $2, 0xffffffff;
            mov.u32 before, %lanemask_lt;
            and.b32 before, before, same;
            popc.b32 $0, before;
            popc.b32 $1, same;
        }""",
        "=r,=r,r", [key], dtype=(tl.int32, tl.int32), is_pure=False, pack=1,
    )  # fmt: skip


@kernel
def _deformable_attention_ranks_kernel(
    locations_ptr, counts_ptr, ranks_ptr,
    h_0, h_1, h_2, h_3, h_4, h_5, h_6, h_7, w_0, w_1, w_2, w_3, w_4, w_5, w_6, w_7,
    Q, heads, P: tl.constexpr, cells, chunks, points_per_chunk, LEVELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Counts the points of one chunk of a plane and level in each cell. The rank of a point is the number of points of
    the chunk before it that are in its cell. One warp counts a chunk in order, so that ranks are the same in each run.

        counts  (B heads, cells, chunks), initially zero;  ranks  (B, Q, heads, LEVELS, P), not written outside
    """
    level = tl.program_id(1)
    h, w, first_cell, end = 0, 0, 0, 0
    heights, widths = (h_0, h_1, h_2, h_3, h_4, h_5, h_6, h_7), (w_0, w_1, w_2, w_3, w_4, w_5, w_6, w_7)
    for each in tl.static_range(LEVELS):
        of_rows, of_columns = heights[each], widths[each]
        h, w = tl.where(level == each, of_rows, h), tl.where(level == each, of_columns, w)
        first_cell = tl.where(level == each, end, first_cell)
        end += (of_rows + 1) * (of_columns + 1)
    plane, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    image, head = (plane // heads).to(tl.int64), plane % heads
    counts_ptr += plane.to(tl.int64) * cells * chunks + chunk
    points = Q * P
    lane = tl.arange(0, BLOCK)  # [BLOCK]
    begin = chunk * points_per_chunk
    stop = tl.minimum(begin + points_per_chunk, points)
    i, x, y = _located(locations_ptr, begin + lane, stop, image * Q, heads, head, P, LEVELS, level)
    for first in range(begin, stop, BLOCK):
        _, column, left, beyond, _ = _tap(x, w)
        _, row, upper, below, _ = _tap(y, h)
        inside = tl.minimum(left, upper) > 0.0
        cell = first_cell + _cell(row, below) * (w + 1) + _cell(column, beyond)
        before, total = _same_before(tl.where(inside, cell, -1), lane)
        count = tl.load(counts_ptr + cell * chunks, mask=inside, other=0)
        tl.store(ranks_ptr + i, count + before, mask=inside)
        # Loads the next locations while the counts are on their way.
        i, x, y = _located(locations_ptr, first + BLOCK + lane, stop, image * Q, heads, head, P, LEVELS, level)
        tl.debug_barrier()
        tl.store(counts_ptr + cell * chunks, count + total, mask=inside)
        tl.debug_barrier()


@triton.jit
def _located(locations_ptr, k, stop, first_query, heads, head, P: tl.constexpr, LEVELS: tl.constexpr, level):
    """The index of the point k of a plane and level among all, and its location; from ``stop`` on, one outside."""
    there = k < stop
    i = (((first_query + k // P) * heads + head) * LEVELS + level) * P + k % P
    x, y = _halves(tl.load(locations_ptr + i, mask=there, other=0))
    return i, tl.where(there, x, -9.0), y


@triton.jit
def _cell(first, beyond):
    """The row or column of a point's cell. The first begins half a pixel outside; there is one more than pixels."""
    return first + (beyond >= 0.0).to(tl.int32)


@triton.jit
def _dot(a, b):
    """The products of rows [TILES, BLOCK_K, TILE_D]."""
    return tl.sum(tl.sum(a * b, 0, keep_dims=True), 2, keep_dims=True)  # [1, BLOCK_K, 1]


@kernel
def _deformable_attention_bwd_kernel(
    value_ptr, stride_b, stride_s, stride_h, zeros_ptr, locations_ptr, weights_ptr, grad_out_ptr, ranks_ptr, starts_ptr,
    grad_locations_ptr, grad_weights_ptr, points_ptr,
    h_0, h_1, h_2, h_3, h_4, h_5, h_6, h_7, w_0, w_1, w_2, w_3, w_4, w_5, w_6, w_7,
    Q, heads, P: tl.constexpr, cells, chunks, points_per_chunk, LEVELS: tl.constexpr, HEAD_DIM: tl.constexpr,
    WIDE: tl.constexpr, ALIGNMENT: tl.constexpr, BLOCK_K: tl.constexpr, TILES: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    """The gradients of locations and weights, and the points sorted by cell. With g = grad_out and the products d of g
    with the four pixels: d weight is their bilinear sample; d x = weight w (upper (d_1 - d_0) + lower (d_3 - d_2));
    d y = weight h (left (d_2 - d_0) + right (d_3 - d_1)).

        grad_out  (B, Q, heads * HEAD_DIM)
        starts    (B heads, cells, chunks), where the points of each cell and chunk begin
        points    (B Q heads LEVELS P, 2) int64: x and y in pixels, weight and query
    """
    blocks = tl.cdiv(Q * P, BLOCK_K)
    plane = tl.program_id(0) // blocks
    image, head = (plane // heads).to(tl.int64), plane % heads
    k = (tl.program_id(0) % blocks * BLOCK_K + tl.arange(0, BLOCK_K))[None, :, None]  # [1, BLOCK_K, 1]
    there = k < Q * P
    k = tl.minimum(k, Q * P - 1)
    q, p = k // P, k % P
    part = tl.arange(0, TILES)[:, None, None] * TILE_D  # [TILES, 1, 1]
    channel = tl.arange(0, TILE_D)[None, None, :]  # [1, 1, TILE_D]
    row = (image * Q + q) * heads + head
    of_head = part + channel < HEAD_DIM
    WHOLE: tl.constexpr = HEAD_DIM == TILES * TILE_D
    g = _load_row(grad_out_ptr + row * HEAD_DIM + channel + part, of_head, WHOLE)
    DTYPE: tl.constexpr = value_ptr.dtype.element_ty
    base = (value_ptr + channel).to(tl.int64) + (image * stride_b + head.to(tl.int64) * stride_h)
    zeros = (zeros_ptr + channel).to(tl.int64)
    starts_ptr += plane.to(tl.int64) * cells * chunks
    chunk = k // points_per_chunk
    point = row * (LEVELS * P) + p
    location_ptrs, weight_ptrs, rank_ptrs = locations_ptr + point, weights_ptr + point, ranks_ptr + point
    grad_location_ptrs, grad_weight_ptrs = grad_locations_ptr + point, grad_weights_ptr + point
    first_cell, first_pixel = 0, 0
    heights, widths = (h_0, h_1, h_2, h_3, h_4, h_5, h_6, h_7), (w_0, w_1, w_2, w_3, w_4, w_5, w_6, w_7)
    for level in tl.static_range(LEVELS):
        h, w = heights[level], widths[level]
        level_start = base + tl.cast(first_pixel, tl.int64) * stride_s
        x, y = _halves(tl.load(location_ptrs + level * P))
        weight = tl.load(weight_ptrs + level * P)
        at_x, column, _, beyond, _ = _tap(x, w)
        at_y, y_first, _, below, _ = _tap(y, h)
        inside, second, second_row, a, b, c, d, left, right, upper, lower = _taps(
            level_start, zeros, stride_s, x, y, h, w, WIDE
        )
        inside &= there
        weight = tl.where(inside, weight, 0.0)
        cell = first_cell + _cell(y_first, below) * (w + 1) + _cell(column, beyond)
        counter = cell * chunks + chunk
        start = tl.load(starts_ptr + counter, mask=inside, other=0)
        at = start + tl.load(rank_ptrs + level * P, mask=inside, other=0)
        record_ptrs = points_ptr + at.to(tl.int64) * 2
        tl.store(record_ptrs, _pair(at_x, at_y), mask=inside)
        tl.store(record_ptrs + 1, _pair(weight, q.to(tl.float32, bitcast=True)), mask=inside)
        of_a = _dot(g, _row_at(a, part, of_head, DTYPE, TILE_D, ALIGNMENT, WHOLE))
        of_b = _dot(g, _row_at(b, part, of_head, DTYPE, TILE_D, ALIGNMENT, WHOLE))
        of_c = _dot(g, _row_at(c, part, of_head, DTYPE, TILE_D, ALIGNMENT, WHOLE))
        of_d = _dot(g, _row_at(d, part, of_head, DTYPE, TILE_D, ALIGNMENT, WHOLE))
        # The derivatives of the shares of the second and the first pixel by the position.
        second, first = tl.where(second, 1.0, 0.0), tl.where(beyond < 0.0, 1.0, -1.0)
        second_row, first_row = tl.where(second_row, 1.0, 0.0), tl.where(below < 0.0, 1.0, -1.0)
        grad_x = upper * tl.fma(second, of_b, first * of_a) + lower * tl.fma(second, of_d, first * of_c)
        of_a, of_c = tl.fma(right, of_b, left * of_a), tl.fma(right, of_d, left * of_c)
        grad_y = tl.fma(second_row, of_c, first_row * of_a)
        grad_weight = tl.fma(lower, of_c, upper * of_a)
        grad_x = tl.where(inside, weight * tl.cast(w, tl.float32) * grad_x, 0.0)
        grad_y = tl.where(inside, weight * tl.cast(h, tl.float32) * grad_y, 0.0)
        tl.store(grad_weight_ptrs + level * P, tl.where(inside, grad_weight, 0.0), mask=there)
        tl.store(grad_location_ptrs + level * P, _pair(grad_x, grad_y), mask=there)
        first_cell += (h + 1) * (w + 1)
        first_pixel += h * w


@kernel
def _deformable_attention_grad_kernel(
    grad_out_ptr, starts_ptr, points_ptr, grad_ptr,
    h_0, h_1, h_2, h_3, h_4, h_5, h_6, h_7, w_0, w_1, w_2, w_3, w_4, w_5, w_6, w_7,
    S, Q, heads, cells, chunks, pairs, LEVELS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_S: tl.constexpr, TILES: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    """The gradient of the values of one head. Two cells side by side have two pixels in common, one above the other,
    and their points are one range, which is added up in order for both pixels. Each pixel is the lower one of a pair
    of cells and the upper one of the pair below. Pairs are numbered column by column; BLOCK_S pairs yield BLOCK_S - 1
    pixels.

        grad_out  (B, Q, heads * HEAD_DIM);  starts, points  see ``_deformable_attention_bwd_kernel``
        grad      (B, S, heads, HEAD_DIM)
    """
    blocks = tl.cdiv(pairs, BLOCK_S - 1)
    plane = tl.program_id(0) // blocks
    # The last levels are usually the smallest, whose pixels have the most points: their programs start first.
    block = blocks - 1 - tl.program_id(0) % blocks
    pair = (block * (BLOCK_S - 1) + tl.arange(0, BLOCK_S))[None, :, None]  # [1, BLOCK_S, 1]
    h, w, start, first_cell, first_pair = pair * 0, pair * 0, pair * 0, pair * 0, pair * 0
    pixels, end, pairs_end = 0, 0, 0
    heights, widths = (h_0, h_1, h_2, h_3, h_4, h_5, h_6, h_7), (w_0, w_1, w_2, w_3, w_4, w_5, w_6, w_7)
    for each in tl.static_range(LEVELS):
        of_rows, of_columns = heights[each], widths[each]
        reached = pair >= pairs_end
        h, w = tl.where(reached, of_rows, h), tl.where(reached, of_columns, w)
        start, first_cell = tl.where(reached, pixels, start), tl.where(reached, end, first_cell)
        first_pair = tl.where(reached, pairs_end, first_pair)
        pixels += of_rows * of_columns
        end += (of_rows + 1) * (of_columns + 1)
        pairs_end += (of_rows + 1) * of_columns
    there = pair < pairs
    x = (pair - first_pair) // (h + 1)
    y = pair - first_pair - x * (h + 1)
    start_ptrs = starts_ptr + (plane.to(tl.int64) * cells + first_cell + y * (w + 1) + x) * chunks
    begin = tl.load(start_ptrs, mask=there, other=0).to(tl.int64)
    count = (tl.load(start_ptrs + 2 * chunks, mask=there, other=0) - begin).to(tl.int32)
    most = tl.max(tl.max(tl.max(count, 2), 1), 0)
    part = tl.arange(0, TILES)[:, None, None] * TILE_D  # [TILES, 1, 1]
    channel = tl.arange(0, TILE_D)[None, None, :]  # [1, 1, TILE_D]
    of_head = part + channel < HEAD_DIM
    WHOLE: tl.constexpr = HEAD_DIM == TILES * TILE_D
    image, head = (plane // heads).to(tl.int64), plane % heads
    row_ptrs = grad_out_ptr + (image * Q * heads + head) * HEAD_DIM + channel
    upper = tl.zeros([TILES, BLOCK_S, TILE_D], dtype=tl.float32)
    lower = upper
    column, lowest = x.to(tl.float32), y.to(tl.float32)
    some, last = count > 0, count - 1
    point_ptrs = points_ptr + begin * 2
    position, rest = tl.load(point_ptrs, mask=some, other=0), tl.load(point_ptrs + 1, mask=some, other=0)
    for k in range(most):
        at_x, at_y = _halves(position)
        weight, q = _halves(rest)
        weight = tl.where(k < count, weight, 0.0)
        query = q.to(tl.int32, bitcast=True)
        g = _load_row(row_ptrs + query.to(tl.int64) * (heads * HEAD_DIM) + part, of_head, WHOLE)
        # Loads the next point while the row is on its way. Pairs with fewer points read their last one again.
        following = tl.minimum(k + 1, last) * 2
        position = tl.load(point_ptrs + following, mask=some, other=0)
        rest = tl.load(point_ptrs + following + 1, mask=some, other=0)
        share = weight * (1.0 - tl.abs(at_x - column))
        of_upper = share * (lowest - at_y)
        upper = tl.fma(g, of_upper, upper)
        lower = tl.fma(g, share - of_upper, lower)
    of_block = tl.arange(0, BLOCK_S)[None, :, None]
    next_one = tl.broadcast_to(tl.minimum(of_block + 1, BLOCK_S - 1), (TILES, BLOCK_S, TILE_D))
    below = tl.gather(upper, next_one, 1)
    grad = tl.where(some, lower, 0.0) + below
    row = (image * S + start + y * w + x) * heads + head
    there &= (y < h) & (of_block < BLOCK_S - 1)
    tl.store(grad_ptr + row * HEAD_DIM + channel + part, grad.to(grad_ptr.dtype.element_ty), mask=there & of_head)


class BackwardPlan(NamedTuple):
    """The launches for some sizes, and the number of counters."""

    counters: int
    ranks: Launch
    points: Launch
    grad: Launch


@cached_plan
def plan_backward(config: DeformableBackwardConfig, sizes: AttentionSizes) -> BackwardPlan:
    batch_size, num_pixels, heads, dim = sizes.shape
    arguments = sizes.arguments() | COMPILER_OPTIONS
    of_rows = sizes.tiles(1) | {"HEAD_DIM": dim}
    block = 32 * 16 // (of_rows["TILE_D"] * sizes.itemsize)  # rows that a warp reads at a time
    planes, count = batch_size * heads, len(sizes.levels) // 2
    levels = tuple(zip(sizes.levels[::2], sizes.levels[1::2], strict=True))
    cells = sum((height + 1) * (width + 1) for height, width in levels)
    pairs_of_cells = sum((height + 1) * width for height, width in levels)
    of_plane = sizes.queries * sizes.points
    chunks = min(max(of_plane // config.chunk, 1), config.chunks)
    counters = planes * cells * chunks
    if counters >= 1 << 31 or of_plane >= 1 << 30:
        raise ValueError(
            f"value of shape {tuple(sizes.shape)} with {of_plane} points of a level has {counters} counters; expected "
            "less than 2^30 points and 2^31 counters"
        )
    arguments |= {"cells": cells, "chunks": chunks}
    of_points = {"P": sizes.points, "points_per_chunk": 32 * ceil_div(of_plane, 32 * chunks)}
    return BackwardPlan(
        counters,
        _deformable_attention_ranks_kernel.plan(
            (planes * chunks, count), **arguments, **of_points, BLOCK=32, num_warps=1
        ),
        _deformable_attention_bwd_kernel.plan(
            (planes * ceil_div(of_plane, block),),
            **sizes.value_arguments(),
            **arguments,
            **of_points,
            **of_rows,
            BLOCK_K=block,
            num_warps=1,
            maxnreg=255,  # otherwise ptxas spills: that of Triton 3.7 in 96, and that of 3.6 in 168
        ),
        _deformable_attention_grad_kernel.plan(
            (planes * ceil_div(pairs_of_cells, block - 1),),
            **arguments,
            **of_rows,
            S=num_pixels,
            pairs=pairs_of_cells,
            BLOCK_S=block,
            num_warps=1,
            maxnreg=255,
        ),
    )


def deformable_attention_backward(
    grad_out: Tensor, value: Tensor, locations: Tensor, weights: Tensor, shapes: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """``fastmask::deformable_attention_backward``: the gradients of the values, the locations and the weights."""
    device = value.device
    grad_locations, grad_weights, grad_value = (
        torch.empty(x.shape, dtype=x.dtype, device=device) for x in (locations, weights, value)
    )
    if weights.numel() == 0 or value.numel() == 0:
        return grad_value.zero_(), grad_locations.zero_(), grad_weights.zero_()
    value = with_contiguous_rows(value)
    steps = plan_backward(pick_config(CONFIGS, device), sizes_of(value, locations, shapes))
    locations, grad_out = words(locations), grad_out.contiguous()
    counts = torch.zeros(steps.counters + 1, dtype=torch.int32, device=device)
    ranks = counts.new_empty(weights.shape)
    steps.ranks(locations_ptr=locations, counts_ptr=counts[1:], ranks_ptr=ranks)
    starts = counts.cumsum(0, dtype=torch.int32 if weights.numel() < 1 << 31 else torch.int64)
    points = torch.empty((weights.numel(), 2), dtype=torch.int64, device=device)
    of_points = {"grad_out_ptr": grad_out, "starts_ptr": starts, "points_ptr": points}
    steps.points(
        **of_points,
        value_ptr=value,
        zeros_ptr=torch.zeros(value.shape[3], dtype=value.dtype, device=device),
        locations_ptr=locations,
        weights_ptr=weights.contiguous(),
        ranks_ptr=ranks,
        grad_locations_ptr=words(grad_locations),
        grad_weights_ptr=grad_weights,
    )
    steps.grad(**of_points, grad_ptr=grad_value)
    return grad_value, grad_locations, grad_weights
