"""The operator library ``fastmask::``: every operator's schema exists always, its kernels where they were built.

Importing this module loads ``libfastmask.so``. Where that fails, the operators still exist, trace and compile;
``EXTENSION_ERROR`` says why they cannot run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

EXTENSION = Path(__file__).parent.parent / "libfastmask.so"


@dataclass(frozen=True)
class Operator:
    """Which kernels an operator has.

    Args:
        name: as in ``torch.ops.fastmask``.
        native: device types that the C++/CUDA extension serves.
        triton: whether a Triton kernel serves CUDA tensors.
        dtypes: of the tensors that the kernels read; arithmetic is float32 whichever it is.
    """

    name: str
    native: tuple[str, ...] = ()
    triton: bool = False
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)


def _load_extension() -> str | None:
    """None, or the reason why the extension could not be loaded."""
    if not EXTENSION.exists():
        return f"{EXTENSION.name} was not built (run pip install --no-build-isolation . in the source tree)"
    try:
        torch.ops.load_library(str(EXTENSION))
    except OSError as error:
        return f"{EXTENSION.name} could not be loaded: {error}"
    return None


EXTENSION_ERROR = _load_extension()


def triton_interpreted() -> bool:
    """Whether Triton kernels run on CPU tensors, through the interpreter (TRITON_INTERPRET=1)."""
    try:
        from triton import knobs
    except ImportError:
        return False
    return bool(knobs.runtime.interpret)


def unavailable_reason(operator: Operator, backend: str, tensor: torch.Tensor) -> str | None:
    """Why ``backend`` cannot run ``operator`` on tensors like this one; None if it can."""
    device = tensor.device.type
    if backend == "native":
        if device not in operator.native:
            return f"{operator.name} has no C++/CUDA kernel for {device} tensors"
        if EXTENSION_ERROR is not None:
            return EXTENSION_ERROR
    elif backend == "triton":
        if not operator.triton:
            return f"{operator.name} has no Triton kernel"
        if device != "cuda" and not triton_interpreted():
            return f"Triton kernels run on CUDA tensors, got a {device} tensor"
    if backend != "reference" and tensor.dtype not in operator.dtypes:
        return f"the kernels of {operator.name} do not read {str(tensor.dtype).removeprefix('torch.')}"
    return None


SIMD_LEVELS = ("portable", "avx2", "avx512")

torch.library.define("fastmask::_set_simd_level", "(int level) -> int")


def set_simd_level(level: str) -> str:
    """Lowers the SIMD level of the CPU kernels, for tests; "avx512" restores the processor's best.

    Returns the level now in use: one that the processor lacks becomes the best that it has.
    """
    return SIMD_LEVELS[torch.ops.fastmask._set_simd_level(SIMD_LEVELS.index(level))]
