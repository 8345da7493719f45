"""Builds fastmask's two libraries with ninja.

``fastmask/libfastmask.so`` holds the PyTorch operators. It is written against PyTorch's stable C++ interface, so that
one binary serves torch 2.10 and every later version. ``fastmask/_native*.so`` is the pybind11 module for what is no
PyTorch operator. Files in ``csrc/cpu`` are compiled once for each SIMD level; the level is chosen when the library
loads, so a wheel runs on any x86-64 or 64-bit ARM (and, with the portable level alone, on any other processor). With
``FASTMASK_PORTABLE=1`` in the environment the portable level is all there is, for a quick build.

``CXX`` is the command of the C++ compiler, GCC or Clang ("g++" by default); nvcc compiles its host code with it too. It
may start with a launcher ("ccache g++"), and options in it override those here ("g++ -O0 -g").

Files in ``csrc/cuda`` are compiled if there is an nvcc that works (in ``CUDA_HOME``, otherwise on the path), for the
architectures in ``FASTMASK_CUDA_ARCHS`` (by default those of "80;86;89;90;100;120" that it knows; empty to leave the
CUDA part out). They need no GPU and no CUDA build of PyTorch to compile.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

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
    "neon": ["-DFASTMASK_NEON"],  # all code for 64-bit ARM may use NEON
    "avx2": "-mavx2 -mfma -mf16c -mtune=haswell".split(),
    "avx512": (
        "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512 -mtune=skylake-avx512"
    ).split(),
}
SIMD_LEVELS = {"x86": ["portable", "avx2", "avx512"], "arm": ["portable", "neon"]}
MACHINES = {"x86_64": "x86", "AMD64": "x86", "aarch64": "arm", "arm64": "arm"}
# Fused multiply-adds would round otherwise than the CPU's kernels (-ffp-contract=off), which CUDA's must equal.
NVCC_FLAGS = "-std=c++20 -O3 -fmad=false".split()
DEFAULT_CUDA_ARCHS = ["80", "86", "89", "90", "100", "120"]
OLDEST_COMPILERS = {"Clang": ("__clang_major__", 14), "GCC": ("__GNUC__", 11)}  # Clang defines the other macro too
# GCC leaves instructions in the order of the source, so that a long formula waits for its own results; these options
# interleave the formulas of independent pixels. Clang does so by itself.
KERNEL_FLAGS = {"Clang": [], "GCC": ["-fschedule-insns", "-fsched-pressure"]}


def simd_levels() -> list[str]:
    """Those for which csrc/cpu is compiled, lowest first."""
    portable = os.environ.get("FASTMASK_PORTABLE") or platform.machine() not in MACHINES
    return ["portable"] if portable else SIMD_LEVELS[MACHINES[platform.machine()]]


def note(message: str) -> None:
    print(f"fastmask: {message}", file=sys.stderr)


def output_of(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def cxx_command() -> tuple[str, list[str], list[str]]:
    """The compiler's name, command and options by CXX; ends the build where that runs no compiler, or one too old."""
    command = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    try:
        macros = output_of(*command, "-dM", "-E", "-x", "c++", os.devnull)
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"fastmask: no C++ compiler: {error}; set CXX to GCC or Clang")
    for name, (macro, oldest) in OLDEST_COMPILERS.items():
        if version := re.search(rf"#define {macro} (\d+)", macros):
            if int(version[1]) < oldest:
                sys.exit(f"fastmask: {shlex.join(command)} is {name} {version[1]}, expected {oldest} or later; set CXX")
            options = next((i for i, word in enumerate(command) if word.startswith("-")), len(command))
            return name, command[:options], command[options:]
    sys.exit(f"fastmask: {shlex.join(command)} is neither GCC nor Clang; set CXX")


class Cuda(NamedTuple):
    nvcc: list[str]  # the command
    version: str
    archs: list[str]


def find_cuda(host_compiler: str) -> Cuda | None:
    """None, with a message that says why, where the CUDA part is left out."""

    def leave_out(reason: str) -> None:
        note(f"{reason}: building without the CUDA part; CPU and Triton kernels work")

    asked = os.environ.get("FASTMASK_CUDA_ARCHS")
    archs = DEFAULT_CUDA_ARCHS if asked is None else [arch.strip() for arch in asked.split(";") if arch.strip()]
    if not archs:
        return leave_out("FASTMASK_CUDA_ARCHS is empty")
    home = os.environ.get("CUDA_HOME")
    path = shutil.which("nvcc", path=os.path.join(home, "bin") if home else None)
    if path is None:
        return leave_out(f"nvcc not found in {home}/bin (CUDA_HOME)" if home else "nvcc not found (set CUDA_HOME)")
    nvcc = [path, "-ccbin", host_compiler, "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    try:
        version = re.search(r"release ([\d.]+)|$", output_of(path, "--version"))[1] or "unknown"
        known = re.findall(r"compute_(\d+)", output_of(path, "--list-gpu-arch"))
        output_of(*nvcc, *NVCC_FLAGS, "-E", "-x", "cu", os.devnull)  # refuses a host compiler that it does not know
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        return leave_out(f"{path} does not work with {host_compiler} ({said.strip()})")
    unknown = [arch for arch in archs if re.sub("[af]$", "", arch) not in known]
    if asked is not None and unknown:
        sys.exit(
            f"fastmask: FASTMASK_CUDA_ARCHS names {', '.join(unknown)}; expected some of {';'.join(known)}, which are "
            f"the architectures of {path} (CUDA {version})"
        )
    archs = [arch for arch in archs if arch not in unknown]
    if not archs:
        return leave_out(f"{path} (CUDA {version}) knows none of the architectures {';'.join(DEFAULT_CUDA_ARCHS)}")
    from torch.version import cuda as torch_cuda

    if torch_cuda is not None and torch_cuda.split(".")[0] != version.split(".")[0]:
        note(f"nvcc is of CUDA {version}, torch of CUDA {torch_cuda}: build with one of the same major version")
    return Cuda(nvcc, version, archs)


def gencode(archs: list[str]) -> list[str]:
    """nvcc's options for architectures."""
    # A driver compiles PTX for architectures to come, from the highest one that there is.
    highest = max(archs, key=lambda arch: int(arch.rstrip("af")))
    machine_code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [*machine_code, f"-gencode=arch=compute_{highest},code=compute_{highest}"]


class NinjaBuild(build_ext):
    """Writes one build.ninja for both libraries and runs it; only what changed is compiled again."""

    def build_extensions(self) -> None:
        # Not build_temp: an editable install puts that into a new folder each time, and would compile everything again.
        build_base = ROOT / self.get_finalized_command("build").build_base
        build_dir = build_base / f"ninja-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
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


def ninja_path(path: Path) -> str:
    return re.sub(r"[$ :]", r"$\g<0>", str(path))


def ninja_command(*words: str) -> str:
    return shlex.join(words).replace("$", "$$")


def ninja_file(ops_library: Path, native_module: Path) -> str:
    import pybind11
    from torch.utils.cpp_extension import TORCH_LIB_PATH, include_paths

    compiler, cxx, cxx_options = cxx_command()
    cuda_sources = sorted((CSRC / "cuda").glob("*.cu"))
    cuda = find_cuda(cxx[-1]) if cuda_sources else None
    torch_flags = [f"-isystem{path}" for path in include_paths()] + [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]
    python_flags = [
        f"-isystem{pybind11.get_include()}",
        f"-isystem{sysconfig.get_path('include')}",
        f'-DFASTMASK_SIMD_LEVELS="{",".join(simd_levels())}"',
        f'-DFASTMASK_CUDA_ARCHS="{",".join(cuda.archs if cuda else [])}"',
        f'-DFASTMASK_CUDA_VERSION="{cuda.version if cuda else ""}"',
    ]

    portable = ["-DFASTMASK_PORTABLE"] if simd_levels() == ["portable"] else []
    edges: list[str] = []

    def compile(rule: str, source: Path, flags: list[str], suffix: str = "") -> str:
        out = f"{source.relative_to(CSRC).with_suffix('')}{suffix}.o"
        edges.append(f"build {out}: {rule} {ninja_path(source)}\n  flags = {ninja_command(*flags)}")
        return out

    common = [compile("cxx", source, []) for source in sorted((CSRC / "common").glob("*.cpp"))]
    for level in simd_levels():
        flags = [*SIMD_FLAGS[level], *KERNEL_FLAGS[compiler], f"-DFASTMASK_SIMD={level}"]
        common += [compile("cxx", source, flags, f".{level}") for source in sorted((CSRC / "cpu").glob("*.cpp"))]
    objects = [compile("cxx", source, torch_flags) for source in sorted((CSRC / "ops").glob("*.cpp"))]
    module = [compile("cxx", source, python_flags) for source in sorted((CSRC / "python").glob("*.cpp"))]
    if cuda:
        objects += [compile("nvcc", source, [], ".cu") for source in cuda_sources]
        objects += [compile("cxx", source, torch_flags, ".host") for source in sorted((CSRC / "cuda").glob("*.cpp"))]

    compile_command = ninja_command(*cxx, *CXX_FLAGS, *portable, f"-I{CSRC}", *cxx_options)
    # Python's own symbols come from the process; macOS wants to be told.
    undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    link_command = ninja_command(*cxx, *cxx_options, "-shared", *undefined)
    rules = [
        f"rule cxx\n  command = {compile_command} -MMD -MF $out.d $flags -c $in -o $out\n"
        "  depfile = $out.d\n  deps = gcc\n  description = CXX $out",
        f"rule link\n  command = {link_command} $in -o $out $flags\n  description = LINK $out",
    ]
    linker = "link"
    if cuda:
        flags = [*NVCC_FLAGS, *gencode(cuda.archs), "--threads", "2", f"-I{CSRC}"]
        rules.append(
            "rule nvcc\n"
            f"  command = {ninja_command(*cuda.nvcc, *flags)} -MD -MF $out.d -c $in -o $out\n"
            "  depfile = $out.d\n  deps = gcc\n  description = NVCC $out"
        )
        rules.append(
            f"rule link_cuda\n  command = {ninja_command(*cuda.nvcc)} -shared $in -o $out $flags\n"
            "  description = LINK $out"
        )
        linker = "link_cuda"
    edges.append(
        f"build {ninja_path(ops_library)}: {linker} {' '.join(objects + common)}\n"
        f"  flags = {ninja_command(f'-L{TORCH_LIB_PATH}', '-ltorch_cpu', '-lc10')}"
    )
    edges.append(f"build {ninja_path(native_module)}: link {' '.join(module + common)}\n  flags =")
    return "\n".join([*rules, *edges]) + "\n"


if __name__ == "__main__":
    # The folder kernels/ would hide Hugging Face's package of that name, which setuptools asks for a file to write.
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != ROOT]
    setup(
        packages=[*find_packages(include=["fastmask", "fastmask.*"]), "fastmask.kernels"],
        package_dir={"fastmask.kernels": "kernels"},
        package_data={
            "fastmask": ["py.typed"],
            "fastmask.data": ["assets/*"],
            "fastmask.cli": ["demo_model/*"],
            "fastmask.prediction": ["page.css", "page.js"],
        },
        ext_modules=[Extension("fastmask.libfastmask", []), Extension("fastmask._native", [])],
        cmdclass={"build_ext": NinjaBuild},
        zip_safe=False,
    )
