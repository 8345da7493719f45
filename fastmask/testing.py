"""Helpers for tests of fastmask's operators: the error budget, and running the kernels at other SIMD levels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmask.ops._registry import EXTENSION_ERROR, SIMD_LEVELS, set_simd_level

ERROR_FACTOR = 2.0

# Errors that the PTX manual allows in addition to rounding: ex2, rcp and div.full may be off by two units in the last
# place, lg2 by 2^-22 (absolute, between 1/2 and 2). Tensor cores add products in at least single precision; the manual
# leaves their order and rounding open, so that each addition may truncate.
SPECIAL_FUNCTION_ERROR = 2.0**-22
TENSOR_CORE_ERROR = 2.0**-23

_as_on_gpu = False


@dataclass(frozen=True)
class GpuError:
    """The error that a GPU's special functions and tensor cores may add to a result.

    Args:
        functions: how many errors of special functions a term of the result contains, to first order.
        products: how many products tensor cores add up in one sum.
        magnitude: by how much the terms exceed the largest result, if they cancel.
    """

    functions: float = 0.0
    products: float = 0.0
    magnitude: float = 0.0

    def of(self, exact: Tensor) -> float:
        """The absolute error allowed for the result ``exact``."""
        relative = self.functions * SPECIAL_FUNCTION_ERROR + self.products * TENSOR_CORE_ERROR
        return relative * (exact.abs().max().item() + self.magnitude)


@contextmanager
def gpu_budget() -> Iterator[None]:
    """Gives results on CPU tensors the budget of GPU runs, for an emulator that rounds as a GPU may."""
    global _as_on_gpu
    before, _as_on_gpu = _as_on_gpu, True
    try:
        yield
    finally:
        _as_on_gpu = before


def error_budget(
    dtype: torch.dtype, same_dtype: Tensor, exact: Tensor, gpu: GpuError | None = None, *, on_gpu: bool
) -> tuple[float, str]:
    """How far a result in ``dtype`` may be from ``exact``, as a number and as text; see ``assert_within_budget``."""
    reference = (same_dtype.double() - exact).abs().max().item()
    rounding = 2 * torch.finfo(dtype).eps * exact.abs().max().item()
    budget, text = ERROR_FACTOR * reference + rounding, f"{ERROR_FACTOR} x {reference:.3g} (reference) + {rounding:.3g}"
    text += " (rounding)"
    if gpu is not None and (on_gpu or _as_on_gpu):
        error = gpu.of(exact)
        return budget + error, f"{text} + {error:.3g} (GPU)"
    return budget, text


def assert_within_budget(
    actual: Tensor, same_dtype: Tensor, exact: Tensor, *, name: str = "result", gpu: GpuError | None = None
) -> None:
    """Asserts that ``actual`` is at most twice as far from ``exact`` as the reference in the kernel's dtype is.

    The budget also covers the rounding of the result: half a unit in the last place of the largest magnitude, for each
    of a handful of final operations. Elements that are not finite must be equal in ``actual`` and ``exact``.

    Args:
        actual: the kernel's result.
        same_dtype: the PyTorch reference's result, computed in the dtype that the kernel computes in.
        exact: the reference's result in float64.
        gpu: an additional error allowed if a GPU, or an emulator of one, computed ``actual``.
    """
    assert actual.shape == exact.shape, f"{name} has shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    on_cpu = actual.detach().double().cpu()
    same_dtype, exact = same_dtype.detach().cpu(), exact.detach().cpu()
    finite = exact.isfinite()
    torch.testing.assert_close(on_cpu[~finite], exact[~finite], equal_nan=True, rtol=0, atol=0)
    if not finite.any():
        return
    error = (on_cpu - exact)[finite].abs().max().item()
    budget, terms = error_budget(actual.dtype, same_dtype[finite], exact[finite], gpu, on_gpu=actual.is_cuda)
    assert error <= budget, f"{name} is off by {error:.3g}; the budget is {terms}"


_best_level = SIMD_LEVELS[-1]


def cap_simd_level(level: str) -> None:
    """Caps the SIMD level of this process, as on a processor without higher levels."""
    global _best_level
    _best_level = set_simd_level(level)


def simd_levels() -> list[str]:
    """The SIMD levels of the CPU kernels that this processor can run, lowest first."""
    if EXTENSION_ERROR is not None:
        return []
    levels = []
    for level in SIMD_LEVELS:
        with simd_level(level) as used:
            if used == level:
                levels.append(level)
    return levels


@contextmanager
def simd_level(level: str) -> Iterator[str]:
    """Runs the CPU kernels at a lower SIMD level; yields the level in use."""
    try:
        yield set_simd_level(min(level, _best_level, key=SIMD_LEVELS.index))
    finally:
        set_simd_level(_best_level)
