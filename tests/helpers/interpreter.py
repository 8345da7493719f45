"""Triton's interpreter, made faster, and independent of the processor.

``tests/conftest.py`` sets TRITON_INTERPRET=1 where there is no GPU and no ``--compiled``, when Triton is imported: it
decides whether a kernel is compiled or interpreted where ``@triton.jit`` decorates it.

For each call of a kernel, and of a function that a kernel calls, the interpreter patches ``triton.language``; for each
operation it finds out anew what becomes of the operands, and builds the types of the result. That takes many times as
long as the operation itself. Here each is done once.

The interpreter leaves ``tl.dot`` to NumPy's BLAS, which sums in an order that depends on the processor, and on where in
a tile a row or column lies. As on a GPU, an element of a product depends here on its own row and column alone, so that
tests may ask for equal bits of what two tilings compute. Before Triton 3.8 it also lets NaN pass through ``tl.maximum``
and ``tl.minimum``, which on a GPU give the number.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def _dot(_: InterpreterBuilder, a: TensorHandle, b: TensorHandle, d: TensorHandle, *precision: Any) -> TensorHandle:
    """a @ b + d, summed from the first column of ``a`` to the last; multiplication and addition round by themselves."""
    dtype = d.data.dtype
    columns, rows = np.moveaxis(a.data.astype(dtype), -1, 0), np.moveaxis(b.data.astype(dtype), -2, 0)
    total = np.zeros_like(d.data)
    for column, row in zip(columns, rows, strict=True):
        total += column[..., :, None] * row[..., None, :]
    return TensorHandle(total + d.data, d.dtype.scalar)


class _Patches:
    """Patches ``triton.language`` once for each module of kernels, and leaves it so."""

    def __init__(self) -> None:
        self.patch, self.done = interpreter._patch_lang, set()

    def __call__(self, function: Any) -> _Patches:
        if function.__module__ not in self.done:
            self.patch(function)
            # Triton 3.6 calls int() on an array of one element and one dimension, which NumPy 2.4 refuses.
            tl.tensor.__index__ = lambda tensor: int(tensor.handle.data.item())
            self.done.add(function.__module__)
        return self

    def restore(self) -> None:
        """The interpreter calls this after each kernel."""


def _patch_attr(owner: Any, name: str, builtin: Any, _: InterpreterBuilder, scope: Any) -> None:
    """A function of ``triton.language`` always has the interpreter's semantic."""
    function = getattr(builtin, "__wrapped__", builtin)

    def interpreted(*arguments: Any, _semantic: Any = None, **named: Any) -> Any:
        return function(*arguments, _semantic=interpreter.interpreter_semantic, **named)

    scope.set_attr(owner, name, interpreted)


def _intern_block_types() -> None:
    """Equal block types are one object."""
    initialize, types = tl.block_type.__init__, {}

    def __new__(cls: type[tl.block_type], element_ty: tl.dtype, shape: Any) -> tl.block_type:
        key = (element_ty, *[getattr(size, "value", size) for size in shape])
        if key not in types:
            made = object.__new__(cls)
            initialize(made, element_ty, shape)
            types[key] = made
        return types[key]

    tl.block_type.__new__, tl.block_type.__init__ = __new__, lambda *_: None
    tl.block_type.__hash__, tl.pointer_type.__hash__ = object.__hash__, lambda self: hash(self.name)


def _make_tensors_by_type() -> None:
    """All tensors of one type share what follows from it."""
    initialize = tl.tensor.__init__

    def __init__(self: tl.tensor, handle: Any, type: tl.dtype) -> None:
        if "_of_tensors" not in vars(type):
            initialize(self, handle, type)
            type._of_tensors = {name: value for name, value in vars(self).items() if name != "handle"}
        vars(self).update(vars(type)["_of_tensors"])
        self.handle = handle

    tl.tensor.__init__ = __init__


def _leave_equal_shapes() -> None:
    """Tensors of equal shapes are not broadcast."""
    broadcast = TritonSemantic.broadcast_impl_value

    def broadcast_impl_value(self: Any, lhs: Any, rhs: Any) -> tuple[Any, Any]:
        if lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape.values == rhs.type.shape.values:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    TritonSemantic.broadcast_impl_value = broadcast_impl_value


def _check_operands_once() -> None:
    """What becomes of two operands follows from their types, and is found out once; a number becomes a tensor once.

    Operands of different shapes keep their data, which NumPy broadcasts.
    """
    check, types, constants = TritonSemantic.binary_op_type_checking_impl, {}, {}

    def kind(operand: Any) -> Any:
        return operand.type if isinstance(operand, tl.tensor) else (type(operand), repr(operand))

    def converted(semantic: Any, operand: tl.tensor, to: tl.dtype) -> tl.tensor:
        if operand.type is to:
            return operand
        if operand.type.scalar is not to.scalar:
            operand = semantic.cast(operand, to.scalar)
        return operand if operand.type is to else tl.tensor(operand.handle, to)

    def binary_op_type_checking_impl(self: Any, lhs: Any, rhs: Any, *options: Any) -> tuple[Any, Any]:
        key = (kind(lhs), kind(rhs), options)
        if key not in types:
            operands = check(self, lhs, rhs, *options)
            types[key] = tuple(operand.type for operand in operands)
            for side, operand in enumerate((lhs, rhs)):
                if not isinstance(operand, tl.tensor):
                    constants[key, side] = operands[side]
                    operands[side].handle.data.flags.writeable = False
        first, second = types[key]
        return (
            converted(self, lhs, first) if isinstance(lhs, tl.tensor) else constants[key, 0],
            converted(self, rhs, second) if isinstance(rhs, tl.tensor) else constants[key, 1],
        )

    TritonSemantic.binary_op_type_checking_impl = binary_op_type_checking_impl


def _identical_or(equal: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    return lambda one, other: one is other or equal(one, other)


@functools.cache
def improve() -> None:
    """Changes the interpreter of this process as the module's docstring says."""
    interpreter._patch_lang, interpreter._patch_attr = _Patches(), _patch_attr
    interpreter._get_np_dtype = functools.cache(interpreter._get_np_dtype)
    TritonSemantic.computation_type_impl = functools.cache(TritonSemantic.computation_type_impl)
    InterpreterBuilder.create_dot = _dot
    InterpreterBuilder.create_maxnumf = lambda self, one, other: self.binary_op(one, other, np.fmax)
    InterpreterBuilder.create_minnumf = lambda self, one, other: self.binary_op(one, other, np.fmin)
    _intern_block_types()
    _make_tensors_by_type()
    _leave_equal_shapes()
    _check_operands_once()
    unwrap, plain = tl.core._unwrap_if_constexpr, (tl.tensor, tl.block_type, tl.dtype, int, type(None))
    tl.core._unwrap_if_constexpr = lambda x: x if type(x) in plain else unwrap(x)
    tl.dtype.__eq__ = _identical_or(tl.dtype.__eq__)
    # Without debug=True the interpreter computes whether integers overflow, and asserts nothing.
    TritonSemantic.binary_op_sanitize_overflow_impl = lambda *_: None
