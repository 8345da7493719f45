"""The four pixels around a point of deformable attention, and rows of their channels."""

from __future__ import annotations

import triton
import triton.language as tl

from fastmask.kernels._common import INTERPRETED


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
def _load_row(ptrs, of_head, WHOLE: tl.constexpr):
    """Channels in float32; 0 beyond those of the head."""
    return _to_float(tl.load(ptrs) if WHOLE else tl.load(ptrs, mask=of_head, other=0.0))


@triton.jit
def _halves(pair):
    """The two floats of 64 bits, the lower one first."""
    lower, higher = pair.to(tl.int32), (pair >> 32).to(tl.int32)
    return lower.to(tl.float32, bitcast=True), higher.to(tl.float32, bitcast=True)


@triton.jit
def _pair(low, high):
    """Two floats as 64 bits, which one instruction stores."""
    low, high = low.to(tl.uint32, bitcast=True).to(tl.int64), high.to(tl.uint32, bitcast=True).to(tl.int64)
    return low | (high << 32)


@triton.jit
def _tap(position, size):
    """The position in pixels; the first pixel around it that is on the level; that pixel's share, 0 for positions a
    pixel or more outside and for NaN; the distance from the pixel's center; whether a second pixel is on the level."""
    last = size - 1
    at = tl.fma(position, tl.cast(size, tl.float32), -0.5)
    floor = tl.floor(at).to(tl.int32)
    first = tl.minimum(tl.maximum(floor, 0), last)
    beyond = at - first.to(tl.float32)
    second = floor.to(tl.uint32, bitcast=True) < last.to(tl.uint32, bitcast=True)
    share = 1.0 - tl.abs(beyond)
    return at, first, tl.where(share > 0.0, share, 0.0), beyond, second


@triton.jit
def _word(x):
    """x as 32 bits. Without this, LLVM selects and adds 64 bits of a byte offset, in twice as many instructions."""
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _taps(plane_ptr, zeros_ptr, stride_s, x, y, h, w, WIDE: tl.constexpr, UNIT: tl.constexpr):
    """Whether points are inside, and have a second column and row; the addresses of the four pixels around each, row by
    row; the shares of both columns and of both rows.

    Points outside read a row of zeros. Loads then need no mask, which would take 16 instructions that write zeros.
    """
    _, column, left, beyond, second = _tap(x, w)
    _, row, upper, below, second_row = _tap(y, h)
    inside = tl.minimum(left, upper) > 0.0
    second, second_row = second & inside, second_row & inside
    pixel = row * w + column
    step = stride_s.to(tl.int64) if WIDE else stride_s
    ptrs = tl.where(inside, plane_ptr + pixel * step * UNIT, zeros_ptr)
    step *= UNIT
    across, down = tl.where(second, step, 0), tl.where(second_row, w * step, 0)
    if not (WIDE or INTERPRETED):
        across, down = _word(across), _word(down)
    right, lower = tl.where(second, beyond, 0.0), tl.where(second_row, below, 0.0)
    a, b, c, d = ptrs, ptrs + across, ptrs + down, ptrs + down + across
    if UNIT > 1:  # rows are aligned, which the compiler does not see after a selection
        a, b = tl.multiple_of(a, (1, 1, 16)), tl.multiple_of(b, (1, 1, 16))
        c, d = tl.multiple_of(c, (1, 1, 16)), tl.multiple_of(d, (1, 1, 16))
    return inside, second, second_row, a, b, c, d, left, right, upper, lower
