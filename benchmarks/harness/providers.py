"""Helpers that several operations' providers use."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.registry import Unavailable
from fastmask.ops import OPERATORS
from fastmask.ops._registry import unavailable_reason


def require_backend(operator: str, backend: str, tensor: Tensor) -> None:
    """Raises Unavailable, with fastmask's own reason, where ``backend`` cannot run ``operator`` on such a tensor."""
    if (reason := unavailable_reason(OPERATORS[operator], backend, tensor)) is not None:
        raise Unavailable(reason)
    if backend == "triton" and tensor.device.type == "cpu":
        raise Unavailable("Triton's interpreter has no speed worth measuring")


def compiled(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """``torch.compile`` for these very shapes, as fast as Inductor makes it without CUDA graphs."""
    if device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise Unavailable("torch.compile needs a C++ compiler")
    torch.compiler.reset()  # so that no case runs into the limit of recompilations
    return torch.compile(function, fullgraph=True, dynamic=False)
