"""Resampling of mask logits from the grid to the pixels of a result, for the inference kernels.

Both bilinear steps become tables of taps, one for the rows and one for the columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask.kernels._common import INTERPRETED, ceil_div
from fastmask.kernels._launch import Launch, kernel

# Queries that a program processes at a time; staged queries are padded to a multiple of it.
BLOCK_N = tl.constexpr(16)

# Above 2^-126: Triton would turn a constant below that into a float64 and compute in float64.
MIN_NORMAL = tl.constexpr(1.2e-38)


@dataclass(frozen=True)
class Axis:
    """One axis of both bilinear steps: from grid to padded, which is cropped to valid, and from valid to size."""

    grid: int
    padded: int
    valid: int
    size: int

    @property
    def taps(self) -> int:
        """How many inputs an output reads at most. Two neighbors in an upsampled map read three inputs together."""
        steps = (self.grid != self.padded) + (self.valid != self.size)
        return (1, 2, 3 if self.padded >= self.grid else 4)[steps]

    def alike(self) -> tuple[int, int]:
        """How many neighboring outputs read the same two inputs, 4 or 1, and the first output that begins such a group.

        One step up by a multiple of 4 has groups of 4, as its outputs lie between the centers of the inputs.
        """
        inputs, outputs = (self.valid, self.size) if self.grid == self.padded else (self.grid, self.padded)
        if self.taps != 2 or outputs % (4 * inputs):
            return 1, 0
        return 4, outputs // inputs // 2 % 4

    def arguments(self, axis: str) -> dict[str, int]:
        """The arguments of ``_taps_kernel`` for the axis "y" or "x"."""
        return {f"{name}_{axis}": size for name, size in asdict(self).items()}

    def first_step(self) -> Axis:
        """From the grid to the valid part of the padded input."""
        return Axis(self.grid, self.padded, self.padded, self.padded)

    def second_step(self) -> Axis:
        return Axis(self.valid, self.valid, self.valid, self.size)

    def reads(self, begin: int, end: int) -> tuple[int, int]:
        """The range [first, end) of the inputs that the outputs [begin, end) read, or one more on either side."""
        first, last = begin, end - 1
        for inputs, outputs in ((self.valid, self.size), (self.grid, self.padded)):
            if inputs != outputs:
                first = max(((2 * first + 1) * inputs - outputs) // (2 * outputs), 0)
                last = min(((2 * last + 1) * inputs - outputs) // (2 * outputs) + 1, inputs - 1)
                first = min(first, inputs - 1)
        return first, max(last, first) + 1


class Resampling(NamedTuple):
    """The last arguments of the inference operators.

    The mask logits hold the grid's rows from ``in_top`` on; the result holds ``out_rows`` of the rows of ``size``, from
    ``out_top`` on.
    """

    grid: tuple[int, ...]
    padded_size: tuple[int, ...] | None
    valid_size: tuple[int, ...] | None
    size: tuple[int, ...]
    in_top: int
    out_top: int
    out_rows: int

    @staticmethod
    def of(
        grid: Sequence[int], padded_size: Sequence[int] | None, valid_size: Sequence[int] | None, size: Sequence[int],
        in_top: int, out_top: int, out_rows: int,
    ) -> Resampling:  # fmt: skip
        """Of the operators' arguments, in which sizes are lists."""
        padded = None if padded_size is None else tuple(padded_size)
        valid = None if valid_size is None else tuple(valid_size)
        return Resampling(tuple(grid), padded, valid, tuple(size), in_top, out_top, out_rows)

    def axes(self) -> tuple[Axis, Axis]:
        """The axes of rows and of columns."""
        padded = self.padded_size or self.grid
        rows, columns = zip(self.grid, padded, self.valid_size or padded, self.size, strict=True)
        return Axis(*rows), Axis(*columns)

    def staged_axes(self, probabilities: bool) -> tuple[Axis, Axis]:
        """Those of the steps from the stage on: of probabilities, the second one."""
        rows, columns = self.axes()
        return (rows.second_step(), columns.second_step()) if probabilities else (rows, columns)

    def alike(self, probabilities: bool) -> int:
        """How many neighboring rows read the same rows of the stage."""
        return self.staged_axes(probabilities)[0].alike()[0]


@triton.jit
def _bilinear_taps(i, inputs, outputs):
    """PyTorch's bilinear rule with align_corners=False, in float64: both inputs of output i and the second's weight."""
    scale = tl.cast(inputs, tl.float64) / tl.cast(outputs, tl.float64)
    source = tl.maximum((i.to(tl.float64) + 0.5) * scale - 0.5, 0.0)
    first = tl.minimum(source.to(tl.int32), inputs - 1)
    weight = tl.where(first < inputs - 1, source - first.to(tl.float64), 0.0)
    return first, tl.where(weight > 0.0, first + 1, first), weight


@kernel
def _taps_kernel(
    row_index_ptr, row_weight_ptr, column_index_ptr, column_weight_ptr,
    grid_y, padded_y, valid_y, size_y, begin_y, count_y, base_y, limit_y,
    grid_x, padded_x, valid_x, size_x, count_x,
    TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Taps of the rows [begin_y, begin_y + count_y), with indices relative to base_y, and of the columns [0, count_x).

    row_index, row_weight        (TAPS_Y, count_y), indices in [0, limit_y)
    column_index, column_weight  (TAPS_X, count_x)

    Rows of the tables are padded to a multiple of 8 entries; those beyond the count have weight 0.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    if tl.program_id(1) == 0:
        _store_axis_taps(row_index_ptr, row_weight_ptr, i, grid_y, padded_y, valid_y, size_y, begin_y, count_y, base_y,
                         limit_y, TAPS_Y)  # fmt: skip
    else:
        _store_axis_taps(column_index_ptr, column_weight_ptr, i, grid_x, padded_x, valid_x, size_x, 0, count_x, 0,
                         grid_x, TAPS_X)  # fmt: skip


@triton.jit
def _table_pitch(count):
    """The entries of one row of a table, a multiple of 8, so that rows are aligned and can be read in whole vectors."""
    return tl.cdiv(count, 8) * 8


@triton.jit
def _store_axis_taps(
    index_ptr, weight_ptr, i, grid, padded, valid, size, begin, count, base, limit, TAPS: tl.constexpr
):
    """Multiplies the weights of both steps and rounds once. Three taps are neighbors, whose weights are added up."""
    first, second, outer = _bilinear_taps(begin + i, valid, size)
    inner_first, inner_second, inner = _bilinear_taps(first, grid, padded)
    last_first, last_second, last = _bilinear_taps(second, grid, padded)
    index = (inner_first, inner_second, last_first, last_second)
    pitch = _table_pitch(count)
    weight = ((1.0 - outer) * (1.0 - inner), (1.0 - outer) * inner, outer * (1.0 - last), outer * last)
    for tap in tl.static_range(TAPS):
        if TAPS == 4:
            at = index[tap]
            share = weight[tap]
        else:
            at = inner_first + tap
            share = outer * 0.0
            for part in tl.static_range(4):
                share += tl.where(index[part] == at, weight[part], 0.0)
        at = tl.minimum(tl.maximum(tl.minimum(at, last_second) - base, 0), limit - 1)
        share = tl.where(i < count, share, 0.0)
        tl.store(index_ptr + tap * pitch + i, at, mask=i < pitch)
        tl.store(weight_ptr + tap * pitch + i, share.to(tl.float32), mask=i < pitch)


class TapsPlan(NamedTuple):
    """The launch that writes tables of taps, the shapes of the tables, and the arguments of the kernels that read them;
    see ``_taps_kernel``.

    The tables themselves are not kept from call to call: tensors that are made while a CUDA graph is captured belong to
    the graph, and those that are made on one stream are not ready on another.
    """

    launch: Launch
    rows: tuple[int, int]
    columns: tuple[int, int]

    @property
    def arguments(self) -> dict[str, int]:
        return {"TAPS_Y": self.rows[0], "TAPS_X": self.columns[0]}

    def tables(self, device: torch.device) -> dict[str, Tensor]:
        """The tables, by the names of the arguments of the kernels that read them."""
        tables = {
            "row_index_ptr": torch.empty(self.rows, dtype=torch.int32, device=device),
            "row_weight_ptr": torch.empty(self.rows, dtype=torch.float32, device=device),
            "column_index_ptr": torch.empty(self.columns, dtype=torch.int32, device=device),
            "column_weight_ptr": torch.empty(self.columns, dtype=torch.float32, device=device),
        }
        self.launch(**tables)
        return tables


NO_TABLES = dict.fromkeys(("row_index_ptr", "row_weight_ptr", "column_index_ptr", "column_weight_ptr"))


def plan_taps(rows: Axis, columns: Axis, begin: int, count: int, base: int, limit: int, width: int) -> TapsPlan:
    """For the rows [begin, begin + count), with indices relative to ``base`` and below ``limit``, and the columns
    [0, width)."""
    pitches = ceil_div(count, 8) * 8, ceil_div(width, 8) * 8
    launch = _taps_kernel.plan(
        (ceil_div(max(pitches), 128), 2),
        TAPS_Y=rows.taps,
        TAPS_X=columns.taps,
        **rows.arguments("y"),
        begin_y=begin,
        count_y=count,
        base_y=base,
        limit_y=limit,
        **columns.arguments("x"),
        count_x=width,
        BLOCK=128,
        num_warps=4,
        enable_fp_fusion=False,  # for the same coordinates as in other backends
    )
    return TapsPlan(launch, (rows.taps, pitches[0]), (columns.taps, pitches[1]))


@triton.jit
def _within_bounds(x, KEEP_NAN: tl.constexpr):
    """Clamps logits to +-1e30, as float32; NaN becomes the lower bound unless KEEP_NAN."""
    x = x.to(tl.float32)
    if KEEP_NAN:
        x = tl.clamp(x, -1e30, 1e30, propagate_nan=tl.PropagateNan.ALL)
    else:
        x = tl.minimum(tl.maximum(x, -1e30), 1e30)
    return x


@triton.jit
def _widen(x):
    """Staged values as float32. Two bfloat16 take two instructions; the compiler's conversion takes three."""
    if INTERPRETED or x.dtype == tl.float32:
        result = x.to(tl.float32)
    else:
        result = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=&r,=r,r", [x], dtype=tl.float32, is_pure=True, pack=2
        )
    return result


@triton.jit
def _tile_taps(
    row_index_ptr, row_weight_ptr, column_index_ptr, column_weight_ptr, columns, top, count, H, W, tiles_x,
    TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr,
):  # fmt: skip
    """For the pixels of a program's tile, in a band of ``count`` rows from ``top`` on: whether they exist, their index
    in the result's planes of H x W, which cells of the stage they read, and with which weights. Pixels that do not
    exist read the same cells as the nearest pixel that does."""
    pixel = tl.arange(0, TILE_Y * TILE_X)  # [PIXELS]
    y = tl.program_id(0) // tiles_x * TILE_Y + pixel // TILE_X
    x = tl.program_id(0) % tiles_x * TILE_X + pixel % TILE_X
    inside = (y < count) & (x < W)
    at = tl.program_id(1).to(tl.int64) * H * W + (top + y).to(tl.int64) * W + x
    y = tl.minimum(y, count - 1)
    x = tl.minimum(x, W - 1)
    cells = ()
    weights = ()
    for ty in tl.static_range(TAPS_Y):
        row = tl.load(row_index_ptr + ty * _table_pitch(count) + y) * columns
        weight = tl.load(row_weight_ptr + ty * _table_pitch(count) + y)
        for tx in tl.static_range(TAPS_X):
            cells = cells + (row + tl.load(column_index_ptr + tx * _table_pitch(W) + x),)  # noqa: RUF005 (Triton has no stars)
            weights = weights + (weight * tl.load(column_weight_ptr + tx * _table_pitch(W) + x),)  # noqa: RUF005
    return inside, at, cells, weights


@triton.jit
def _group_taps(
    row_index_ptr, row_weight_ptr, column_index_ptr, column_weight_ptr, columns, top, count, lead, H, W, tiles_x,
    TAPS_X: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr,
):  # fmt: skip
    """As ``_tile_taps``, where groups of 4 rows read the same two rows of the stage; the first group of the band begins
    ``lead`` rows before it. Pixels are in the order of the rows of a group, rows of groups, and columns.

    Returns the tuples of cells in the upper and in the lower row of the stage, the weights of these columns, and the
    weights of the lower row for each row of a group.
    """
    top_y = tl.program_id(0) // tiles_x * TILE_Y - lead
    left = tl.program_id(0) % tiles_x * TILE_X
    pixel = tl.arange(0, TILE_Y * TILE_X)  # [PIXELS]
    y = top_y + pixel % (TILE_Y * TILE_X // 4) // TILE_X * 4 + pixel // (TILE_Y * TILE_X // 4)
    x = left + pixel % TILE_X
    inside = (y >= 0) & (y < count) & (x < W)
    at = tl.program_id(1).to(tl.int64) * H * W + (top + y).to(tl.int64) * W + x

    group = tl.arange(0, TILE_Y * TILE_X // 4)  # [GROUPS]
    y = top_y + group // TILE_X * 4
    x = tl.minimum(left + group % TILE_X, W - 1)
    pitch = _table_pitch(count)
    some = tl.minimum(tl.maximum(y, 0), count - 1)
    upper_row = tl.load(row_index_ptr + some) * columns
    lower_row = tl.load(row_index_ptr + pitch + some) * columns
    upper = ()
    lower = ()
    weights = ()
    for tx in tl.static_range(TAPS_X):
        column = tl.load(column_index_ptr + tx * _table_pitch(W) + x)
        upper = upper + (upper_row + column,)  # noqa: RUF005 (Triton has no stars)
        lower = lower + (lower_row + column,)  # noqa: RUF005
        weights = weights + (tl.load(column_weight_ptr + tx * _table_pitch(W) + x),)  # noqa: RUF005
    shares = ()
    for row in tl.static_range(4):
        row_at = tl.minimum(tl.maximum(y + row, 0), count - 1)
        shares = shares + (tl.load(row_weight_ptr + pitch + row_at),)  # noqa: RUF005
    return inside, at, upper, lower, weights, shares


@triton.jit
def _interpolate(z, stage_ptr, offsets, weights, TAPS: tl.constexpr):
    """z ``[pixels, queries]`` plus the weighted staged values at each pixel's taps, of a block of queries, the first of
    which is that of ``stage_ptr``."""
    n = tl.arange(0, BLOCK_N)
    for tap in tl.static_range(TAPS):
        value = tl.load(stage_ptr + (offsets[tap][:, None] + n[None, :]))
        z = tl.fma(_widen(value), weights[tap][:, None], z)
    return z
