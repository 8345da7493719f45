"""Compiles C++ for one SIMD level, for 64-bit ARM with Debian's cross compiler, and runs the programs, there emulated.

Debian and Ubuntu have these tools in the packages g++-aarch64-linux-gnu and qemu-user.
"""

from __future__ import annotations

import runpy
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="imported")
ARM = "aarch64-linux-gnu"


def is_foreign(level: str) -> bool:
    """Whether this machine's processor can never run the level."""
    return level not in SETUP["simd_levels"]()


def tool(level: str, name: str) -> str:
    """A program of GNU's tools for the level's machine code; skips the test where it is missing."""
    if is_foreign(level) and level != "neon":
        pytest.skip(f"needs {name} for {level}")
    return installed(f"{ARM}-{name}" if is_foreign(level) else name)


def installed(program: str) -> str:
    if shutil.which(program) is None:
        pytest.skip(f"needs {program}")
    return program


def compile_for(level: str, folder: Path, *arguments: str | Path) -> None:
    """Runs the C++ compiler in ``folder`` with the level's options; skips the test where there is none."""
    compiler = [tool(level, "g++")] if is_foreign(level) else SETUP["cxx_command"]()[1]
    options = ["-std=c++20", "-fPIC", f"-I{ROOT / 'csrc'}", f"-DFASTMASK_SIMD={level}", *SETUP["SIMD_FLAGS"][level]]
    subprocess.run([*compiler, *options, *arguments], cwd=folder, check=True)


def run_for(level: str, command: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
    """Runs a statically linked program of the level."""
    emulator = [installed("qemu-aarch64")] if is_foreign(level) else []
    return subprocess.run([*emulator, *command], capture_output=True, text=True)
