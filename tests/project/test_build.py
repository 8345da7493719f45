"""What setup.py decides, with compilers that are not there; and what it builds."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastmask
from tests.helpers.levels import ROOT, SETUP, compile_for, tool

CUDA_12_4 = ("12.4", "50 52 53 60 61 62 70 72 75 80 86 87 89 90")
CUDA_12_8 = ("12.8", "50 52 53 60 61 62 70 72 75 80 86 87 89 90 100 101 120")
CUDA_13_0 = ("13.0", "75 80 86 87 88 89 90 100 110 103 120 121")


def program(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def nvcc(tmp_path, monkeypatch):
    """Puts an nvcc into CUDA_HOME that answers as the release does, and compiles nothing."""

    def install(version: str, archs: str, compiles: bool = True) -> Path:
        path = program(
            tmp_path / "cuda" / "bin" / "nvcc",
            f'case "$*" in\n'
            f'  *--version*) echo "Cuda compilation tools, release {version}, V{version}.99" ;;\n'
            f"  *--list-gpu-arch*) for arch in {archs}; do echo compute_$arch; done ;;\n"
            f'  *) echo "unsupported GNU version" >&2; exit {int(not compiles)} ;;\n'
            f"esac",
        )
        monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
        return path

    monkeypatch.delenv("FASTMASK_CUDA_ARCHS", raising=False)
    return install


@pytest.mark.parametrize(
    ("release", "expected"),
    [(CUDA_12_4, "80 86 89 90"), (CUDA_12_8, "80 86 89 90 100 120"), (CUDA_13_0, "80 86 89 90 100 120")],
    ids=["12.4", "12.8", "13.0"],
)
def test_an_older_nvcc_builds_for_the_architectures_that_it_knows(nvcc, release, expected):
    path = nvcc(*release)
    cuda = SETUP["find_cuda"]("g++")
    assert cuda.nvcc[0] == str(path)
    assert cuda.version == release[0]
    assert cuda.archs == expected.split()


def test_an_architecture_asked_for_that_nvcc_lacks_is_named(nvcc, monkeypatch):
    path = nvcc(*CUDA_12_4)
    for asked, wrong in [("90;100", "100"), ("8.0;90", "8.0"), ("sm_90", "sm_90"), ("100a;120", "100a, 120")]:
        monkeypatch.setenv("FASTMASK_CUDA_ARCHS", asked)
        with pytest.raises(SystemExit) as error:
            SETUP["find_cuda"]("g++")
        assert f"names {wrong}; expected some of 50;52" in str(error.value)
        assert str(path) in str(error.value)
    monkeypatch.setenv("FASTMASK_CUDA_ARCHS", "90a;80")
    assert SETUP["find_cuda"]("g++").archs == ["90a", "80"]


@pytest.mark.parametrize("asked", [None, "90"])
def test_the_build_goes_on_without_a_cuda_that_works(nvcc, asked, tmp_path, monkeypatch, capsys):
    if asked is not None:
        monkeypatch.setenv("FASTMASK_CUDA_ARCHS", asked)

    def refused() -> str:
        assert SETUP["find_cuda"]("g++") is None
        message = capsys.readouterr().err
        assert "building without the CUDA part" in message
        return message

    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "gone"))
    assert f"nvcc not found in {tmp_path / 'gone'}/bin (CUDA_HOME)" in refused()
    path = nvcc(*CUDA_13_0, compiles=False)
    assert f"{path} does not work with g++ (unsupported GNU version)" in refused()
    program(path, "exec /nowhere/nvcc")
    assert str(path) in refused()
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "nvcc not found (set CUDA_HOME)" in refused()


def test_no_architecture_at_all_leaves_cuda_out(nvcc, monkeypatch, capsys):
    nvcc("10.2", "30 50 70")
    assert SETUP["find_cuda"]("g++") is None
    assert "knows none of the architectures 80;86" in capsys.readouterr().err
    monkeypatch.setenv("FASTMASK_CUDA_ARCHS", "")
    assert SETUP["find_cuda"]("g++") is None
    assert "FASTMASK_CUDA_ARCHS is empty" in capsys.readouterr().err


def test_nvcc_compiles_host_code_with_cxx(nvcc, monkeypatch):
    nvcc(*CUDA_13_0)
    real = f"{shutil.which('env')} {shutil.which(SETUP['cxx_command']()[1][-1])}"  # env as a launcher
    monkeypatch.setenv("CXX", f"{real} -O0 -g")
    text = SETUP["ninja_file"](Path("ops.so"), Path("native.so"))
    assert re.findall(r"-ccbin (\S+)", text) == [real.split()[-1]] * 2
    assert re.search(rf"command = {re.escape(real)} .*-O3.* -O0 -g -MMD", text)
    assert f"command = {real} -O0 -g -shared" in text


def test_ptx_is_made_for_the_highest_architecture(nvcc, monkeypatch):
    nvcc(*CUDA_13_0)
    for asked, highest in [("90;120;80", "120"), ("100;90", "100"), ("90", "90")]:
        monkeypatch.setenv("FASTMASK_CUDA_ARCHS", asked)
        text = SETUP["ninja_file"](Path("ops.so"), Path("native.so"))
        assert re.findall(r"arch=compute_(\d+),code=compute_(\d+)", text) == [(highest, highest)]
        assert sorted(re.findall(r"arch=compute_\d+,code=sm_(\d+)", text)) == sorted(asked.split(";"))


@pytest.mark.parametrize(("runs", "warned"), [("12.8", True), ("13.2", False), (None, False)])
def test_another_cuda_than_torchs_is_said(nvcc, runs, warned, monkeypatch, capsys):
    from fastmask import _native

    nvcc(*CUDA_13_0)
    monkeypatch.setattr(torch.version, "cuda", runs)
    assert SETUP["find_cuda"]("g++") is not None
    assert ("nvcc is of CUDA 13.0, torch of CUDA 12.8" in capsys.readouterr().err) == warned
    monkeypatch.setattr(_native, "cuda_archs", "80,90")
    monkeypatch.setattr(_native, "cuda_version", "13.0")
    fastmask.show_config()
    config = capsys.readouterr().out
    assert "CUDA architectures: 80,90 (by nvcc of CUDA 13.0)" in config
    assert ("torch uses CUDA 12.8" in config) == warned


@pytest.mark.parametrize(
    ("macros", "said"),
    [
        ("#define __GNUC__ 10", "is GCC 10, expected 11 or later"),
        ("#define __GNUC__ 4\n#define __clang_major__ 13", "is Clang 13, expected 14 or later"),
        ("#define _MSC_VER 1930", "is neither GCC nor Clang"),
    ],
)
def test_a_compiler_too_old_is_named(macros, said, tmp_path, monkeypatch):
    path = program(tmp_path / "old-cxx", f"echo '{macros}'")
    monkeypatch.setenv("CXX", f"{path}")
    with pytest.raises(SystemExit, match=f"{path} {said}"):
        SETUP["cxx_command"]()


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "nowhere++")
    with pytest.raises(SystemExit, match=r"no C\+\+ compiler: .*'nowhere\+\+'; set CXX"):
        SETUP["cxx_command"]()


@pytest.mark.slow
def test_a_path_with_spaces_builds(tmp_path):
    """A small project of the same layout; and what has been built is not compiled again."""
    tree = tmp_path / "a b"
    sources = {
        "fastmask/__init__.py": "",
        "csrc/common/shared.h": "int one();",
        "csrc/common/one.cpp": '#include "common/shared.h"\nint one() { return 1; }',
        "csrc/cpu/level.cpp": "namespace FASTMASK_SIMD { int level() { return 2; } }",
        "csrc/ops/operator.cpp": '#include <torch/csrc/stable/tensor.h>\n#include "common/shared.h"\nint two = one();',
        "csrc/python/native.cpp": "#include <pybind11/pybind11.h>\n"
        '#include "common/shared.h"\n'
        "PYBIND11_MODULE(_native, m) { m.attr(FASTMASK_SIMD_LEVELS) = one(); }",
        "csrc/cuda/kernel.cu": '#include "common/shared.h"\n__global__ void kernel(int* x) { *x = 1; }',
    }
    for name, text in sources.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)
    shutil.copy(ROOT / "setup.py", tree)
    env = {**os.environ, "FASTMASK_CUDA_ARCHS": "80" if shutil.which("nvcc") else ""}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    subprocess.run(command, cwd=tree, env=env, check=True)
    use = (
        "import torch; torch.ops.load_library('fastmask/libfastmask.so')\n"
        "from fastmask import _native; assert 1 in vars(_native).values()"
    )
    subprocess.run([sys.executable, "-c", use], cwd=tree, check=True)
    again = subprocess.run(command, cwd=tree, env=env, check=True, capture_output=True, text=True)
    assert "no work to do" in again.stdout
    (tree / "csrc/common/shared.h").write_text("int one();  // changed")
    again = subprocess.run(command, cwd=tree, env=env, check=True, capture_output=True, text=True)
    assert len(re.findall(r"(?:CXX|NVCC) ", again.stdout)) == (4 if shutil.which("nvcc") else 3)


@pytest.mark.slow
@pytest.mark.parametrize("level", ["neon", "avx512"])
def test_simd_levels_share_no_function_without_optimization(level, tmp_path):
    """The linker keeps one copy of a function that several units define (a weak symbol), and AVX-512 instructions in it
    would run on processors without them. Optimized builds hide that, as they inline most of these functions."""
    units = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
    compile_for(level, tmp_path, "-O0", "-c", *units)
    shared = set()
    for unit in units:
        command = [tool(level, "nm"), "-C", f"{unit.stem}.o"]
        listing = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
        assert f"{level}::" in listing
        weak = re.findall(r"^[0-9a-f]+ [WVu] (.*)$", listing, re.MULTILINE)
        shared |= {f"{unit.name}: {name}" for name in weak if f"fastmask::{level}::" not in name}
    assert not shared


@pytest.mark.parametrize(
    ("machine", "levels"),
    [
        ("x86_64", "portable avx2 avx512"),
        ("aarch64", "portable neon"),
        ("arm64", "portable neon"),
        ("ppc64le", "portable"),
    ],
)
def test_the_machine_decides_which_levels_are_compiled(machine, levels, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.delenv("FASTMASK_PORTABLE", raising=False)
    assert SETUP["simd_levels"]() == levels.split()
    text = SETUP["ninja_file"](Path("ops.so"), Path("native.so"))
    assert re.findall(r"build cpu/assign\.(\w+)\.o", text) == levels.split()
    monkeypatch.setenv("FASTMASK_PORTABLE", "1")
    assert SETUP["simd_levels"]() == ["portable"]


@pytest.mark.slow
def test_what_levels_of_arm_share_compiles(tmp_path):
    """With the choice between the levels, which the kernels' own files do not have."""
    compile_for("neon", tmp_path, "-O0", "-c", *sorted((ROOT / "csrc" / "common").glob("*.cpp")))
