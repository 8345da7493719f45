"""The keys that each query of masked attention attends to, one bit per key, computed once for all heads.

At B=16, N=100, 128 x 128 bf16 logits and a 64 x 64 grid the logits are 52 MB, 12.5 us at 4.2 TB/s, and the bits 0.8 MB;
27 instructions per key and query, in the machine code for sm_90, are 5.4 us of issue slots on 132 SMs, if the sizes
have a whole ratio (53 if not). Grids of 32 x 32 and 16 x 16 read a half and a quarter of the rows of logits. Logits of
the grid's own size, as our decoder computes them, are 13 MB, 3.1 us. Backward computes the bits again, because forward
returns no tensor that could hold them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask.kernels._common import COMPILER_OPTIONS, ceil_div, power_of_two, unit
from fastmask.kernels._launch import Launch, kernel
from fastmask.kernels._taps import _to_float

QUERIES = tl.constexpr(4)  # queries per program; each owns one byte of the 32-bit words in which it gathers bits
STEP_KEYS = 1024  # the most keys that a program resamples at a time


@triton.jit
def _key_taps(i, inputs, outputs, half_step):
    """PyTorch's bilinear rule with align_corners=False: the two inputs of output i, and the weight of the second.

    The position is an integer in units of half_step = 1 / (2 outputs), so that zero weights are exactly 0. A logit of
    weight 0 is not read, as 0 * inf is NaN: if one logit is the whole result, it serves as both taps, with half the
    weight each.
    """
    position = tl.maximum((2 * i + 1) * inputs - outputs, 0)
    # The added quarter of a unit exceeds the rounding error if inputs * outputs is less than 2^20.
    first = tl.fma(position.to(tl.float32), half_step, 0.25 * half_step).to(tl.int32)
    rest = position - first * (2 * outputs)
    whole = (rest == 0) | (first == inputs - 1)
    return first, tl.where(whole, first, first + 1), tl.where(whole, 0.5, rest.to(tl.float32) * half_step)


@triton.jit
def _middle(ptrs, there, RATIO: tl.constexpr):
    """Halves of the two logits in the middle of each RATIO, of which there are eight to a key's byte, as a sum
    ``[bytes, 8]``. All of a row are read, 16 bytes at a time."""
    column = tl.arange(0, 8 * RATIO)
    x = _to_float(tl.load(ptrs[:, None] + column[None, :], mask=there[:, None], other=0.0)) * 0.5
    if RATIO > 2:
        x = tl.where(((column % RATIO == RATIO // 2 - 1) | (column % RATIO == RATIO // 2))[None, :], x, 0.0)
    return tl.sum(tl.reshape(x, [x.shape[0], 8, RATIO]), 2)


@triton.jit
def _at_keys(ptrs, stride_y, there, RATIO: tl.constexpr):
    """The logits ``[bytes, 8]`` at the eight keys of each byte: the means of the four around a key's center, or its one
    logit for a RATIO of 1. ``ptrs [bytes]`` are the first ones of the upper of two rows."""
    if RATIO == 1:
        return _to_float(tl.load(ptrs[:, None] + tl.arange(0, 8)[None, :], mask=there[:, None], other=0.0))
    return 0.5 * _middle(ptrs, there, RATIO) + 0.5 * _middle(ptrs + stride_y, there, RATIO)


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def _readable(padding_ptr, s, S, HAS_PADDING: tl.constexpr):
    """Which keys s exist and are not padding."""
    readable = s < S
    if HAS_PADDING:
        readable = readable & (tl.load(padding_ptr + s, mask=readable, other=1) == 0)
    return readable


@triton.jit
def _store_queries(packed, begin, queries, byte_ptr, occupied_ptr, N, words, blocks, BLOCK_S: tl.constexpr):
    """Stores BLOCK_C / 8 bytes of each query whose bit is set in ``queries``, and which blocks have any bit."""
    BYTES: tl.constexpr = packed.shape[0]
    byte = begin // 8 + tl.arange(0, BYTES)
    at = (byte // 8) * (8 * N) + byte % 8
    for i in tl.static_range(QUERIES):
        stored = byte < tl.where((queries >> (8 * i)) & 1 != 0, 8 * words, 0)
        tl.store(byte_ptr + at + 8 * i, ((packed >> (8 * i)) & 255).to(tl.uint8), mask=stored)
    occupied = tl.reduce(tl.reshape(packed, [BYTES * 8 // BLOCK_S, BLOCK_S // 8]), 1, _or) != 0
    block = begin // BLOCK_S + tl.arange(0, BYTES * 8 // BLOCK_S)
    tl.store(occupied_ptr + block, occupied.to(tl.uint8), mask=block < blocks)


@kernel
def _attended_keys_kernel(
    logits_ptr, stride_b, stride_n, stride_y, padding_ptr, bits_ptr, occupied_ptr,
    N, S, h, w, grid_height, grid_width, half_step_y, half_step_x, groups, words, blocks,
    RATIO: tl.constexpr, UNIT: tl.constexpr, HAS_LOGITS: tl.constexpr, HAS_PADDING: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Bits and occupied blocks of four queries of one image. A query attends to the keys that are not padding and where
    its logits, resampled to the grid, are >= 0; if there are none, to all keys that are not padding.

        logits    (B, N, h, w), rows contiguous, strides in units
        padding   (B, S) uint8
        bits      (B, words, N) int64; the words cover whole blocks
        occupied  (B, groups, blocks) uint8, blocks of BLOCK_S keys

    RATIO is 2, 4 or 8 if rows of logits are so many times as long as those of keys, which are a multiple of 8, and h is
    an even multiple of grid_height. A key then has the mean of the four logits around its center, and eight keys, which
    are one byte, lie in one row. It is 1 if there is one logit for each key, in one row. Otherwise it is 0.
    """
    half_step_y = tl.cast(half_step_y, tl.float32)
    half_step_x = tl.cast(half_step_x, tl.float32)
    stride_y *= UNIT
    image = (tl.program_id(0) // groups).to(tl.int64)
    query = (tl.program_id(0) % groups) * QUERIES
    byte_ptr = bits_ptr.to(tl.pointer_type(tl.uint8)) + (image * words * N + query) * 8
    occupied_ptr += tl.program_id(0).to(tl.int64) * blocks
    padding_ptrs = padding_ptr
    if HAS_PADDING:
        padding_ptrs = padding_ptr + image * S
    bit = tl.arange(0, 8)[None, :]
    queries = 0x01010101 >> (8 * tl.maximum(query + QUERIES - N, 0))  # bit 8 i: whether query i exists
    foreground = tl.zeros([BLOCK_C // 8], dtype=tl.int32)
    for begin in range(0, S, BLOCK_C):
        s = begin + tl.arange(0, BLOCK_C // 8)[:, None] * 8 + bit  # [BLOCK_C / 8, 8]
        present = _readable(padding_ptrs, s, S, HAS_PADDING)
        packed = tl.zeros([BLOCK_C // 8, 8], dtype=tl.int32)
        if HAS_LOGITS and RATIO:
            byte = begin // 8 + tl.arange(0, BLOCK_C // 8)
            there = byte * 8 < S
            y = byte // (grid_width // 8)
            x = byte - y * (grid_width // 8)
            rows_per_key = h // grid_height
            at = (y * rows_per_key + tl.maximum(rows_per_key // 2 - 1, 0)) * stride_y + x * (8 * RATIO)
            for i in tl.static_range(QUERIES):
                n = tl.minimum(query + i, N - 1).to(tl.int64)
                plane_ptr = logits_ptr + (image * stride_b + n * stride_n) * UNIT
                value = _at_keys(plane_ptr + at, stride_y, there, RATIO)
                packed |= tl.where(value >= 0.0, 1 << (bit + 8 * i), 0)
            packed = tl.where(present, packed, 0)
        elif HAS_LOGITS:
            y = s // grid_width
            y_first, y_second, y_weight = _key_taps(y, h, grid_height, half_step_y)
            x_first, x_second, x_weight = _key_taps(s - y * grid_width, w, grid_width, half_step_x)
            top_left = y_first * stride_y + x_first
            top_right = y_first * stride_y + x_second
            bottom_left = y_second * stride_y + x_first
            bottom_right = y_second * stride_y + x_second
            for i in tl.static_range(QUERIES):
                n = tl.minimum(query + i, N - 1).to(tl.int64)
                plane_ptr = logits_ptr + (image * stride_b + n * stride_n) * UNIT
                top = (1.0 - x_weight) * tl.load(plane_ptr + top_left, mask=present, other=0.0).to(tl.float32)
                top += x_weight * tl.load(plane_ptr + top_right, mask=present, other=0.0).to(tl.float32)
                bottom = (1.0 - x_weight) * tl.load(plane_ptr + bottom_left, mask=present, other=0.0).to(tl.float32)
                bottom += x_weight * tl.load(plane_ptr + bottom_right, mask=present, other=0.0).to(tl.float32)
                value = (1.0 - y_weight) * top + y_weight * bottom
                packed |= tl.where(present & (value >= 0.0), 1, 0) << (bit + 8 * i)
        else:
            packed = tl.where(present, 1, 0) << bit
        packed = tl.reduce(packed, 1, _or) & (queries * 255)  # [BLOCK_C / 8], one byte per query
        foreground |= packed
        _store_queries(packed, begin, queries, byte_ptr, occupied_ptr, N, words, blocks, BLOCK_S)

    if HAS_LOGITS:
        foreground = tl.reduce(foreground, 0, _or)
        some = foreground | ((foreground >> 4) & 0x0F0F0F0F)
        some |= (some >> 2) & 0x3F3F3F3F
        some |= (some >> 1) & 0x7F7F7F7F
        without = queries & ~some & 0x01010101
        if without != 0:
            tl.debug_barrier()  # the stores above must finish before they are overwritten
            for begin in range(0, S, BLOCK_C):
                s = begin + tl.arange(0, BLOCK_C // 8)[:, None] * 8 + bit
                present = _readable(padding_ptrs, s, S, HAS_PADDING)
                packed = tl.reduce(tl.where(present, 0x01010101, 0) << bit, 1, _or)
                _store_queries(packed, begin, without, byte_ptr, occupied_ptr, N, words, blocks, BLOCK_S)


@triton.jit
def _occupied_blocks(
    occupied_ptr, stride_occupied_n, first_query, N, first, end, HAS_BITS: tl.constexpr, BLOCK_N: tl.constexpr
):
    """The blocks that any of BLOCK_N queries attends to, among up to 32 blocks from ``first`` to ``end``: one bit per
    block, and their number."""
    i = tl.arange(0, 32)
    if HAS_BITS:
        GROUPS: tl.constexpr = BLOCK_N // QUERIES
        group = first_query // QUERIES + tl.arange(0, GROUPS)  # [GROUPS]
        occupied = tl.load(
            occupied_ptr + group[:, None] * stride_occupied_n + (first + i)[None, :],
            mask=(group * QUERIES < N)[:, None] & (first + i < end)[None, :],
            other=0,
        )
        occupied = tl.max(occupied.to(tl.int32), 0)  # [32]
    else:
        occupied = tl.where(first + i < end, 1, 0)
    return tl.sum(occupied << i, 0), tl.sum(occupied, 0)


@triton.jit
def _lowest_block(remaining):
    """The lowest set bit, and its index, which is the exponent of this power of two as a float32."""
    lowest = remaining & -remaining
    return lowest, ((lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 255) - 127


@triton.jit
def _attends(
    bits_ptr, stride_bits_w, block, n, N, S, HAS_BITS: tl.constexpr, OWN_BITS: tl.constexpr, BLOCK_S: tl.constexpr
):
    """``[BLOCK_N, BLOCK_S]``, which keys of a block queries ``n`` attend to."""
    i = tl.arange(0, BLOCK_S)
    if HAS_BITS:
        word = tl.cast(block, tl.int64) * BLOCK_S // 64
        word_ptrs = bits_ptr + word * stride_bits_w + (n if OWN_BITS else n * 0)
        if BLOCK_S <= 32:
            bits = (tl.load(word_ptrs, mask=n < N, other=0) >> (block * BLOCK_S % 64)).to(tl.int32)[:, None]
        else:
            bits = tl.zeros([1, 1], dtype=tl.int32)
            for j in tl.static_range(BLOCK_S // 64):
                word = tl.load(word_ptrs + j * stride_bits_w, mask=n < N, other=0)
                half = tl.where((i % 64 < 32)[None, :], word.to(tl.int32)[:, None], (word >> 32).to(tl.int32)[:, None])
                bits = tl.where((i // 64 == j)[None, :], half, bits)
        attended = (bits & (1 << (i % 32))[None, :]) != 0
    else:
        attended = (block * BLOCK_S + i < S)[None, :]
    return attended


def whole_ratio(size: tuple[int, int], grid: tuple[int, int]) -> int:
    """RATIO of ``_attended_keys_kernel`` for logits of another size than the grid."""
    (h, w), (height, width) = size, grid
    whole = h % (2 * height) == 0 and w % width == 0 and width % 8 == 0
    return w // width if whole and w // width in (2, 4, 8) else 0


class AttendedKeysPlan(NamedTuple):
    """The launch for some sizes; the shapes of the results, and the arguments of the kernels that read them."""

    launch: Launch
    bits: tuple[int, ...]
    occupied: tuple[int, ...]
    arguments: dict[str, Any]


NO_BITS = dict.fromkeys(("stride_bits_b", "stride_bits_w", "stride_occupied_b", "stride_occupied_n")) | {
    "HAS_BITS": False, "OWN_BITS": False,
}  # fmt: skip


def plan_attended_keys(
    device: torch.device, batch: int, queries: int, shape: tuple[int, ...] | None, strides: tuple[int, ...],
    has_padding: bool, grid: tuple[int, int], block: int,
) -> AttendedKeysPlan:  # fmt: skip
    """For mask logits of this shape and strides, or without any for None."""
    own = shape is not None
    rows = queries if own else 1
    keys = grid[0] * grid[1]
    blocks, groups = ceil_div(keys, block), ceil_div(rows, QUERIES.value)
    words = ceil_div(blocks * block, 64)
    h, w = shape[-2:] if shape is not None else (1, 1)
    if (h, w) == grid and strides[2] == w and keys % 8 == 0:
        h, w = grid = (1, keys)
        ratio = 1
    else:
        ratio = whole_ratio((h, w), grid) if own else 0
    if ratio != 1 and 2 * max(grid[0] * h, grid[1] * w) >= 1 << 31:
        raise ValueError(f"mask_logits of {h} x {w} are too large for 32-bit positions on a grid of {tuple(grid)}")
    size = unit(*strides[:3])
    step = power_of_two(keys, 128, STEP_KEYS)
    launch = _attended_keys_kernel.plan(
        (batch * groups,),
        stride_b=strides[0] // size,
        stride_n=strides[1] // size,
        stride_y=strides[2] // size,
        N=rows,
        S=keys,
        h=h,
        w=w,
        grid_height=grid[0],
        grid_width=grid[1],
        half_step_y=0.5 / grid[0],
        half_step_x=0.5 / grid[1],
        groups=groups,
        words=words,
        blocks=blocks,
        RATIO=ratio,
        UNIT=size,
        HAS_LOGITS=own,
        HAS_PADDING=has_padding,
        BLOCK_S=block,
        BLOCK_C=step,
        num_warps=max(4, step // 128),
        **COMPILER_OPTIONS,
    )
    arguments = {
        "stride_bits_b": words * rows,
        "stride_bits_w": rows,
        "stride_occupied_b": groups * blocks,
        "stride_occupied_n": blocks if own else 0,
        "HAS_BITS": True,
        "OWN_BITS": own,
    }
    return AttendedKeysPlan(launch, (batch, words, rows), (batch, groups, blocks), arguments)


def attended_keys(plan: AttendedKeysPlan | None, mask_logits: Tensor | None, padding: Tensor | None) -> dict[str, Any]:
    """Launches; the tensors of the attended keys, by the names of the arguments of ``_occupied_blocks`` and
    ``_attends``.

    bits ``(B, words, N)`` int64: bit i of word j is key 64 j + i. occupied ``(B, ceil(N / 4), blocks)`` uint8: whether
    any of four queries attends to any key of a block. If all queries attend to the same keys, both have one row, and
    OWN_BITS is False; if all attend to all keys, there are no bits.

    Args:
        plan: of ``plan_attended_keys``, for a grid (height, width) of keys and 16 to 128 keys per block, a power of
            two; None without mask logits and padding.
        mask_logits: ``(B, N, h, w)``, rows contiguous.
        padding: ``(B, S)`` uint8, 1 at padding.
    """
    if plan is None:
        return {"bits_ptr": None, "occupied_ptr": None}
    device = (padding if mask_logits is None else mask_logits).device
    bits = torch.empty(plan.bits, dtype=torch.int64, device=device)
    occupied = torch.empty(plan.occupied, dtype=torch.uint8, device=device)
    plan.launch(logits_ptr=mask_logits, padding_ptr=padding, bits_ptr=bits, occupied_ptr=occupied)
    return {"bits_ptr": bits, "occupied_ptr": occupied}
