"""A replacement for SciPy's solver of one assignment problem, for NumPy arrays and tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastmask.ops.assign import assign

if TYPE_CHECKING:
    import numpy as np

try:
    from fastmask._native import linear_sum_assignment as _native
except ImportError:
    _native = None


def linear_sum_assignment(
    cost_matrix: Any, maximize: bool = False
) -> tuple[np.ndarray, np.ndarray] | tuple[Tensor, Tensor]:
    """The row and column indices of an optimal assignment: a faster ``scipy.optimize.linear_sum_assignment``.

    Minimizes the sum of C[i, j] over the matched pairs, to within 1e-12 of the sum of their |C[i, j]| (1e-6 for tensors
    other than float64). A fixed rule breaks ties, not always as SciPy does. See ``fastmask.assign`` for the algorithm
    and for batches.

    Args:
        cost_matrix: ``(N, M)``; a tensor of any real dtype, or an array that NumPy casts to float64 without loss.
        maximize: find the largest total instead.

    Returns:
        Row indices in ascending order and the column of each, ``(min(N, M),)`` int64: arrays, or, for a tensor, tensors
        on its device.

    Raises:
        ValueError: the matrix is not two-dimensional, holds NaN or -inf (with ``maximize``, +inf), or has no complete
            matching without +inf. The values of a tensor on a GPU are not checked, because the host would have to
            wait: pairs that are not finite are taken last.
        TypeError: a dtype that does not cast to float64.
    """
    if isinstance(cost_matrix, Tensor):
        return _of_tensor(cost_matrix, maximize)
    if _native is None:
        from scipy.optimize import linear_sum_assignment as scipy_solver

        return scipy_solver(cost_matrix, maximize)
    return _native(cost_matrix, maximize)


def _of_tensor(cost: Tensor, maximize: bool) -> tuple[Tensor, Tensor]:
    if cost.dim() != 2:
        raise ValueError(f"expected a matrix (2-D tensor), got a {cost.dim()}-D tensor")
    if cost.is_complex():
        raise TypeError(f"cost_matrix must be real, got {cost.dtype}")
    if not cost.is_floating_point():
        cost = cost.double()
    if maximize:
        cost = -cost
    policy = "raise" if cost.device.type == "cpu" else "last"
    num_rows, num_columns = cost.shape
    if num_rows < num_columns:
        return torch.arange(num_rows, device=cost.device), assign(cost.mT, policy=policy)
    rows, columns = assign(cost, policy=policy).sort()
    return rows, columns
