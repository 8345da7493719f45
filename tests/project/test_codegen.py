"""How many machine instructions GCC makes of the CPU kernels' hot loops."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.helpers.levels import ROOT, SETUP, compile_for, is_foreign, tool

OBJECTS = ROOT / "build" / f"ninja-{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "cpu"
# Instructions of the LONGEST innermost loops of a kernel's file, together: about the larger count of GCC 11 and 12,
# which differ by up to 13 %, and by 29 % in attention for AVX-512. These loops handle the pixels, in the kernel's
# variants for each kind of loss and for padding.
LONGEST = 6
INSTRUCTIONS = {
    ("mask_cost", "avx2"): 1079,
    ("mask_cost", "avx512"): 1138,
    ("mask_loss", "avx2"): 2789,
    ("mask_loss", "avx512"): 2409,
    ("point_mask_loss", "avx2"): 2966,
    ("point_mask_loss", "avx512"): 2218,
    ("masked_attention", "avx2"): 1683,
    ("masked_attention", "avx512"): 1600,
    ("mask_cost", "neon"): 1123,
    ("mask_loss", "neon"): 3372,
    ("point_mask_loss", "neon"): 2661,
    ("masked_attention", "neon"): 1326,
}
JUMP = re.compile(r"j\w+|b|b\.\w+|cbn?z|tbn?z")  # of x86 or ARM


def innermost_loops(listing: str) -> list[int]:
    """The lengths in instructions of the innermost loops in what objdump prints, the longest first.

    A loop is what lies between a backward jump and its target; it is an innermost one if no other loop lies within.
    """
    lengths = []
    for function in re.split(r"^[0-9a-f]+ <.*>:$", listing, flags=re.MULTILINE):
        lines = re.findall(r"^ *([0-9a-f]+):\s+(\S+)(?:\s.*?([0-9a-f]+) <)?", function, re.MULTILINE)
        index = {address: i for i, (address, _, _) in enumerate(lines)}
        jumps = [(index.get(target, i + 1), i) for i, (_, name, target) in enumerate(lines) if JUMP.fullmatch(name)]
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
    arm = """
0000000000000000 <inner>:
   0:\tmov\tw2, #0x9                   \t// #9
   4:\tadd\tx0, x0, #0x10
   8:\tldr\tq0, [x0]
   c:\tsubs\tw2, w2, #0x1
  10:\tb.ne\t4 <inner+0x4>  // b.any
  14:\ttbnz\tw1, #3, 0 <inner>
  18:\tret
"""
    assert innermost_loops(arm) == [4]


def object_file(kernel: str, level: str, folder: Path) -> Path:
    """What setup.py has compiled, or would compile on another processor with GCC."""
    path = OBJECTS / f"{kernel}.{level}.o"
    if path.exists():
        return path
    if not is_foreign(level):
        pytest.skip(f"setup.py has not compiled {kernel} for {level} here")
    flags = [*SETUP["CXX_FLAGS"], *SETUP["KERNEL_FLAGS"]["GCC"]]
    compile_for(level, folder, *flags, "-c", ROOT / "csrc" / "cpu" / f"{kernel}.cpp", "-o", path.name)
    return folder / path.name


@pytest.mark.parametrize(
    ("kernel", "level"),
    [pytest.param(*key, marks=[pytest.mark.slow] if key[1] == "neon" else []) for key in INSTRUCTIONS],
)
def test_hot_loops_have_as_many_instructions_as_before(kernel, level, tmp_path):
    objdump = tool(level, "objdump")
    path = object_file(kernel, level, tmp_path)
    if b"GCC: (" not in path.read_bytes():
        pytest.skip("the numbers are GCC's")
    command = [objdump, "--disassemble", "--no-show-raw-insn", str(path)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    expected, found = INSTRUCTIONS[kernel, level], sum(innermost_loops(listing)[:LONGEST])
    assert 0.75 * expected < found < 1.2 * expected, (
        f"the {LONGEST} longest loops of {path} have {found} instructions, expected about {expected}. If the kernel's "
        "formulas have changed, write the new number into this test; otherwise look at what the compiler makes of them"
    )
