"""What tests of fastmask's operators share: the error budget, and how to run the kernels in other ways."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmask.ops._registry import EXTENSION_ERROR, SIMD_LEVELS, set_simd_level

ERROR_FACTOR = 2.0

# The PTX manual allows a GPU beside rounding each operation: ex2, rcp and div.full are off by two units in the last
# place at most, lg2 by 2^-22 (absolute between 1/2 and 2). Tensor cores add products with at least single precision,
# in an order and with a rounding that the manual leaves open, so that each addition may cut off.
SPECIAL_FUNCTION_ERROR = 2.0**-22
TENSOR_CORE_ERROR = 2.0**-23

_as_on_gpu = False


@dataclass(frozen=True)
class GpuError:
    """How far a GPU's special functions and tensor cores may take a result from what exact ones would give.

    Args:
        functions: errors of special functions that a term of the result has, to first order.
        products: that tensor cores add up before a sum leaves them.
        magnitude: of the terms, where they cancel, beyond the largest result.
    """

    functions: float = 0.0
    products: float = 0.0
    magnitude: float = 0.0

    def of(self, exact: Tensor) -> float:
        """The error of a result, absolute."""
        relative = self.functions * SPECIAL_FUNCTION_ERROR + self.products * TENSOR_CORE_ERROR
        return relative * (exact.abs().max().item() + self.magnitude)


@contextmanager
def gpu_budget() -> Iterator[None]:
    """Results on CPU tensors have the budget of GPU runs here: an emulator rounds as they may."""
    global _as_on_gpu
    before, _as_on_gpu = _as_on_gpu, True
    try:
        yield
    finally:
        _as_on_gpu = before


def error_budget(
    dtype: torch.dtype, same_dtype: Tensor, exact: Tensor, gpu: GpuError | None = None, *, on_gpu: bool
) -> tuple[float, str]:
    """How far a result in ``dtype`` may be from ``exact``, and what that is made of; see ``assert_within_budget``."""
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
    """Asserts that ``actual`` is at most twice as far from ``exact`` as the reference in the kernel's own dtype is.

    Rounding the result itself is allowed for: half a unit in the last place of the largest magnitude, for each of a
    handful of final operations. Elements that are not finite must be the same in all three.

    Args:
        actual: what the kernel returned.
        same_dtype: the PyTorch reference's result, computed in the dtype that the kernel computes in.
        exact: the reference's result in float64.
        gpu: what is allowed for besides where a GPU, or an emulator of one, computed ``actual``.
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
    """Makes ``level`` the best that this process uses, as on a processor that has none above it."""
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
