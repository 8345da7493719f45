"""Runs Triton kernels on the CPU, through Triton's interpreter, inside an ordinary test process.

Triton decides whether a kernel is compiled or interpreted where ``@triton.jit`` decorates it, from TRITON_INTERPRET.
That variable must not be set for the whole process: other tests compile the same kernels for GPUs, or want to hear
that there is no kernel for CPU tensors. So the variable's value is changed for a while, our kernels are imported
afresh in that time, and those functions of ``triton.language`` that are kernels themselves (``tl.sum``), or are called
by such (those of ``tl.random``), are replaced by interpreted ones. Afterwards all is as before, also what the
interpreter patches in ``triton.language`` and leaves so. It would patch at each call of a kernel and of a function that
a kernel calls, which takes as long as much of what they compute: here it does so once.

The interpreter leaves ``tl.dot`` to NumPy's BLAS, which sums in an order that depends on the processor, and on where in
a tile a row or column lies. As on a GPU, an element of a product depends here on its own row and column alone, so that
tests may ask for equal bits of what two tilings compute.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
from triton.runtime.jit import JITFunction


def _kernel_modules() -> list[str]:
    return [name for name in sys.modules if name.startswith("fastmask.kernels.")]


def _dot(_: InterpreterBuilder, a: TensorHandle, b: TensorHandle, d: TensorHandle, *precision: Any) -> TensorHandle:
    """a @ b + d, summed from the first column of ``a`` to the last; multiplication and addition round by themselves."""
    dtype = d.data.dtype
    columns, rows = np.moveaxis(a.data.astype(dtype), -1, 0), np.moveaxis(b.data.astype(dtype), -2, 0)
    total = np.zeros_like(d.data)
    for column, row in zip(columns, rows, strict=True):
        total += column[..., :, None] * row[..., None, :]
    return TensorHandle(total + d.data, d.dtype.scalar)


class _Patches:
    """Of ``triton.language``, by the modules of it that a function names; each is made once, and undone at the end."""

    def __init__(self) -> None:
        self.patch, self.scopes = interpreter._patch_lang, {}

    def __call__(self, function: Any) -> _Patches:
        modules = frozenset(x.__name__ for x in function.__globals__.values() if x is tl or x is tl.core)
        if modules not in self.scopes:
            self.scopes[modules] = self.patch(function)
        return self

    def restore(self) -> None:
        """What the interpreter asks for after each kernel."""

    def undo(self) -> None:
        for scope in reversed(self.scopes.values()):
            scope.restore()


@contextmanager
def interpreted_kernels() -> Iterator[None]:
    """``backend="triton"`` runs on CPU tensors here."""
    language = (tl, tl.core, tl.math, tl.standard, tl.tensor, tl.core.tensor_descriptor_base, tl.random)
    patched = (*language, InterpreterBuilder)
    before = [dict(vars(owner)) for owner in patched]
    kernels = {name: sys.modules.pop(name) for name in _kernel_modules()}
    interpret = triton.knobs.runtime.interpret
    triton.knobs.runtime.interpret = True
    patches = _Patches()
    try:
        interpreter._patch_lang = patches
        InterpreterBuilder.create_dot = _dot
        for owner in (tl, tl.random):
            for name, member in list(vars(owner).items()):
                if isinstance(member, JITFunction):
                    setattr(owner, name, triton.jit(member.fn))
        yield
    finally:
        interpreter._patch_lang = patches.patch
        patches.undo()
        triton.knobs.runtime.interpret = interpret
        for owner, members in zip(patched, before, strict=True):
            for name, member in members.items():
                if vars(owner).get(name) is not member:
                    setattr(owner, name, member)
        for name in _kernel_modules():
            del sys.modules[name]
        sys.modules.update(kernels)
