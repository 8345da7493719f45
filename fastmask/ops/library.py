"""The operator library ``fastmask::``: every operator's schema exists always, its kernels where they were built.

Importing this module loads ``libfastmask.so``. Where that fails, the operators still exist, trace and compile;
``extension_error()`` says why they cannot run.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
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


@cache
def extension_error() -> str | None:
    """Loads the extension once; None, or the reason why it could not be loaded."""
    if not EXTENSION.exists():
        return f"{EXTENSION.name} was not built (run pip install --no-build-isolation . in the source tree)"
    try:
        torch.ops.load_library(str(EXTENSION))
    except OSError as error:
        return f"{EXTENSION.name} could not be loaded: {error}"
    return None


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
        if (error := extension_error()) is not None:
            return error
    elif backend == "triton":
        if not operator.triton:
            return f"{operator.name} has no Triton kernel"
        if device != "cuda" and not triton_interpreted():
            return f"Triton kernels run on CUDA tensors, got a {device} tensor"
    if backend != "reference" and tensor.dtype not in operator.dtypes:
        return f"the kernels of {operator.name} do not read {str(tensor.dtype).removeprefix('torch.')}"
    return None


extension_error()
