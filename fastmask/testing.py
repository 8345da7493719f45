"""What tests of fastmask's operators share: the error budget, and how to run the kernels in other ways."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fastmask.ops.library import EXTENSION_ERROR, SIMD_LEVELS, set_simd_level

ERROR_FACTOR = 2.0


def assert_within_budget(actual: Tensor, same_dtype: Tensor, exact: Tensor, *, name: str = "result") -> None:
    """Asserts that ``actual`` is at most twice as far from ``exact`` as the reference in the kernel's own dtype is.

    Rounding the result itself is allowed for: half a unit in the last place of the largest magnitude, for each of a
    handful of final operations. Elements that are not finite must be the same in all three.

    Args:
        actual: what the kernel returned.
        same_dtype: the PyTorch reference's result, computed in the dtype that the kernel computes in.
        exact: the reference's result in float64.
    """
    assert actual.shape == exact.shape, f"{name} has shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    actual64, same64 = actual.detach().double().cpu(), same_dtype.detach().double().cpu()
    exact = exact.detach().cpu()
    finite = exact.isfinite()
    torch.testing.assert_close(actual64[~finite], exact[~finite], equal_nan=True, rtol=0, atol=0)
    if not finite.any():
        return
    error = (actual64 - exact)[finite].abs().max().item()
    reference_error = (same64 - exact)[finite].abs().max().item()
    rounding = 2 * torch.finfo(actual.dtype).eps * exact[finite].abs().max().item()
    budget = ERROR_FACTOR * reference_error + rounding
    assert error <= budget, (
        f"{name} is off by {error:.3g}; the budget is {ERROR_FACTOR} x {reference_error:.3g} (reference) + "
        f"{rounding:.3g} (rounding)"
    )


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
        yield set_simd_level(level)
    finally:
        set_simd_level(SIMD_LEVELS[-1])
