"""The families of assignment problems that the tests of the matcher share."""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment


def uniform(n, m, rng):
    return rng.random((n, m))


def integers(n, m, rng):
    return rng.integers(0, 10, (n, m)).astype(float)


def signs(n, m, rng):
    return rng.integers(-1, 2, (n, m)).astype(float)


def constant(n, m, rng):
    return np.full((n, m), rng.normal())


def query_bias(n, m, rng):
    """All targets want the same queries."""
    return 10 * rng.random((n, 1)) + rng.random((n, m))


def target_bias(n, m, rng):
    return 10 * rng.random((1, m)) + rng.random((n, m))


def products(n, m, rng):
    return np.outer(np.arange(1, n + 1), np.arange(1, m + 1)) * (-1.0) ** rng.integers(2)


def decades(n, m, rng):
    return 10.0 ** rng.uniform(-30, 30, (n, m))


def denormals(n, m, rng):
    return rng.integers(0, 100, (n, m)) * 2.0**-149


def sentinels(n, m, rng):
    cost = rng.random((n, m))
    cost[rng.random((n, m)) < 0.4] = 1e9
    return cost


def permuted_identity(n, m, rng):
    cost = np.ones((n, m))
    k = min(n, m)
    cost[rng.permutation(n)[:k], rng.permutation(m)[:k]] = 0
    return cost


def early_training(n, m, rng):
    """Queries that all look alike: a bias of each query and target, a little of rank 2, and noise."""
    bias = 0.3 * rng.normal(size=(n, 1)) + rng.normal(size=(1, m))
    return bias + 0.3 * rng.normal(size=(n, 2)) @ rng.normal(size=(2, m)) + 0.02 * rng.normal(size=(n, m))


def late_training(n, m, rng):
    """Each target has found its query."""
    cost = 2 + 0.3 * rng.normal(size=(n, m))
    k = min(n, m)
    cost[rng.permutation(n)[:k], rng.permutation(m)[:k]] -= 3
    return cost


def negative_and_large(n, m, rng):
    return 1e6 * rng.normal(size=(n, m)) - 5e6


def geometric(n, m, rng):
    """Squared distances of points in the plane."""
    points, others = rng.random((n, 1, 2)), rng.random((1, m, 2))
    return ((points - others) ** 2).sum(-1)


FAMILIES = {
    function.__name__: function
    for function in (
        uniform,
        integers,
        signs,
        constant,
        query_bias,
        target_bias,
        products,
        decades,
        denormals,
        sentinels,
        permuted_identity,
        early_training,
        late_training,
        negative_and_large,
        geometric,
    )
}


def make(family: str, n: int, m: int, seed: int, dtype: type = np.float32) -> np.ndarray:
    return FAMILIES[family](n, m, np.random.default_rng(seed)).astype(dtype)


def check_matching(cost: np.ndarray, query_of: np.ndarray, tolerance: float = 1e-6) -> None:
    """``query_of`` is a complete matching, and its total SciPy's within ``tolerance`` of the sum of |cost|."""
    targets = np.flatnonzero(query_of >= 0)
    assert len(targets) == min(cost.shape)
    assert len(set(query_of[targets].tolist())) == len(targets)
    exact = cost.astype(np.float64)
    chosen = exact[query_of[targets], targets]
    best = exact[linear_sum_assignment(exact)]
    assert chosen.sum() <= best.sum() + tolerance * np.abs(best).sum(), (chosen.sum(), best.sum())


def check_duals(cost: np.ndarray, query_of: np.ndarray, u: np.ndarray, v: np.ndarray, tolerance: float = 1e-6) -> None:
    """u and v prove the matching: feasible, right in sign, 0 where unmatched, and the gap within the tolerance."""
    cost = cost.astype(np.float64)
    targets = np.flatnonzero(query_of >= 0)
    queries = query_of[targets]
    magnitude = np.abs(cost[queries, targets]).sum()
    rounding = 1e-12 * (np.abs(cost) + np.abs(u)[:, None] + np.abs(v))
    # The differences between costs round too: by 1e-16 of the largest.
    assert (cost - u[:, None] - v >= -rounding - 1e-15 * np.abs(cost).max(initial=0)).all()
    # With duals of 0 where unmatched, the sum of these is the gap between the total and sum u + sum v.
    slack = cost[queries, targets] - u[queries] - v[targets]
    assert slack.sum() <= tolerance * magnitude + rounding[queries, targets].sum()
    if cost.shape[0] > cost.shape[1]:
        assert (u <= 0).all()
        assert (np.delete(u, queries) == 0).all()
    elif cost.shape[0] < cost.shape[1]:
        assert (v <= 0).all()
        assert (np.delete(v, targets) == 0).all()
