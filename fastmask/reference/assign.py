"""The bipartite matching of queries and targets, by SciPy."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fastmask.reference._common import check_shape


def assign(cost: Tensor, counts: Tensor | None = None) -> Tensor:
    """Assigns a query to each target so that the total cost of the pairs is minimal.

    min over injective a of sum_m cost[a(m), m] (MaskFormer, arXiv:2107.06278, section 3.2). With fewer queries than
    targets, the N best pairs are taken and the other targets stay unmatched.

    Pairs whose cost is NaN or infinite (of either sign) are taken last: among the complete matchings with the fewest
    such pairs, the result has the smallest total of finite costs. If such pairs cannot be avoided, finite costs below
    about 1e-14 of the largest one no longer matter.

    Args:
        cost: ``(..., N, M)``, any real dtype; solved in float64.
        counts: broadcastable to ``(...)``, int64: only the first ``counts`` targets of a problem exist; M by default.

    Returns:
        ``(..., M)`` int64 on the device of ``cost``: the query of each target, -1 for unmatched targets and padding.

    Raises:
        ValueError: ``cost`` has fewer than two dimensions, or a count lies outside ``0..M``.
    """
    check_shape("cost", cost, (-1, -1))
    *leading, num_queries, num_targets = cost.shape
    if counts is None:
        counts = torch.tensor(num_targets)
    if counts.numel() > 0 and not 0 <= int(counts.min()) <= int(counts.max()) <= num_targets:
        raise ValueError(f"counts must lie in 0..{num_targets}, got {int(counts.min())}..{int(counts.max())}")
    problem_counts = counts.cpu().expand(leading).reshape(-1).tolist()
    problems = cost.detach().cpu().double().reshape(len(problem_counts), num_queries, num_targets).numpy()
    assignment = np.full((len(problem_counts), num_targets), -1, dtype=np.int64)
    for problem, count, query_of in zip(problems, problem_counts, assignment, strict=True):
        queries, targets = _solve(problem[:, :count])
        query_of[targets] = queries
    return torch.from_numpy(assignment).reshape(*leading, num_targets).to(cost.device)


def _solve(cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    finite = np.isfinite(cost)
    largest = np.abs(cost[finite]).max(initial=0.0)
    # Scaling by a power of two changes no comparison, and sums of costs up to 1 in magnitude cannot overflow.
    scaled = np.ldexp(np.where(finite, cost, 0.0), -np.frexp(largest)[1])
    try:
        return linear_sum_assignment(np.where(finite, scaled, np.inf))
    except ValueError:  # every complete matching holds a pair that is not finite
        # Complete matchings have totals of at most min(N, M) in magnitude, so one such pair outweighs any two of them.
        return linear_sum_assignment(np.where(finite, scaled, 2.0 * min(cost.shape) + 1.0))
