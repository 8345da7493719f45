"""Makes a kernel for Hugging Face's hub of the operators: ``make hub``.

``fastmask-kernels`` holds the C++, CUDA and Triton kernels, compiled ahead of time against PyTorch's stable interface;
``fastmask-kernels-triton`` holds the Triton kernels alone and needs no compilation. Each is written to a folder of
``build/hub`` as Hugging Face's ``kernel-builder`` takes it, which builds what is published, and is then built for this
machine, so that ``kernels.get_local_kernel`` loads it.

A kernel is no installed package: its modules import each other relatively, and its operators have a namespace for each
build, ``torch.ops._fastmask_kernels_cpu_<digest>``, so that several builds, and fastmask itself, share a process.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import platform
import runpy
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.utils.cpp_extension import TORCH_LIB_PATH, include_paths

ROOT = Path(__file__).parents[1]
SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="imported")
NAME = "fastmask-kernels"
# Of fastmask, besides the Triton kernels: what the operators need.
PARTS = ("ops/*.py", "reference/*.py", "functional.py", "mask_term.py", "targets.py", "version.py")
Config = dict[str, dict[str, Any]]  # build.toml: its tables by name
STABLE_ABI = "{}.{}".format(*bytes.fromhex(SETUP["TORCH_TARGET_VERSION"].removeprefix("0x")))

INIT = '''"""Fused operators for mask-classification segmentation; README.md says more."""

from .functional import *
from .mask_term import MaskTerm
from .targets import Targets

__all__ = {names}
'''
EXTENSION = '''"""The extension, which ``_ops`` loads. kernel-builder writes that module, with the build's namespace."""

from pathlib import Path

from .._ops import add_op_namespace_prefix, ops

EXTENSION = Path(ops.name)
EXTENSION_ERROR = {error!r}
'''
BINDING = """// Lets Python import the library, which registers its kernels when it is loaded.
#include <Python.h>

#define MODULE(name)                       \\
  PyMODINIT_FUNC PyInit_##name() {         \\
    static PyModuleDef module;             \\
    module.m_base = PyModuleDef_HEAD_INIT; \\
    module.m_name = #name;                 \\
    return PyModule_Create(&module);       \\
  }
#define EXPANDED_MODULE(name) MODULE(name)
EXPANDED_MODULE(TORCH_EXTENSION_NAME)
"""
FLAKE = """{
  inputs.kernel-builder.url = "github:huggingface/kernels";
  outputs = { self, kernel-builder, ... }: kernel-builder.lib.genKernelFlakeOutputs { inherit self; path = ./.; };
}
"""
# The builder fills in what stands in braces, and publishes the result as README.md.
CARD = """---
library_name: kernels
license: apache-2.0
---

# fastmask

Fused operators for mask-classification segmentation (MaskFormer, Mask2Former, Segmenter): matching cost, assignment,
mask losses, masked attention, and semantic, panoptic and instance inference. CONTENT

```python
import torch
from kernels import get_kernel

fastmask = get_kernel("{{ repo_id }}", version={{ version }})
targets = fastmask.Targets.from_segmentation(torch.randint(0, 5, (2, 64, 64), device="cuda"), num_classes=5)
class_logits = torch.randn(2, 100, 6, device="cuda")
mask_logits = torch.randn(2, 100, 16, 16, device="cuda", requires_grad=True)

cost = fastmask.mask_cost(class_logits, mask_logits, targets)       # (2, 100, M)
assignment = fastmask.assign(cost, targets.counts)                  # (2, M): the query of each target
focal, dice = fastmask.mask_loss(mask_logits, targets, assignment)
labels = fastmask.semantic_inference(class_logits, mask_logits, (64, 64))
```

Functions:
{% for function in functions %}
- `{{ function }}`
{% endfor %}
"""
CONTENT = {
    True: "Kernels in C++ (AVX2, AVX-512, NEON or portable, chosen at run time), CUDA and Triton.",
    False: "Triton kernels for NVIDIA GPUs of compute capability 8.0 or more; `assign` and run lengths run in PyTorch.",
}
OPS = """import torch

{load}
ops = torch.ops.{name}


def add_op_namespace_prefix(op_name: str) -> str:
    return f"{name}::{{op_name}}"
"""


def python_files() -> Iterator[tuple[Path, Path]]:
    """The modules of the operators, and the place of each in the package."""
    for part in PARTS:
        yield from ((path, path.relative_to(ROOT / "fastmask")) for path in (ROOT / "fastmask").glob(part))
    yield from ((path, path.relative_to(ROOT)) for path in (ROOT / "kernels").glob("*.py"))


def with_relative_imports(source: str, place: Path) -> str:
    """``from fastmask.x import y`` becomes ``from ..x import y``, with a dot for each folder of the module's place."""
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "fastmask" for alias in node.names):
            raise ValueError(f"{place}:{node.lineno}: expected `from fastmask... import`, got `import fastmask`")
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "fastmask":
            inside = node.module.removeprefix("fastmask").removeprefix(".")
            start, line = node.col_offset + len("from "), lines[node.lineno - 1]
            assert line.startswith(node.module, start), line
            lines[node.lineno - 1] = line[:start] + "." * len(place.parts) + inside + line[start + len(node.module) :]
    return "".join(lines)


def public_names() -> list[str]:
    """``__all__`` of ``fastmask.functional``, and the classes of its arguments."""
    for node in ast.parse((ROOT / "fastmask" / "functional.py").read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "__all__":
            return sorted([*ast.literal_eval(node.value), "MaskTerm", "Targets"])
    raise ValueError("fastmask/functional.py has no __all__")


def write_package(package: Path, native: bool) -> None:
    """The operators as a Python package without a name."""
    for path, place in python_files():
        (package / place).parent.mkdir(parents=True, exist_ok=True)
        (package / place).write_text(with_relative_imports(path.read_text(), place))
    error = None if native else "this build has the Triton kernels alone"
    (package / "ops" / "_extension.py").write_text(EXTENSION.format(error=error))
    (package / "__init__.py").write_text(INIT.format(names=json.dumps(public_names(), indent=4)))


def write_sources(folder: Path) -> None:
    """C++ and CUDA. kernel-builder compiles each file once, so ``csrc/cpu`` becomes a folder for each SIMD level."""
    csrc = ROOT / "csrc"
    for path in csrc.rglob("*.*"):
        if path.parent != csrc / "python" and (path.parent != csrc / "cpu" or path.suffix == ".h"):
            (folder / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / path.relative_to(ROOT))
    for level in SETUP["simd_levels"]():
        (folder / "csrc" / level).mkdir()
        for path in (csrc / "cpu").glob("*.cpp"):
            text = f"#define FASTMASK_SIMD {level}\n{path.read_text()}"
            (folder / "csrc" / level / path.name).write_text(text)
    (folder / "torch-ext" / "torch_binding.cpp").write_text(BINDING)


def configuration(folder: Path, repo_id: str, native: bool) -> Config:
    """The tables of build.toml, in edition 5 of its format."""
    general = {"name": folder.name, "version": int(version().split(".")[0]), "edition": 5, "license": "Apache-2.0"}
    hub = {"repo-id": repo_id}
    if not native:
        return {"general": {**general, "backends": ["cuda"]}, "general.hub": hub, "torch-noarch": {}}
    backends, levels = ["cpu", "cuda"], SETUP["simd_levels"]()
    flags = SETUP["CXX_FLAGS"] + (["-DFASTMASK_PORTABLE"] if levels == ["portable"] else [])
    files = sorted(str(path.relative_to(folder)) for path in folder.glob("csrc/**/*.*"))
    parts = {part: [name for name in files if name.startswith(f"csrc/{part}/")] for part in (*levels, "cuda")}
    common = [name for name in files if name.split("/")[1] not in parts]
    tables = {
        "general": {**general, "backends": backends},
        "general.hub": hub,
        "torch": {"src": ["torch-ext/torch_binding.cpp", *common], "include": ["csrc"], "cxx-flags": flags},
        "torch.stable-abi": dict.fromkeys(backends, STABLE_ABI),
    }

    def kernel(name: str, backend: str, part: str, cxx_flags: list[str], **more: list[str]) -> None:
        basis = {"backend": backend, "depends": ["torch"], "include": ["csrc"], "src": parts[part]}
        tables[f"kernel.{name}"] = {**basis, "cxx-flags": flags + cxx_flags, **more}

    for backend in backends:
        for level in levels:
            kernel(f"{backend}-{level}", backend, level, SETUP["SIMD_FLAGS"][level] + SETUP["KERNEL_FLAGS"]["GCC"])
    capabilities = [f"{arch[:-1]}.{arch[-1]}" for arch in SETUP["DEFAULT_CUDA_ARCHS"]]
    kernel("assign", "cuda", "cuda", [], **{"cuda-flags": SETUP["NVCC_FLAGS"], "cuda-capabilities": capabilities})
    return tables


def version() -> str:
    return runpy.run_path(str(ROOT / "fastmask" / "version.py"))["__version__"]


def generate(folder: Path, repo_id: str, native: bool) -> Config:
    """Writes what kernel-builder takes to ``folder``, which bears the kernel's name, and returns its configuration."""
    shutil.rmtree(folder, ignore_errors=True)
    write_package(folder / "torch-ext" / folder.name.replace("-", "_"), native)
    if native:
        write_sources(folder)
    config = configuration(folder, repo_id, native)
    tables = (
        "\n".join([f"[{table}]", *(f"{key} = {json.dumps(value, indent=2)}" for key, value in values.items())])
        for table, values in config.items()
    )
    (folder / "build.toml").write_text("\n\n".join(tables) + "\n")
    (folder / "flake.nix").write_text(FLAKE)
    (folder / "CARD.md").write_text(CARD.replace("CONTENT", CONTENT[native]))
    shutil.copy(ROOT / "LICENSE", folder)
    return config


def build(folder: Path, config: Config, backend: str) -> Path:
    """Builds a kernel for this machine, where ``kernels.get_local_kernel(folder)`` finds it; returns its folder."""
    native, package = "torch" in config, folder.name.replace("-", "_")
    cuda = SETUP["find_cuda"](SETUP["cxx_command"]()[1][-1]) if native and backend == "cuda" else None
    if native and cuda is None:
        backend = "cpu"
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(path.read_bytes())
    name = f"_{package}_{backend}_{digest.hexdigest()[:7]}"
    variant = f"torch-{backend}"
    if native:
        compute = f"cu{cuda.version.replace('.', '')}" if cuda else "cpu"
        machine = f"{platform.machine()}-{platform.system().lower()}"
        variant = f"torch-stable-abi{STABLE_ABI.replace('.', '')}-{compute}-{machine}"
    target = folder / "build" / variant
    shutil.copytree(folder / "torch-ext" / package, target)
    if native:
        compile_extension(folder, config, backend, cuda, name, target / f"{name}.abi3.so")
    (target / "_ops.py").write_text(OPS.format(name=name, load=f"from . import {name}\n" if native else ""))
    metadata = {key: config["general"][key] for key in ("name", "version", "license")}
    metadata |= {"id": name, "python-depends": [], "backend": {"type": backend}}
    (target / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return target


def compile_extension(folder: Path, config: Config, backend: str, cuda: Any, name: str, library: Path) -> None:
    """Compiles and links the sources that build.toml lists for a backend, as kernel-builder does."""
    _, cxx, options = SETUP["cxx_command"]()
    defines = [f"-DTORCH_EXTENSION_NAME={name}", f"-DTORCH_TARGET_VERSION={SETUP['TORCH_TARGET_VERSION']}"]
    includes = [f"-isystem{path}" for path in (*include_paths(), sysconfig.get_path("include"))]
    objects = folder.parent / f"{folder.name}-objects"

    def compile(source: str, table: dict[str, Any]) -> Path:
        out = objects / f"{source}.o"
        out.parent.mkdir(parents=True, exist_ok=True)
        compiler = [*cxx, *table["cxx-flags"], *includes, *options]
        if source.endswith(".cu"):
            compiler = [*cuda.nvcc, *table["cuda-flags"], *SETUP["gencode"](cuda.archs)]
        subprocess.run([*compiler, *defines, f"-I{folder / 'csrc'}", "-c", folder / source, "-o", out], check=True)
        return out

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        compiled = [
            pool.submit(compile, source, table)
            for table in config.values()
            for source in table.get("src", [])
            if source.endswith((".cpp", ".cu")) and table.get("backend", backend) == backend
        ]
    linker = cuda.nvcc if cuda else [*cxx, *options]
    link = ["-shared", *(task.result() for task in compiled), "-o", library]
    subprocess.run([*linker, *link, f"-L{TORCH_LIB_PATH}", "-ltorch_cpu", "-lc10"], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument(
        "--repo-id", default=f"fastmask/{NAME}", help="where the kernel is to be published, as OWNER/NAME"
    )
    parser.add_argument("--no-build", action="store_true", help="write what kernel-builder takes, and no more")
    arguments = parser.parse_args()
    for native in (True, False):
        folder = ROOT / "build" / "hub" / (NAME if native else f"{NAME}-triton")
        config = generate(folder, arguments.repo_id if native else f"{arguments.repo_id}-triton", native)
        print(folder.relative_to(ROOT))
        if not arguments.no_build:
            print(build(folder, config, "cuda" if torch.version.cuda or not native else "cpu").relative_to(ROOT))


if __name__ == "__main__":
    main()
