"""Builds fastmask's two libraries with ninja.

``fastmask/libfastmask.so`` holds the PyTorch operators. It is written against PyTorch's stable C++ interface, so that
one binary serves torch 2.10 and every later version. ``fastmask/_native*.so`` is the pybind11 module for what is no
PyTorch operator. Files in ``csrc/cpu`` are compiled once for each SIMD level; the level is chosen when the library
loads, so a wheel runs on any x86-64 (and, with the portable level alone, on any other processor). With
``FASTMASK_PORTABLE=1`` in the environment the portable level is all there is, for a quick build.

Files in ``csrc/cuda`` are compiled if nvcc is found, kernels for the architectures in the environment variable
``FASTMASK_CUDA_ARCHS`` ("80;86;89;90;100" by default; empty to leave the CUDA part out). They need no GPU and no CUDA
build of PyTorch to compile.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"

TORCH_TARGET_VERSION = "0x020a000000000000"  # torch 2.10, the oldest that the binary runs with
CXX_FLAGS = (
    "-std=c++20 -O3 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -ffp-contract=off -Wall -Wextra"
).split()
SIMD_FLAGS = {
    "portable": [],
    "avx2": "-mavx2 -mfma -mf16c -mtune=haswell".split(),
    "avx512": (
        "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512 -mtune=skylake-avx512"
    ).split(),
}
DEFAULT_CUDA_ARCHS = "80;86;89;90;100"


def simd_levels() -> list[str]:
    everything = platform.machine() in ("x86_64", "AMD64") and not os.environ.get("FASTMASK_PORTABLE")
    return list(SIMD_FLAGS) if everything else ["portable"]


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return str(Path(home, "bin", "nvcc")) if home else shutil.which("nvcc")


def cuda_archs() -> list[str]:
    """The architectures to compile for; none, with a message that says why, if the CUDA part is left out."""
    archs = [arch for arch in os.environ.get("FASTMASK_CUDA_ARCHS", DEFAULT_CUDA_ARCHS).split(";") if arch]
    if not archs:
        print("fastmask: FASTMASK_CUDA_ARCHS is empty: building without the CUDA part", file=sys.stderr)
    elif find_nvcc() is None:
        print(
            "fastmask: nvcc not found (set CUDA_HOME): building without the CUDA part; CPU and Triton kernels work",
            file=sys.stderr,
        )
        return []
    return archs


class NinjaBuild(build_ext):
    """Writes one build.ninja for both libraries and runs it; only what changed is compiled again."""

    def build_extensions(self) -> None:
        # Not build_temp: an editable install puts that into a new folder each time, and would compile everything again.
        build_dir = ROOT / "build" / f"ninja-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        build_dir.mkdir(parents=True, exist_ok=True)
        outputs = {ext.name: Path(self.get_ext_fullpath(ext.name)).resolve() for ext in self.extensions}
        for output in outputs.values():
            output.parent.mkdir(parents=True, exist_ok=True)
        (build_dir / "build.ninja").write_text(ninja_file(outputs["fastmask.libfastmask"], outputs["fastmask._native"]))
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        subprocess.run([sys.executable, "-m", "ninja", "-C", str(build_dir), *jobs], check=True)

    def get_ext_filename(self, fullname: str) -> str:
        # The operator library is no Python module, so its name carries no Python version.
        if fullname.endswith("libfastmask"):
            return str(Path(*fullname.split(".")).with_suffix(".so"))
        return super().get_ext_filename(fullname)


def ninja_file(ops_library: Path, native_module: Path) -> str:
    import pybind11
    from torch.utils.cpp_extension import TORCH_LIB_PATH, include_paths

    cxx = os.environ.get("CXX", "g++")
    cuda_sources = sorted((CSRC / "cuda").glob("*.cu"))
    archs = cuda_archs() if cuda_sources else []
    torch_flags = [f"-isystem{path}" for path in include_paths()] + [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]
    build_info = f'-DFASTMASK_SIMD_LEVELS=\\"{",".join(simd_levels())}\\" -DFASTMASK_CUDA_ARCHS=\\"{",".join(archs)}\\"'
    python_flags = [f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_path('include')}"]

    portable = ["-DFASTMASK_PORTABLE"] if simd_levels() == ["portable"] else []
    edges: list[str] = []

    def compile(rule: str, source: Path, flags: list[str], suffix: str = "") -> str:
        out = f"{source.relative_to(CSRC).with_suffix('')}{suffix}.o"
        edges.append(f"build {out}: {rule} {source}\n  flags = {' '.join(flags)}")
        return out

    common = [compile("cxx", source, []) for source in sorted(CSRC.glob("*.cpp"))]
    for level in simd_levels():
        flags = [*SIMD_FLAGS[level], f"-DFASTMASK_SIMD={level}"]
        common += [compile("cxx", source, flags, f".{level}") for source in sorted((CSRC / "cpu").glob("*.cpp"))]
    objects = [compile("cxx", source, torch_flags) for source in sorted((CSRC / "ops").glob("*.cpp"))]
    module = [compile("cxx", source, [*python_flags, build_info]) for source in sorted((CSRC / "python").glob("*.cpp"))]
    if archs:
        objects += [compile("nvcc", source, [], ".cu") for source in cuda_sources]
        objects += [compile("cxx", source, torch_flags, ".host") for source in sorted((CSRC / "cuda").glob("*.cpp"))]

    rules = [
        "rule cxx\n"
        f"  command = {cxx} -MMD -MF $out.d {' '.join(CXX_FLAGS + portable)} -I{CSRC} $flags -c $in -o $out\n"
        "  depfile = $out.d\n  deps = gcc\n  description = CXX $out",
        f"rule link\n  command = {cxx} -shared $in -o $out $flags\n  description = LINK $out",
    ]
    linker = "link"
    if archs:
        # Fused multiply-adds would round otherwise than the CPU's kernels (-ffp-contract=off), which CUDA's must equal.
        gencode = " ".join(f"-gencode arch=compute_{arch},code=sm_{arch}" for arch in archs)
        gencode += f" -gencode arch=compute_{archs[-1]},code=compute_{archs[-1]}"
        nvcc = find_nvcc()
        rules.append(
            "rule nvcc\n"
            f"  command = {nvcc} -MD -MF $out.d -std=c++20 -O3 -fmad=false --threads 2 "
            f"-Xcompiler -fPIC,-fvisibility=hidden {gencode} -I{CSRC} $flags -c $in -o $out\n"
            "  depfile = $out.d\n  deps = gcc\n  description = NVCC $out"
        )
        rules.append(f"rule link_cuda\n  command = {nvcc} -shared $in -o $out $flags\n  description = LINK $out")
        linker = "link_cuda"
    edges.append(
        f"build {ops_library}: {linker} {' '.join(objects + common)}\n  flags = -L{TORCH_LIB_PATH} -ltorch_cpu -lc10"
    )
    edges.append(f"build {native_module}: link {' '.join(module + common)}\n  flags =")
    return "\n".join([*rules, *edges]) + "\n"


setup(
    packages=[*find_packages(include=["fastmask", "fastmask.*"]), "fastmask.kernels"],
    package_dir={"fastmask.kernels": "kernels"},
    package_data={"fastmask": ["py.typed"], "fastmask.data": ["assets/*"], "fastmask.cli": ["*.safetensors"]},
    ext_modules=[Extension("fastmask.libfastmask", []), Extension("fastmask._native", [])],
    cmdclass={"build_ext": NinjaBuild},
    zip_safe=False,
)
