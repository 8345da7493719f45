"""Which implementation runs a call."""

from __future__ import annotations

import warnings

from torch import Tensor

from fastmask.ops.library import Operator, unavailable_reason

BACKENDS = ("auto", "reference", "native", "triton")

_warned: set[str] = set()


def choose_backend(operator: Operator, backend: str, tensor: Tensor) -> str:
    """Resolves ``backend`` for tensors like this one; a backend asked for by name never falls back.

    "auto" takes the Triton or C++/CUDA kernel, whichever the operator has for the device. Where that cannot run (the
    extension or Triton is missing, or the GPU is too old or not NVIDIA's), it warns once and takes the reference; it
    takes the reference silently for what no kernel is meant for (float64, or a device without kernels).

    Raises:
        ValueError: an unknown backend.
        RuntimeError: the backend was asked for by name and cannot run; the message says why.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "auto":
        return automatic(operator, tensor)
    if (reason := unavailable_reason(operator, backend, tensor)) is not None:
        raise RuntimeError(f"backend={backend!r} cannot run {operator.name}: {reason}")
    return backend


def automatic(operator: Operator, tensor: Tensor) -> str:
    """What ``backend="auto"`` takes."""
    device = tensor.device.type
    if tensor.dtype not in operator.dtypes:
        return "reference"
    if device == "cuda" and operator.triton is not None:
        backend = "triton"
    elif device in operator.native:
        backend = "native"
    else:
        return "reference"
    reason = unavailable_reason(operator, backend, tensor)
    if reason is None:
        return backend
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(f"fastmask falls back to the PyTorch reference: {reason}", RuntimeWarning, stacklevel=4)
    return "reference"
