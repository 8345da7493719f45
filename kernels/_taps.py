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
def _saturate(x):
    """x, but at least 0 and at most 1, and 0 for NaN. It becomes part of the instruction that computes x."""
    if INTERPRETED:
        return tl.where(x > 0.0, tl.minimum(x, 1.0), 0.0)
    return tl.inline_asm_elementwise("cvt.sat.f32.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def _tap(position, size):
    """The position in pixels; the first pixel around it that is on the level; that pixel's share, 0 for positions a
    pixel or more outside and for NaN; the distance from the pixel's center; whether a second pixel is on the level."""
    last = size - 1
    at = tl.fma(position, tl.cast(size, tl.float32), -0.5)
    floor = tl.floor(at).to(tl.int32)
    first = tl.maximum(tl.minimum(floor, last), 0)
    beyond = at - first.to(tl.float32)
    second = floor.to(tl.uint32, bitcast=True) < last.to(tl.uint32, bitcast=True)
    return at, first, _saturate(1.0 - tl.abs(beyond)), beyond, second


@triton.jit
def _moved(address, count, step, WIDE: tl.constexpr):
    """address + count * step, in bytes: one instruction, if the step has 32 bits. Without this, LLVM selects or shifts
    64 bits, or writes mad.wide, of which ptxas makes three instructions."""
    if WIDE or INTERPRETED:
        return address + count.to(tl.int64) * step
    return tl.inline_asm_elementwise(
        "{ .reg .b64 distance; mul.wide.s32 distance, $1, $2; add.s64 $0, $3, distance; }",
        "=l,r,r,l", [count, step, address], dtype=tl.int64, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _row_at(
    address, part, of_head, DTYPE: tl.constexpr, TILE_D: tl.constexpr, ALIGNMENT: tl.constexpr, WHOLE: tl.constexpr
):
    """``_load_row`` of the part of a row that begins at an address, of which the compiler knows only what it is told
    here: it holds TILE_D channels side by side, of ALIGNMENT bytes."""
    ptrs = tl.max_contiguous(address.to(tl.pointer_type(DTYPE)), (1, 1, TILE_D))
    return _load_row(tl.multiple_of(ptrs, (1, 1, ALIGNMENT)) + part, of_head, WHOLE)


@triton.jit
def _taps(level, zeros, stride_s, x, y, h, w, WIDE: tl.constexpr):
    """Whether points are inside, and have a second column and row; the addresses of the four pixels around each, row by
    row; the shares of both columns and of both rows. ``level`` and ``zeros`` are the addresses of a level's first pixel
    and of a row of zeros, for each channel of a tile; the stride is in bytes. WIDE: an image may have 2 GiB or more.

    Points outside read a row of zeros. Loads then need no mask, which would take 16 instructions that write zeros.
    """
    _, column, left, beyond, second = _tap(x, w)
    _, row, upper, below, second_row = _tap(y, h)
    inside = tl.minimum(left, upper) > 0.0
    second, second_row = second & inside, second_row & inside
    step = stride_s.to(tl.int64) if WIDE else stride_s
    a = tl.where(inside, _moved(level, row * w + column, step, WIDE), zeros)
    columns, rows = tl.where(second, 1, 0), tl.where(second_row, 1, 0)  # to move
    b, c = _moved(a, columns, step, WIDE), _moved(a, rows, w * step, WIDE)
    d = _moved(c, columns, step, WIDE)
    right, lower = tl.where(second, beyond, 0.0), tl.where(second_row, below, 0.0)
    return inside, second, second_row, a, b, c, d, left, right, upper, lower
