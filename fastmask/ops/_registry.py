"""The operator library ``fastmask::``, and the choice of the backend that runs a call."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastmask.ops._extension import EXTENSION, EXTENSION_ERROR, add_op_namespace_prefix, ops

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
BACKENDS = ("auto", "reference", "native", "triton")
_LIBRARY = torch.library.Library(add_op_namespace_prefix("").rstrip(":"), "FRAGMENT")
MIN_CAPABILITY = (8, 0)  # tensor cores for bfloat16, asynchronous copies, warp reductions


@dataclass(frozen=True)
class Gradient:
    """How an operator is differentiated with respect to its first arguments.

    Args:
        operator: the backward operator, which returns the gradients of these arguments.
        save: called with the context of ``torch.autograd.Function``, the inputs and the outputs of the forward pass.
        arguments: builds the arguments of ``operator`` from the context and the gradients of the forward outputs.
    """

    operator: Operator
    save: Callable[[Any, tuple[Any, ...], Any], None]
    arguments: Callable[..., tuple[Any, ...]]


@dataclass(frozen=True, eq=False)
class Operator:
    """Registers ``fastmask::name`` and its kernels; a call runs them.

    Args:
        name: the operator's name in the namespace ``fastmask``.
        schema: its arguments and results, in the syntax of ``torch.library``.
        fake: its fake kernel, which determines shapes, strides and dtypes of the results.
        native: device types that the C++/CUDA extension serves.
        triton: the module of ``fastmask.kernels`` whose function ``name`` launches Triton kernels for CUDA tensors.
        dtypes: the tensor dtypes that the kernels read.
        gradient: its gradient; None if it is not differentiable.
    """

    name: str
    schema: str
    fake: Callable[..., Any]
    native: tuple[str, ...] = ()
    triton: str | None = None
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    gradient: Gradient | None = None

    def __post_init__(self) -> None:
        name = add_op_namespace_prefix(self.name)
        torch.library.define(name, self.schema)
        torch.library.register_fake(name, self.fake)
        if self.gradient is not None:
            dispatch = partial(self._dispatch_with_gradient, self.gradient)
            _LIBRARY.impl(self.name, dispatch, "Autograd", with_keyset=True)
        if self.triton is not None:
            torch.library.impl(name, "cuda", self.launch_on_tensor_device)

    @cached_property
    def overload(self) -> torch._ops.OpOverload:
        """What the dispatcher runs."""
        return getattr(ops, self.name).default

    def __call__(self, backend: str, *arguments: Any) -> Any:
        """Runs the operator on ``backend``, any but the reference.

        The dispatcher runs C++ for CPU tensors, so Triton kernels for CPU tensors, which run in Triton's interpreter,
        are called directly.
        """
        if backend != "triton" or arguments[0].device.type != "cpu":
            return getattr(ops, self.name)(*arguments)
        if self.gradient is None:
            return self.launch(*arguments)
        return _Differentiated.apply(self.gradient, self.launch, self.gradient.operator.launch, *arguments)

    def launch(self, *arguments: Any) -> Any:
        """Launches the Triton kernels on the current device."""
        return getattr(_kernels(self.triton), self.name)(*arguments)

    def launch_on_tensor_device(self, *arguments: Any) -> Any:
        """Launches the Triton kernels on the tensors' device, which PyTorch's dispatcher does not make current."""
        device = next(x.device for x in arguments if isinstance(x, Tensor))
        if device.index == torch.cuda.current_device():
            return self.launch(*arguments)
        with torch.cuda.device(device):
            return self.launch(*arguments)

    def _dispatch_with_gradient(self, gradient: Gradient, keys: torch._C.DispatchKeySet, *arguments: Any) -> Any:
        """The dispatcher's kernel for autograd. That of ``torch.library.register_autograd`` does the same, but builds
        Python objects of the whole schema in each call, which takes as long as several launches."""

        def forward(*arguments: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return self.overload.redispatch(keys & torch._C._after_autograd_keyset, *arguments)

        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return _Differentiated.apply(gradient, forward, gradient.operator.overload, *arguments)
        return forward(*arguments)


class _Differentiated(torch.autograd.Function):
    """Runs an operator and, in backward, its gradient's operator, each by a function of its arguments."""

    @staticmethod
    def forward(
        ctx: Any, gradient: Gradient, forward: Callable[..., Any], backward: Callable[..., Any], *arguments: Any
    ) -> Any:
        output = forward(*arguments)
        ctx.gradient, ctx.run_backward = gradient, backward
        gradient.save(ctx, arguments, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients of the first arguments, followed by None for each of the others."""
        gradients = ctx.run_backward(*ctx.gradient.arguments(ctx, *grads))
        first = (gradients,) if isinstance(gradients, Tensor) else gradients
        return None, None, None, *first, *[None] * (len(ctx.needs_input_grad) - 3 - len(first))


@cache
def _kernels(module: str | None) -> ModuleType:
    """A module of Triton kernels, imported on first use."""
    return importlib.import_module(f"..kernels.{module}", __package__)


def triton_interpreted() -> bool:
    """Whether Triton kernels run on CPU tensors, through the interpreter (TRITON_INTERPRET=1)."""
    try:
        from triton import knobs
    except ImportError:
        return False
    return bool(knobs.runtime.interpret)


def unavailable_reason(operator: Operator, backend: str, tensor: Tensor) -> str | None:
    """Why ``backend`` cannot run ``operator`` on tensors like ``tensor``; None if it can."""
    device = tensor.device.type
    if backend == "native":
        if device not in operator.native:
            return f"{operator.name} has no C++/CUDA kernel for {device} tensors"
        if EXTENSION_ERROR is not None:
            return EXTENSION_ERROR
        if not _registered(operator.name, device):
            return f"{EXTENSION.name} was built without {device.upper()} (nvcc was not found, or CUDA was switched off)"
    elif backend == "triton":
        if operator.triton is None:
            return f"{operator.name} has no Triton kernel"
        if device != "cuda" and not triton_interpreted():
            return f"Triton kernels run on CUDA tensors, got a {device} tensor"
        if not TRITON_INSTALLED:
            return "triton is not installed"
    if backend != "reference":
        if tensor.dtype not in operator.dtypes:
            return f"the kernels of {operator.name} do not support {str(tensor.dtype).removeprefix('torch.')}"
        if device == "cuda":
            return gpu_reason(tensor.device.index)
    return None


def _constant_in_traces(function: Callable[..., Any]) -> Callable[..., Any]:
    """Does the same as torch.compiler.assume_constant_result, without importing torch._dynamo."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]  # PyTorch's own mark
    return function


_found: set[tuple[str, str]] = set()  # asking the dispatcher takes as long as solving a small assignment


@_constant_in_traces
def _registered(name: str, device: str) -> bool:
    """Whether PyTorch's dispatcher has a kernel of this operator for the device type."""
    if (name, device) in _found:
        return True
    if torch._C._dispatch_has_kernel_for_dispatch_key(add_op_namespace_prefix(name), device.upper()):
        _found.add((name, device))
    return (name, device) in _found


@_constant_in_traces
def gpu_reason(index: int | None) -> str | None:
    """Why the kernels cannot run on GPU ``index``; None if they can, or if a call is traced without a GPU."""
    if torch.version.hip is not None:
        return "this is a ROCm build of PyTorch; the kernels are for NVIDIA GPUs"
    if not torch.cuda.is_initialized():
        return None
    capability = torch.cuda.get_device_capability(index)
    if capability < MIN_CAPABILITY:
        has, needed = (".".join(map(str, version)) for version in (capability, MIN_CAPABILITY))
        return f"{torch.cuda.get_device_name(index)} has compute capability {has}; the kernels need {needed} or more"
    return None


_warned: set[str] = set()


def choose_backend(operator: Operator, backend: str, tensor: Tensor) -> str:
    """Resolves ``backend`` for tensors like ``tensor``; a backend given by name never falls back.

    "auto" takes the operator's Triton or C++/CUDA kernel for the device. If that cannot run (the extension or Triton is
    missing, or the GPU is too old or not NVIDIA's), it warns once and takes the reference. If there is no kernel
    (float64, or another device), it takes the reference silently.

    Raises:
        ValueError: an unknown backend.
        RuntimeError: the backend was given by name and cannot run; the message says why.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "auto":
        return auto_backend(operator, tensor)
    if (reason := unavailable_reason(operator, backend, tensor)) is not None:
        raise RuntimeError(f"backend={backend!r} cannot run {operator.name}: {reason}")
    return backend


def auto_backend(operator: Operator, tensor: Tensor) -> str:
    """The backend that ``backend="auto"`` takes."""
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


SIMD_LEVELS = ("portable", "neon", "avx2", "avx512")  # of all processors; the last ones are x86-64's

torch.library.define(add_op_namespace_prefix("_set_simd_level"), "(int level) -> int")


def set_simd_level(level: str) -> str:
    """Caps the SIMD level of the CPU kernels, for tests; "avx512" restores the processor's best.

    Returns the level now in use: the best, up to this one, that the processor has.
    """
    number = SIMD_LEVELS.index(level)
    with suppress(ImportError):
        from fastmask import _native

        _native.set_simd_level(number)  # the module contains its own copy of the kernels
    return SIMD_LEVELS[ops._set_simd_level(number)]
