"""Prints which parts of the extension were built, and which backend each operator takes."""

from __future__ import annotations

import importlib.util

import torch

from fastmask.ops import OPERATORS
from fastmask.ops._registry import EXTENSION_ERROR, auto_backend, unavailable_reason
from fastmask.version import __version__

try:
    from fastmask import _native
except ImportError:
    _native = None  # type: ignore[assignment]


def _cuda(archs: str, version: str) -> str:
    if not archs:
        return "none (built without nvcc or CUDA sources)"
    built = f"{archs} (by nvcc of CUDA {version})"
    runs = torch.version.cuda
    if runs is not None and runs.split(".")[0] != version.split(".")[0]:
        built += f"; torch uses CUDA {runs}: build with nvcc of that major version"
    return built


def show_config() -> None:
    """Prints what was built, the SIMD level in use, and the backend that ``backend="auto"`` takes for each operator on
    each available device, with the reason why a kernel for that device cannot run."""
    lines = [f"fastmask {__version__}, torch {torch.__version__}"]
    if EXTENSION_ERROR is not None:
        lines.append(f"extension: {EXTENSION_ERROR}")
    elif _native is None:
        lines.append("extension: loaded; fastmask._native, which tells how it was built, is not there for this Python")
    else:
        lines.append(f"extension: SIMD {_native.simd_level()} of {_native.simd_levels}, compiler {_native.compiler}")
        lines.append(f"CUDA architectures: {_cuda(_native.cuda_archs, _native.cuda_version)}")
    lines.append(f"triton: {'installed' if importlib.util.find_spec('triton') else 'not installed'}")
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        lines.append(f'backend="auto" on {device}:')
        probe = torch.empty(0, device=device)
        kernels = ("native",) if device == "cpu" else ("native", "triton")
        width = max(map(len, OPERATORS))
        for operator in OPERATORS.values():
            others = [
                f"{backend}: {reason}"
                for backend in kernels
                if (reason := unavailable_reason(operator, backend, probe)) is not None
            ]
            lines.append(f"  {operator.name:<{width}} {auto_backend(operator, probe):<10} {'; '.join(others)}".rstrip())
    print("\n".join(lines))
