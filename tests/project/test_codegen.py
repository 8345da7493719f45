"""How many machine instructions GCC makes of the CPU kernels' hot loops."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OBJECTS = ROOT / "build" / f"ninja-{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "cpu"
# Instructions of the LONGEST innermost loops of a kernel's file, together: the larger count of GCC 11 and 12, which
# differ by up to 13 %. These loops handle the pixels, in the kernel's variants for each kind of loss and for padding.
LONGEST = 6
INSTRUCTIONS = {
    ("mask_cost", "avx2"): 1079,
    ("mask_cost", "avx512"): 1138,
    ("mask_loss", "avx2"): 2789,
    ("mask_loss", "avx512"): 2409,
    ("point_mask_loss", "avx2"): 2966,
    ("point_mask_loss", "avx512"): 2218,
    ("masked_attention", "avx2"): 1410,
    ("masked_attention", "avx512"): 1201,
}


def innermost_loops(listing: str) -> list[int]:
    """The lengths in instructions of the innermost loops in what objdump prints, the longest first.

    A loop is what lies between a backward jump and its target; it is an innermost one if no other loop lies within.
    """
    lengths = []
    for function in re.split(r"^[0-9a-f]+ <.*>:$", listing, flags=re.MULTILINE):
        lines = re.findall(r"^ *([0-9a-f]+):\s+(\S+)(?: +([0-9a-f]+) <)?", function, re.MULTILINE)
        index = {address: i for i, (address, _, _) in enumerate(lines)}
        jumps = [(index.get(target, i + 1), i) for i, (_, name, target) in enumerate(lines) if name.startswith("j")]
        loops = {(start, end) for start, end in jumps if start <= end}
        outer = {(a, b) for a, b in loops for start, end in loops - {(a, b)} if a <= start and end <= b}
        lengths += [end - start + 1 for start, end in loops - outer]
    return sorted(lengths, reverse=True)


def test_innermost_loops_are_found():
    listing = """
0000000000000000 <outer_and_inner>:
   0:\txor    %eax,%eax
   2:\tmov    %eax,%ecx
   4:\tadd    $0x1,%ecx
   7:\tcmp    $0x9,%ecx
   a:\tjne    4 <outer_and_inner+0x4>
   c:\tcmp    $0x9,%eax
   f:\tjne    2 <outer_and_inner+0x2>
  11:\tjmp    14 <outer_and_inner+0x14>
  14:\tret

0000000000000020 <endless>:
  20:\tcall   0 <outer_and_inner>
  22:\tjmp    20 <endless>
"""
    assert innermost_loops(listing) == [3, 2]


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump of the GNU binutils")
@pytest.mark.parametrize(("kernel", "level"), INSTRUCTIONS)
def test_hot_loops_have_as_many_instructions_as_before(kernel, level):
    path = OBJECTS / f"{kernel}.{level}.o"
    if not path.exists():
        pytest.skip(f"setup.py has not compiled {kernel} for {level} here")
    if b"GCC: (" not in path.read_bytes():
        pytest.skip("the numbers are GCC's")
    command = ["objdump", "--disassemble", "--no-show-raw-insn", str(path)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    expected, found = INSTRUCTIONS[kernel, level], sum(innermost_loops(listing)[:LONGEST])
    assert 0.75 * expected < found < 1.2 * expected, (
        f"the {LONGEST} longest loops of {path} have {found} instructions, expected about {expected}. If the kernel's "
        "formulas have changed, write the new number into this test; otherwise look at what the compiler makes of them"
    )
