"""Cells: the output pixels nearest to each logit, of which rows and columns of logits are interpolated.

The output pixels of a row are divided into cells: cell c holds the outputs nearest to logit c, which are interpolated
from the logits c - 1, c and c + 1; rows of outputs are divided among rows of logits in the same way. A thread that owns
a cell needs only nine logits, whatever the ratio of the sizes, and sums slopes for these nine: a gather without atomics
that visits each output pixel once. If a ratio is a whole number, as usual, all weights are constants.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastmask.kernels._taps import _halves, _pair


@triton.jit
def _cell_start(cell, w, W):
    """The first output of a cell: the smallest j with floor((2 j + 1) w / (2 W)) >= cell."""
    start = (2 * tl.cast(cell, tl.int64) * W + w - 1) // (2 * w)
    return tl.minimum(tl.maximum(start, 0), W).to(tl.int32)


@triton.jit
def _offset(output, cell, w, W):
    """The offset of an output from its cell's logit, in steps of 1 / (2 W) or, if w divides W, of w / (2 W): an exact
    integer. PyTorch's bilinear rule with align_corners=False: its magnitude is the weight of the neighboring logit, the
    one before if it is negative, else the one after. Beyond the edges, the logits repeat.

    The rounding error of a position in float32 would grow with the position, and large logits would amplify it.
    """
    return ((2 * tl.cast(output, tl.int64) + 1) * w - (2 * tl.cast(cell, tl.int64) + 1) * W).to(tl.float32)


@triton.jit
def _between(offset, half_step, before, middle, after):
    """The logit at an offset from the middle one."""
    weight = tl.abs(offset) * half_step
    neighbor = tl.where(offset < 0.0, before, tl.where(offset > 0.0, after, 0.0))  # 0 * inf is NaN
    return tl.fma(neighbor, weight, middle * (1.0 - weight))


@triton.jit
def _add_at(offset, slope, sums):
    """Adds the slope of an output at an offset to sums: its shares in the logits before and after, in half steps, and
    all of it. What these shares leave of the total belongs to the middle logit."""
    before, total, after = sums
    before = tl.where(offset < 0.0, before - slope * offset, before)
    after = tl.where(offset > 0.0, after + slope * offset, after)
    return before, total + slope, after


@triton.jit
def _add_each_at(offset, slopes, sums):
    """Adds three slopes, or sums over a row of outputs, to the sums of each."""
    return _add_at(offset, slopes[0], sums[0]), _add_at(offset, slopes[1], sums[1]), _add_at(offset, slopes[2], sums[2])


@triton.jit
def _in_powers_of_two(x):
    """x / log(2): the constant's second term matters where exp(x) is small, and the loss nothing but such terms."""
    return tl.fma(x, 1.44269502, x * 1.92596303e-08)


@triton.jit
def _row_logits(plane_ptr, row, cell, h, w):
    """The logits before, at and after each cell in a row, divided by log(2); the edges repeat."""
    row = tl.minimum(tl.maximum(row, 0), h - 1) * w
    before = tl.load(plane_ptr + tl.maximum(cell - 1, 0) + row).to(tl.float32)
    middle = tl.load(plane_ptr + cell + row).to(tl.float32)
    after = tl.load(plane_ptr + tl.minimum(cell + 1, w - 1) + row).to(tl.float32)
    return _in_powers_of_two(before), _in_powers_of_two(middle), _in_powers_of_two(after)


@triton.jit
def _shared(cells, half_step, to_upper, to_lower, previous, current):
    """Shares the sums of a row of cells, as ``_add_at`` has them, among rows of logits. Returns the sums of the row
    before, which are complete then; of the cells' row, without what the next cells add; and of the next row, in half
    steps."""
    upper, total, lower = cells
    middle = total - upper * to_upper - lower * to_lower
    return previous + upper * half_step, middle + current * half_step, lower


@triton.jit
def _shared_columns(cells, half_step, to_upper, to_lower, previous, current):
    """The same for three columns."""
    before = _shared(cells[0], half_step, to_upper, to_lower, previous[0], current[0])
    total = _shared(cells[1], half_step, to_upper, to_lower, previous[1], current[1])
    after = _shared(cells[2], half_step, to_upper, to_lower, previous[2], current[2])
    return (before[0], total[0], after[0]), (before[1], total[1], after[1]), (before[2], total[2], after[2])


@triton.jit
def _shared_slopes(cells, half_step, to_upper, to_lower, previous, current):
    """The same for three slopes."""
    a = _shared_columns(cells[0], half_step, to_upper, to_lower, previous[0], current[0])
    b = _shared_columns(cells[1], half_step, to_upper, to_lower, previous[1], current[1])
    c = _shared_columns(cells[2], half_step, to_upper, to_lower, previous[2], current[2])
    return (a[0], b[0], c[0]), (a[1], b[1], c[1]), (a[2], b[2], c[2])


@triton.jit
def _joined(row, after, before, to_left, to_right):
    """The slopes of a row of logits: those of its cells without the shares of their neighbors, and its own shares in
    the outputs of the neighbors."""
    return row[1] + (after - row[0]) * to_left + (before - row[2]) * to_right


@triton.jit
def _store_slopes(ptrs, step, rows, lane, to_left, to_right, stored, BLOCK_C: tl.constexpr):
    """Stores a row of each of three maps, ``step`` apart. Lanes exchange two values as one of 64 bits."""
    first, second, third = rows
    left, right = tl.maximum(lane - 1, 0), tl.minimum(lane + 1, BLOCK_C - 1)
    first_after, second_after = _halves(tl.gather(_pair(first[2], second[2]), left, 0))
    first_before, second_before = _halves(tl.gather(_pair(first[0], second[0]), right, 0))
    third_after, third_before = tl.gather(third[2], left, 0), tl.gather(third[0], right, 0)
    tl.store(ptrs, _joined(first, first_after, first_before, to_left, to_right), mask=stored)
    tl.store(ptrs + step, _joined(second, second_after, second_before, to_left, to_right), mask=stored)
    tl.store(ptrs + 2 * step, _joined(third, third_after, third_before, to_left, to_right), mask=stored)
