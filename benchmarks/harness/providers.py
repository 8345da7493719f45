"""Helpers that several operations' providers use."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.registry import Provider, Unavailable
from fastmask.ops import OPERATORS
from fastmask.ops._registry import unavailable_reason


def require_backend(operator: str, backend: str, tensor: Tensor) -> None:
    """Raises Unavailable, with fastmask's own reason, where ``backend`` cannot run ``operator`` on such a tensor."""
    if (reason := unavailable_reason(OPERATORS[operator], backend, tensor)) is not None:
        raise Unavailable(reason)
    if backend == "triton" and tensor.device.type == "cpu":
        raise Unavailable("Triton's interpreter has no speed worth measuring")


def fastmask_backend(
    backend: str,
    operator: str,
    tensor: str,
    prepare: Callable[[Any, str], Callable[[], Any]],
    result: Callable[[Any, Any], Any] = lambda raw, inputs: raw,
    suffix: str = "",
) -> Provider:
    """One backend of a function of fastmask.

    Args:
        backend: "native", "triton" or "reference".
        operator: the operator whose kernels the function runs.
        tensor: the path, from the inputs, of a tensor that the operator reads.
        prepare: from the inputs and the backend to the call that is timed.
        result: as for ``Provider``.
        suffix: of the name of a backend with kernels.
    """

    def prepare_if_available(inputs: Any) -> Callable[[], Any]:
        if backend != "reference":
            require_backend(operator, backend, attrgetter(tensor)(inputs))
        return prepare(inputs, backend)

    name = "PyTorch reference" if backend == "reference" else f"fastmask {backend}{suffix}"
    return Provider(name, prepare_if_available, result)


def fastmask_backends(*arguments: Any) -> tuple[Provider, Provider, Provider]:
    """The native, Triton and reference backends of a function; see ``fastmask_backend`` for the arguments."""
    native, triton, reference = (fastmask_backend(backend, *arguments) for backend in ("native", "triton", "reference"))
    return native, triton, reference


def compiled(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """``torch.compile`` for these very shapes, as fast as Inductor makes it without CUDA graphs."""
    if device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise Unavailable("torch.compile needs a C++ compiler")
    torch.compiler.reset()  # so that no case runs into the limit of recompilations
    return torch.compile(function, fullgraph=True, dynamic=False)
