"""Multi-scale deformable attention and its gradient.

Forward reads four rows of a head's channels for each point, and adds them up in registers. At B=16, 8 heads of 32
channels, 4 points and levels of 64, 32 and 16 pixels a side, of which each pixel is a query, there are 8.3 M points.
Time in bf16 with locations and weights in float32 on 132 SMs (in float32 in parentheses):

- memory: 187 MB, 45 us at 4.2 TB/s (275 MB, 66 us);
- first-level caches: 2.1 GB at 128 bytes per clock and SM, 63 us (4.2 GB, 126 us);
- instructions: 428 per point in the machine code for sm_90, of which 256 convert and multiply, 106 us (350, 86 us).

Backward adds each point's gradient to four pixels, and points are unordered. Atomic additions of floats would add in a
different order each time, and of 64-bit integers there would be 1.06 G. Instead the points are sorted by cell, the
square between the centers of four neighboring pixels. A program then reads the four pixels of a cell once, computes the
gradients of all of its points, and adds up in registers what they give to each of the four pixels; a last launch adds
the four sums of each pixel. The sums take four float32 rows per cell, 367 MB at these sizes. A cell has 5 to 74
points, by its level; 1,120 instructions of its warp on average are 0.77 ms of issue slots, sorting 8.3 M keys moves
0.8 GB, 0.19 ms, and reading the sums takes 0.1 ms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask.kernels._common import (
    COMPILER_OPTIONS,
    INTERPRETED,
    kernel,
    pick_config,
    power_of_two,
    unit,
    with_contiguous_rows,
)

MAX_LEVELS = 8  # that the kernels have arguments for; `fastmask.ops` refuses more, and more than 256 channels


@dataclass(frozen=True)
class DeformableConfig:
    """Tuning of forward and backward.

    Args:
        queries: of a program of forward, at most.
        row_elements: channels times queries of a program of forward, at most.
        elements: channels times pixels of a program of backward's last kernel.
        cell_elements: channels times points of a cell that a program reads at a time.
        keys: points whose cells a program finds.
    """

    queries: int = 64
    row_elements: int = 4096
    elements: int = 1024
    cell_elements: int = 512
    keys: int = 256
    num_warps: int = 4


CONFIGS = {None: DeformableConfig()}


@triton.jit
def _load_points(locations_ptr, weights_ptr, i, there):
    """x, y and the weight of points, 0 where there is none."""
    x = tl.load(locations_ptr + i * 2, mask=there, other=0.0)
    y = tl.load(locations_ptr + i * 2 + 1, mask=there, other=0.0)
    return x, y, tl.load(weights_ptr + i, mask=there, other=0.0)


@triton.jit
def _around(position, size):
    """Whether a position in 0..1 is less than a pixel away from the pixels' centers (NaN is not); the first of the two
    pixels around it, in -1..size-1; the weight of the second."""
    end = tl.cast(size, tl.float32)
    at = tl.fma(position, end, -0.5)
    inside = (at > -1.0) & (at < end)
    at = tl.where(inside, at, 0.0)
    first = tl.floor(at)
    return inside, first.to(tl.int32), at - first


@triton.jit
def _to_float(x):
    """x in float32. Two bfloat16 numbers are the halves of a word, and take two instructions; Triton takes three."""
    if x.dtype != tl.bfloat16 or INTERPRETED:
        return x.to(tl.float32)
    halves = tl.inline_asm_elementwise(
        "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x], tl.int32, is_pure=True, pack=2
    )
    return halves.to(tl.float32, bitcast=True)


@triton.jit
def _load_row(channel_ptrs, pixel, stride, on, part, WIDE: tl.constexpr):
    """Channels of pixels in float32, 0 where they are not ``on`` the level. ``part`` is added last: as a constant it is
    part of the instruction that loads."""
    offset = (pixel.to(tl.int64) if WIDE else pixel) * stride
    return _to_float(tl.load(channel_ptrs + offset + part, mask=on, other=0.0))


@kernel
def _deformable_attention_fwd_kernel(
    value_ptr, stride_b, stride_s, stride_h, locations_ptr, weights_ptr, out_ptr,
    h_0, h_1, h_2, h_3, h_4, h_5, h_6, h_7, w_0, w_1, w_2, w_3, w_4, w_5, w_6, w_7,
    Q, heads, P, LEVELS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_Q: tl.constexpr, TILES: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    """sum_l sum_p A_lp V_l(x_lp, y_lp) for BLOCK_Q queries of one head (Deformable DETR, arXiv:2010.04159, equation 3).

    A row is read in TILES parts, which the same threads read one after another: what is computed for a point is
    computed by two of them (up to 64 channels of 2 bytes), and not once for every 16 bytes of its row.

        value  (B, S, heads, HEAD_DIM), strides in units;  locations  (B, Q, heads, LEVELS, P, 2)
        weights  (B, Q, heads, LEVELS, P);  out  (B, Q, heads * HEAD_DIM)
    """
    blocks = tl.cdiv(Q, BLOCK_Q)
    plane = tl.program_id(0) // blocks
    image, head = (plane // heads).to(tl.int64), plane % heads
    q = (tl.program_id(0) % blocks * BLOCK_Q + tl.arange(0, BLOCK_Q))[None, :, None]  # [1, BLOCK_Q, 1]
    part = tl.arange(0, TILES)[:, None, None] * TILE_D  # [TILES, 1, 1]
    channel = tl.arange(0, TILE_D)[None, None, :]  # [1, 1, TILE_D]
    of_head = part + channel < HEAD_DIM
    there = q < Q
    row = (image * Q + q) * heads + head
    channel_ptrs = value_ptr + (image * stride_b + head * stride_h) * UNIT + channel
    stride = stride_s * UNIT
    point = row * (LEVELS * P)
    out = tl.zeros([TILES, BLOCK_Q, TILE_D], dtype=tl.float32)
    start = 0
    heights, widths = (h_0, h_1, h_2, h_3, h_4, h_5, h_6, h_7), (w_0, w_1, w_2, w_3, w_4, w_5, w_6, w_7)
    for level in tl.static_range(LEVELS):
        h, w = heights[level], widths[level]
        for p in range(P):
            x, y, weight = _load_points(locations_ptr, weights_ptr, point + (level * P + p), there)
            in_columns, column, right = _around(x, w)
            in_rows, y_first, lower = _around(y, h)
            inside = there & in_columns & in_rows
            on_upper, on_lower = inside & (y_first >= 0), inside & (y_first + 1 < h)
            on_left, on_right = column >= 0, column + 1 < w
            pixel = start + y_first * w + column
            weight = tl.where(inside, weight, 0.0)  # outside it may be NaN
            of_lower = weight * lower
            of_upper = weight - of_lower
            of_lower_right = of_lower * right
            of_upper_right = of_upper * right
            a = _load_row(
                channel_ptrs, pixel, stride, on_upper & on_left & of_head, part, WIDE
            )  # [TILES, BLOCK_Q, TILE_D]
            b = _load_row(channel_ptrs, pixel + 1, stride, on_upper & on_right & of_head, part, WIDE)
            out = tl.fma(a, of_upper - of_upper_right, out)
            out = tl.fma(b, of_upper_right, out)
            a = _load_row(channel_ptrs, pixel + w, stride, on_lower & on_left & of_head, part, WIDE)
            b = _load_row(channel_ptrs, pixel + w + 1, stride, on_lower & on_right & of_head, part, WIDE)
            out = tl.fma(a, of_lower - of_lower_right, out)
            out = tl.fma(b, of_lower_right, out)
        start += h * w
    out_ptrs = out_ptr + row * HEAD_DIM + part + channel
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=there & of_head)


@kernel
def _deformable_attention_keys_kernel(
    locations_ptr, keys_ptr, h_0, h_1, h_2, h_3, h_4, h_5, h_6, h_7, w_0, w_1, w_2, w_3, w_4, w_5, w_6, w_7,
    rows, Q, heads, P, cells, planes, LEVELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The cell of each point of one level: plane * cells + its number among the cells of all levels, row by row. The
    cells of a level begin half a pixel outside, so that there are (h + 1) (w + 1). Points outside have planes * cells.

        keys  (B, Q, heads, LEVELS, P), rows = B Q heads
    """
    level = tl.program_id(1)
    h, w, first_cell, end = 0, 0, 0, 0
    heights, widths = (h_0, h_1, h_2, h_3, h_4, h_5, h_6, h_7), (w_0, w_1, w_2, w_3, w_4, w_5, w_6, w_7)
    for each in tl.static_range(LEVELS):
        of_rows, of_columns = heights[each], widths[each]
        h, w = tl.where(level == each, of_rows, h), tl.where(level == each, of_columns, w)
        first_cell = tl.where(level == each, end, first_cell)
        end += (of_rows + 1) * (of_columns + 1)
    of_level = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    row = of_level // P
    there = row < rows
    i = (row * LEVELS + level) * P + of_level % P
    x = tl.load(locations_ptr + i * 2, mask=there, other=0.0)
    y = tl.load(locations_ptr + i * 2 + 1, mask=there, other=0.0)
    in_columns, column, _ = _around(x, w)
    in_rows, y_first, _ = _around(y, h)
    plane = row // heads // Q * heads + row % heads
    cell = plane * cells + (first_cell + (y_first + 1) * (w + 1) + column + 1)
    key = tl.where(in_columns & in_rows, cell, tl.cast(planes, tl.int64) * cells)
    tl.store(keys_ptr + i, key.to(keys_ptr.dtype.element_ty), mask=there)


@kernel
def _deformable_attention_bwd_kernel(
    value_ptr, stride_b, stride_s, stride_h, locations_ptr, weights_ptr, grad_out_ptr, points_ptr, starts_ptr,
    grad_locations_ptr, grad_weights_ptr, sums_ptr,
    h_0, h_1, h_2, h_3, h_4, h_5, h_6, h_7, w_0, w_1, w_2, w_3, w_4, w_5, w_6, w_7,
    heads, P, cells, LEVELS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDE: tl.constexpr, WIDE_POINTS: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradients of the points of one cell, and the sums of what they give to its four pixels. With g = grad_out and
    the products d of g with the pixels: d weight is their bilinear sample; d x = weight w (upper (d_1 - d_0) + lower
    (d_3 - d_2)); d y = weight h (left (d_2 - d_0) + right (d_3 - d_1)).

        points  (B Q heads LEVELS P) sorted by cell;  starts  (B heads cells + 1) where those of each cell begin
        grad_out  (B, Q, heads * HEAD_DIM);  sums  (B heads cells, 4, HEAD_DIM) float32
    """
    key = tl.program_id(0)
    plane = key // cells
    cell = key % cells
    h, w, start, first_cell, pixels, end = 0, 0, 0, 0, 0, 0
    heights, widths = (h_0, h_1, h_2, h_3, h_4, h_5, h_6, h_7), (w_0, w_1, w_2, w_3, w_4, w_5, w_6, w_7)
    for each in tl.static_range(LEVELS):
        of_rows, of_columns = heights[each], widths[each]
        reached = cell >= end
        h, w = tl.where(reached, of_rows, h), tl.where(reached, of_columns, w)
        start, first_cell = tl.where(reached, pixels, start), tl.where(reached, end, first_cell)
        pixels += of_rows * of_columns
        end += (of_rows + 1) * (of_columns + 1)
    y_first = (cell - first_cell) // (w + 1) - 1
    column = (cell - first_cell) % (w + 1) - 1
    one = tl.zeros([1, 1], dtype=tl.int32)
    pixel = one + (start + y_first * w + column)
    on_upper, on_lower = (one + y_first) >= 0, (one + y_first + 1) < h
    on_left, on_right = (one + column) >= 0, (one + column + 1) < w
    channel = tl.arange(0, BLOCK_D)[None, :]
    of_head = channel < HEAD_DIM
    image, head = (plane // heads).to(tl.int64), plane % heads
    channel_ptrs = value_ptr + (image * stride_b + head * stride_h) * UNIT + channel
    stride = stride_s * UNIT
    a = _load_row(channel_ptrs, pixel, stride, on_upper & on_left & of_head, 0, WIDE)  # [1, BLOCK_D]
    b = _load_row(channel_ptrs, pixel + 1, stride, on_upper & on_right & of_head, 0, WIDE)
    c = _load_row(channel_ptrs, pixel + w, stride, on_lower & on_left & of_head, 0, WIDE)
    d = _load_row(channel_ptrs, pixel + w + 1, stride, on_lower & on_right & of_head, 0, WIDE)
    sum_a = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
    sum_b, sum_c, sum_d = sum_a, sum_a, sum_a
    begin, stop = tl.load(starts_ptr + key), tl.load(starts_ptr + key + 1)
    for first in range(begin, stop, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        there = k < stop
        i = tl.load(points_ptr + k, mask=there, other=0)
        row = (i if WIDE_POINTS else i.to(tl.int32)) // (LEVELS * P)
        x, y, weight = _load_points(locations_ptr, weights_ptr, i, there)
        _, _, right = _around(x, w)
        _, _, lower = _around(y, h)
        left, upper = 1.0 - right, 1.0 - lower
        g_ptrs = grad_out_ptr + (row.to(tl.int64) * HEAD_DIM)[:, None] + channel
        g = _to_float(tl.load(g_ptrs, mask=there[:, None] & of_head, other=0.0))  # [BLOCK_K, BLOCK_D]
        of_a, of_b, of_c, of_d = tl.sum(g * a, 1), tl.sum(g * b, 1), tl.sum(g * c, 1), tl.sum(g * d, 1)
        grad_weight = upper * tl.fma(right, of_b, left * of_a) + lower * tl.fma(right, of_d, left * of_c)
        across = tl.fma(lower, of_d - of_c, upper * (of_b - of_a))
        down = tl.fma(right, of_d - of_b, left * (of_c - of_a))
        tl.store(grad_weights_ptr + i, grad_weight, mask=there)
        tl.store(grad_locations_ptr + i * 2, weight * tl.cast(w, tl.float32) * across, mask=there)
        tl.store(grad_locations_ptr + i * 2 + 1, weight * tl.cast(h, tl.float32) * down, mask=there)
        of_upper, of_lower = weight * upper, weight * lower
        sum_a = tl.fma(g, (of_upper * left)[:, None], sum_a)
        sum_b = tl.fma(g, (of_upper * right)[:, None], sum_b)
        sum_c = tl.fma(g, (of_lower * left)[:, None], sum_c)
        sum_d = tl.fma(g, (of_lower * right)[:, None], sum_d)
    sums_ptrs = sums_ptr + key.to(tl.int64) * (4 * HEAD_DIM) + channel
    tl.store(sums_ptrs, tl.sum(sum_a, 0)[None, :], mask=of_head)
    tl.store(sums_ptrs + HEAD_DIM, tl.sum(sum_b, 0)[None, :], mask=of_head)
    tl.store(sums_ptrs + 2 * HEAD_DIM, tl.sum(sum_c, 0)[None, :], mask=of_head)
    tl.store(sums_ptrs + 3 * HEAD_DIM, tl.sum(sum_d, 0)[None, :], mask=of_head)


@kernel
def _deformable_attention_grad_kernel(
    sums_ptr, grad_ptr, h_0, h_1, h_2, h_3, h_4, h_5, h_6, h_7, w_0, w_1, w_2, w_3, w_4, w_5, w_6, w_7,
    S, heads, cells, LEVELS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradient of BLOCK_S pixels of one head: the sums of the four cells around each.

    sums  (B heads cells, 4, HEAD_DIM) float32;  grad  (B, S, heads, HEAD_DIM)
    """
    blocks = tl.cdiv(S, BLOCK_S)
    plane = (tl.program_id(0) // blocks).to(tl.int64)
    s = tl.program_id(0) % blocks * BLOCK_S + tl.arange(0, BLOCK_S)  # [BLOCK_S]
    w, start, first_cell = tl.zeros([BLOCK_S], dtype=tl.int32), s * 0, s * 0
    pixels, end = 0, 0
    heights, widths = (h_0, h_1, h_2, h_3, h_4, h_5, h_6, h_7), (w_0, w_1, w_2, w_3, w_4, w_5, w_6, w_7)
    for each in tl.static_range(LEVELS):
        of_rows, of_columns = heights[each], widths[each]
        reached = s >= pixels
        w = tl.where(reached, of_columns, w)
        start, first_cell = tl.where(reached, pixels, start), tl.where(reached, end, first_cell)
        pixels += of_rows * of_columns
        end += (of_rows + 1) * (of_columns + 1)
    channel = tl.arange(0, BLOCK_D)[None, :]
    there = (s < S)[:, None] & (channel < HEAD_DIM)
    # The cell of which the pixel is the lower right one.
    cell = plane * cells + (first_cell + (s - start) // w * (w + 1) + (s - start) % w)
    sums_ptrs = sums_ptr + cell[:, None] * (4 * HEAD_DIM) + channel
    below_ptrs = sums_ptrs + ((w + 1) * (4 * HEAD_DIM))[:, None]
    grad = tl.load(below_ptrs + 4 * HEAD_DIM, mask=there, other=0.0)
    grad += tl.load(below_ptrs + HEAD_DIM, mask=there, other=0.0)
    grad += tl.load(sums_ptrs + (4 + 2) * HEAD_DIM, mask=there, other=0.0)
    grad += tl.load(sums_ptrs + 3 * HEAD_DIM, mask=there, other=0.0)
    row = (plane // heads * S + s) * heads + plane % heads
    tl.store(grad_ptr + row[:, None] * HEAD_DIM + channel, grad.to(grad_ptr.dtype.element_ty), mask=there)


def launch_arguments(value: Tensor, shapes: list[int], num_points: int) -> dict[str, Any]:
    """The arguments that most kernels share."""
    dim, levels = value.shape[3], len(shapes) // 2
    sizes = {
        f"{side}_{level}": shapes[2 * level + first] if level < levels else 1
        for first, side in enumerate("hw")
        for level in range(MAX_LEVELS)
    }
    block = power_of_two(dim, 16, 256)
    return sizes | {"heads": value.shape[2], "P": num_points, "LEVELS": levels, "HEAD_DIM": dim, "BLOCK_D": block}


def value_arguments(value: Tensor) -> dict[str, Any]:
    """The arguments that locate the rows of the values."""
    strides = dict(zip(("stride_b", "stride_s", "stride_h"), value.stride(), strict=False))
    size = unit(value.shape[3], *strides.values())
    wide = value.shape[1] * value.stride(1) >= 1 << 31
    return {"value_ptr": value, "WIDE": wide, "UNIT": size} | {k: stride // size for k, stride in strides.items()}


def deformable_attention(value: Tensor, locations: Tensor, weights: Tensor, shapes: list[int]) -> Tensor:
    """``fastmask::deformable_attention``."""
    batch_size, _, heads, dim = value.shape
    num_queries, num_points = locations.shape[1], locations.shape[4]
    arguments = launch_arguments(value, shapes, num_points)
    out = value.new_empty((batch_size, num_queries, heads * dim))
    if out.numel() == 0:
        return out
    config = pick_config(CONFIGS, value.device)
    block_d = arguments.pop("BLOCK_D")
    tile = min(max(2 * 16 // value.element_size(), block_d // 4), block_d)
    block = min(config.queries, config.row_elements // block_d)
    _deformable_attention_fwd_kernel[(batch_size * heads * triton.cdiv(num_queries, block),)](
        **value_arguments(with_contiguous_rows(value)),
        **arguments,
        locations_ptr=locations.contiguous(),
        weights_ptr=weights.contiguous(),
        out_ptr=out,
        Q=num_queries,
        BLOCK_Q=block,
        TILES=block_d // tile,
        TILE_D=tile,
        num_warps=config.num_warps,
        maxnreg=255,  # otherwise the ptxas of Triton 3.7 takes 56 for sm_80, and spills
        **COMPILER_OPTIONS,
    )
    return out


def deformable_attention_backward(
    grad_out: Tensor, value: Tensor, locations: Tensor, weights: Tensor, shapes: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """``fastmask::deformable_attention_backward``: the gradients of the values, the locations and the weights."""
    batch_size, num_pixels, heads, dim = value.shape
    num_queries, num_points = locations.shape[1], locations.shape[4]
    arguments = launch_arguments(value, shapes, num_points)
    sizes = {name: arguments[name] for name in arguments if name[:2] in ("h_", "w_")} | {"LEVELS": len(shapes) // 2}
    # Points outside are in no cell.
    grad_locations, grad_weights = locations.new_zeros(locations.shape), weights.new_zeros(weights.shape)
    grad_value = value.new_empty(value.shape)
    if weights.numel() == 0 or value.numel() == 0:
        return grad_value.zero_(), grad_locations, grad_weights
    locations, weights = locations.contiguous(), weights.contiguous()
    config = pick_config(CONFIGS, value.device)
    planes = batch_size * heads
    cells = sum((height + 1) * (width + 1) for height, width in zip(shapes[::2], shapes[1::2], strict=True))
    if planes * cells >= 1 << 31:
        raise ValueError(f"value of shape {tuple(value.shape)} has {planes * cells} cells; expected less than 2^31")
    keys = torch.empty(weights.shape, dtype=torch.int32, device=value.device)
    rows = batch_size * num_queries * heads
    _deformable_attention_keys_kernel[(triton.cdiv(rows * num_points, config.keys), len(shapes) // 2)](
        locations_ptr=locations,
        keys_ptr=keys,
        **sizes,
        rows=rows,
        Q=num_queries,
        heads=heads,
        P=num_points,
        cells=cells,
        planes=planes,
        BLOCK=config.keys,
        num_warps=config.num_warps,
        **COMPILER_OPTIONS,
    )
    ordered, points = keys.flatten().sort(stable=True)
    numbers = torch.arange(planes * cells + 1, dtype=torch.int32, device=value.device)
    sums = torch.empty((planes * cells, 4, dim), dtype=torch.float32, device=value.device)
    _deformable_attention_bwd_kernel[(planes * cells,)](
        **value_arguments(with_contiguous_rows(value)),
        **arguments,
        locations_ptr=locations,
        weights_ptr=weights,
        grad_out_ptr=grad_out.contiguous(),
        points_ptr=points,
        starts_ptr=torch.searchsorted(ordered, numbers),
        grad_locations_ptr=grad_locations,
        grad_weights_ptr=grad_weights,
        sums_ptr=sums,
        cells=cells,
        WIDE_POINTS=weights.numel() >= 1 << 31,
        BLOCK_K=power_of_two(config.cell_elements // arguments["BLOCK_D"], 2, 16),
        num_warps=1,
        **COMPILER_OPTIONS,
    )
    block = config.elements // arguments["BLOCK_D"]
    _deformable_attention_grad_kernel[(planes * triton.cdiv(num_pixels, block),)](
        sums_ptr=sums,
        grad_ptr=grad_value,
        **sizes,
        S=num_pixels,
        heads=heads,
        cells=cells,
        HEAD_DIM=dim,
        BLOCK_S=block,
        BLOCK_D=arguments["BLOCK_D"],
        num_warps=config.num_warps,
        **COMPILER_OPTIONS,
    )
    return grad_value, grad_locations, grad_weights
