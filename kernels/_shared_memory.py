"""Tables in a block's shared memory, to which threads add at any index. Triton has no operations for that.

A table is known by its address. In Triton's interpreter, which runs one program at a time, it is global memory. Indices
must have at least as many elements as the program has threads: of fewer, each would be added several times.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastmask.kernels._common import INTERPRETED

# Counters of 32 bits, and sums of 64: with what reductions need, less than the 48 KiB that every kernel may have. The
# assembly below has their sizes as numbers: 4096 bytes of counters, and twice 18432 bytes, of the sums' lower and upper
# halves, 40960 in all.
COUNTERS = tl.constexpr(1024)
SUMS = tl.constexpr(4608)


@triton.jit
def _tables(counters_ptr, sums_ptr):
    """The addresses of the counters and of the sums. A kernel calls this once: each call is memory of its own."""
    if INTERPRETED:
        return counters_ptr, sums_ptr
    address = tl.inline_asm_elementwise(
        "{ .shared .align 16 .b8 tables[40960]; mov.u32 $0, tables; add.u32 $0, $0, $1; }",
        "=r,r", [tl.arange(0, 1) * 0], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    address = tl.sum(address, 0)
    return address, address + 4096


@triton.jit
def _read_counters(table, at):
    if INTERPRETED:
        return tl.load(table + at)
    return tl.inline_asm_elementwise(
        "ld.shared.u32 $0, [$1];", "=r,r", [table + at * 4], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _set_counters(table, at, value):
    if INTERPRETED:
        tl.store(table + at, value)
    else:
        tl.inline_asm_elementwise(
            "st.shared.u32 [$1], $2; mov.u32 $0, $1;", "=r,r,r", [table + at * 4, value], dtype=tl.int32,
            is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _count(table, at):
    """Adds one to counters; returns what they were before."""
    if INTERPRETED:
        return tl.atomic_add(table + at, 1, sem="relaxed")
    return tl.inline_asm_elementwise(
        "atom.shared.add.u32 $0, [$1], 1;", "=r,r", [table + at * 4], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _add(table, at, value):
    """Adds to sums. Shared memory adds 32 bits at a time. Lower halves overflow equally often in any order."""
    if INTERPRETED:
        tl.atomic_add(table + at, value, sem="relaxed")
    else:
        tl.inline_asm_elementwise(
            """{
                .reg .pred carry;
                .reg .u32 low, high, before;
                mov.b64 {low, high}, $2;
                atom.shared.add.u32 before, [$1], low;
                add.u32 low, low, before;
                setp.lt.u32 carry, low, before;
                @carry add.u32 high, high, 1;
                red.shared.add.u32 [$1 + 18432], high;
                mov.u32 $0, before;
            }""",
            "=r,r,l", [table + at * 4, value], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _take(table, at, taken):
    """Sums, which are 0 afterwards; 0 where they are not taken."""
    if INTERPRETED:
        sums = tl.load(table + at, mask=taken, other=0)
        tl.store(table + at, 0, mask=taken)
        return sums
    return tl.inline_asm_elementwise(
        """{
            .reg .pred taken;
            .reg .u32 low, high;
            setp.ne.u32 taken, $2, 0;
            mov.b64 {low, high}, 0;
            @taken ld.shared.u32 low, [$1];
            @taken ld.shared.u32 high, [$1 + 18432];
            @taken st.shared.u32 [$1], 0;
            @taken st.shared.u32 [$1 + 18432], 0;
            mov.b64 $0, {low, high};
        }""",
        "=&l,r,r", [table + at * 4, taken.to(tl.int32)], dtype=tl.int64, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _clear_sums(table, at):
    if INTERPRETED:
        tl.store(table + at, 0)
    else:
        tl.inline_asm_elementwise(
            "st.shared.u32 [$1], 0; st.shared.u32 [$1 + 18432], 0; mov.u32 $0, $1;",
            "=r,r", [table + at * 4], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
