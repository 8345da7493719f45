"""The error budget that a provider must keep before it is timed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class ErrorBudget:
    """Named tensors are right when their largest error is at most ``error_factor`` times (the reference's + rounding).

    The error is measured against float64, the reference is the eager PyTorch reference in float32 on the same inputs,
    and rounding is one unit in the last place of the largest expected value, in the result's dtype. For the library's
    factor of 2 this is the tests' budget (``fastmask.testing``).

    Args:
        expected: the float64 results.
        reference: the reference's results under the same names.
    """

    def __init__(self, expected: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> None:
        self.expected = expected
        self.reference_errors = {name: _largest_error(reference[name], value) for name, value in expected.items()}
        self.scales = {name: float(value.abs().max()) if value.numel() else 0.0 for name, value in expected.items()}

    def disagreement(self, result: Mapping[str, Tensor], error_factor: float) -> str | None:
        if set(result) != set(self.expected):
            return f"gives {', '.join(sorted(result))}; expected {', '.join(sorted(self.expected))}"
        for name, value in result.items():
            expected = self.expected[name]
            if value.shape != expected.shape:
                return f"{name} has shape {tuple(value.shape)}; expected {tuple(expected.shape)}"
            error = _largest_error(value, expected)
            rounding = torch.finfo(value.dtype).eps * self.scales[name]
            budget = error_factor * (self.reference_errors[name] + rounding)
            if not error <= budget:  # so that NaN fails
                return f"{name} is off by {error:.2e}; the budget is {budget:.2e}"
        return None


def _largest_error(value: Tensor, expected: Tensor) -> float:
    return float((value.detach().double() - expected).abs().max()) if expected.numel() else 0.0
