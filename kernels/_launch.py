"""Launches of Triton kernels, planned once for the sizes of a call.

Triton's launcher takes 11 to 34 us of the host's time, which grow with the number of arguments: it binds them, derives
from each one what the kernel is specialized for, and looks for a kernel compiled for that. All of these but the
pointers follow from the shapes, strides and options of an operator's call. So an operator plans its launches in a
function with ``@cached_plan``, and passes the tensors when it launches, which takes 6 to 9 us.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import triton
from torch import Tensor
from triton.compiler import CompiledKernel

# A plan takes some kilobytes of the host's memory, and none of the device's.
cached_plan = lru_cache(maxsize=512)


def kernel(function: Callable[..., None]) -> Kernel:
    """A Triton kernel that is compiled once for all sizes.

    By default Triton turns an integer argument that is 1 into a constant, and compiles separate kernels for multiples
    of 16 and for other numbers: dozens of kernels over the images of a data set. What the compiler must know of a size
    is a constexpr instead; see ``unit``. Sizes and strides are not passed as tuples, as Triton always specializes the
    integers in those.
    """
    return Kernel(function)


class Kernel:
    """A Triton kernel whose pointers are the arguments that end in ``_ptr``. ``compiled`` holds what Triton has made of
    it for a device, constants and kinds of the other arguments."""

    def __init__(self, function: Callable[..., None]) -> None:
        parameters = inspect.signature(function).parameters
        self.names = list(parameters)
        self.pointers = [(i, name) for i, name in enumerate(parameters) if name.endswith("_ptr")]
        self.sizes = [
            name
            for name, parameter in parameters.items()
            if not name.endswith("_ptr") and "constexpr" not in str(parameter.annotation)
        ]
        self.jit = triton.jit(function, do_not_specialize=self.sizes)
        self.compiled: dict[tuple[Any, ...], CompiledKernel] = {}

    def plan(self, grid: tuple[int, ...], **arguments: Any) -> Launch:
        """A launch with all arguments, and Triton's options, except the tensors."""
        return Launch(self, grid, arguments)


class Launch:
    """A launch on one device, to be called with its tensors by name; None for those that the kernel does not read.

    Tensors differ in kind by their dtypes and alignments, which are all that Triton specializes pointers for, and sizes
    by their widths. The first call with arguments of some kinds goes through Triton, later ones through the launcher of
    the kernel that it has compiled. Those do not see that a setting of Triton, such as debugging, has changed since.
    """

    def __init__(self, kernel: Kernel, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        self.kernel, self.grid, self.arguments = kernel, grid, arguments
        self.values = [arguments.get(name) for name in kernel.names]
        self.launchers: dict[tuple[Any, ...], Callable[..., None]] = {}

    def __call__(self, **tensors: Tensor | None) -> None:
        values = self.values.copy()
        kinds: list[Any] = []
        for i, name in self.kernel.pointers:
            tensor = values[i] = tensors[name]
            if tensor is None:
                kinds.append(None)
            else:
                kinds.append(tensor.dtype if tensor.data_ptr() % 16 == 0 else (tensor.dtype,))
        launcher = self.launchers.get(tuple(kinds))
        if launcher is None:
            self.launch_first(values, tuple(kinds), tensors)
        else:
            launcher(*values)

    def launch_first(self, values: list[Any], kinds: tuple[Any, ...], tensors: dict[str, Tensor | None]) -> None:
        """Launches with tensors of new kinds, and keeps a launcher for them."""
        constants = (size_kind(x) if name in self.kernel.sizes else x for name, x in self.arguments.items())
        device = next(x.device for x in tensors.values() if x is not None)
        key = (device, kinds, *zip(self.arguments, constants, strict=True))
        compiled = self.kernel.compiled.get(key)
        if compiled is None:
            compiled = self.kernel.jit.run(grid=self.grid, warmup=False, **tensors, **self.arguments)
            if not isinstance(compiled, CompiledKernel):  # as in the interpreter
                return
            self.kernel.compiled[key] = compiled
        else:
            compiled[(*self.grid, 1, 1)[:3]](*values)
        self.launchers[kinds] = compiled[(*self.grid, 1, 1)[:3]]


def size_kind(size: float | None) -> tuple[type, int]:
    """What Triton chooses a type by: integers have 32 or 64 bits, and the largest no sign."""
    if not isinstance(size, int):
        return type(size), 0
    return type(size), sum(size >= 1 << bits or size < -1 << bits for bits in (31, 63))
