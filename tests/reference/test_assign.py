"""The reference matcher against a search over all matchings."""

from itertools import permutations

import numpy as np
import pytest
import torch

from fastmask.reference import assign


def best_matching(cost):
    """(pairs that are not finite, total of the finite ones) of the best complete matching, by trying them all."""
    if cost.shape[0] < cost.shape[1]:
        cost = cost.T
    candidates = []
    for queries in permutations(range(cost.shape[0]), cost.shape[1]):
        chosen = cost[list(queries), range(cost.shape[1])]
        finite = np.isfinite(chosen)
        candidates.append((int((~finite).sum()), float(chosen[finite].sum())))
    return min(candidates)


def quality(cost, queries):
    """The same two numbers for a result of ``assign``; checks that it is a complete matching."""
    targets = np.flatnonzero(queries >= 0)
    assert len(targets) == min(cost.shape)
    assert len(set(queries[targets])) == len(targets)
    chosen = cost[queries[targets], targets]
    finite = np.isfinite(chosen)
    return int((~finite).sum()), float(chosen[finite].sum())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("num_queries", "num_targets"), [(1, 1), (6, 1), (1, 5), (5, 5), (7, 4), (4, 6), (3, 0)])
def test_total_is_the_least_of_all_matchings(num_queries, num_targets, seed):
    generator = torch.Generator().manual_seed(seed)
    cost = torch.randn(num_queries, num_targets, generator=generator, dtype=torch.float64)
    result = assign(cost)
    assert result.shape == (num_targets,)
    assert result.dtype == torch.int64
    assert quality(cost.numpy(), result.numpy()) == pytest.approx(best_matching(cost.numpy()), rel=1e-12)


@pytest.mark.parametrize("share", [0.2, 0.6, 1.0])
@pytest.mark.parametrize("seed", range(8))
def test_pairs_that_are_not_finite_come_last(seed, share):
    rng = np.random.default_rng(seed)
    num_queries, num_targets = rng.integers(2, 7, size=2)
    cost = rng.normal(size=(num_queries, num_targets)) * 10.0 ** rng.integers(-3, 4)
    wrong = rng.random(cost.shape) < share
    cost[wrong] = rng.choice([np.nan, np.inf, -np.inf], size=wrong.sum())
    cost[0] = np.nan  # a query with broken logits
    count, total = quality(cost, assign(torch.from_numpy(cost)).numpy())
    best_count, best_total = best_matching(cost)
    assert count == best_count
    assert total == pytest.approx(best_total, rel=1e-9, abs=1e-9 * np.abs(cost[np.isfinite(cost)]).max(initial=0))


def test_counts_and_leading_dimensions():
    generator = torch.Generator().manual_seed(0)
    cost = torch.randn(2, 3, 5, 4, generator=generator)
    counts = torch.tensor([4, 0, 2])
    result = assign(cost, counts)
    for layer in range(2):
        for b, count in enumerate(counts.tolist()):
            assert result[layer, b, :count].equal(assign(cost[layer, b, :, :count]))
            assert (result[layer, b, count:] == -1).all()
    assert assign(cost[:, :0], counts[:0]).shape == (2, 0, 4)


def test_half_precision_and_gradients_are_accepted():
    cost = torch.tensor([[1.0, 0.0], [0.0, 3.0]], dtype=torch.bfloat16, requires_grad=True)
    assert assign(cost).tolist() == [1, 0]


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="cost has shape"):
        assign(torch.zeros(3))
    with pytest.raises(ValueError, match=r"counts must lie in 0\.\.2, got 1\.\.3"):
        assign(torch.zeros(2, 4, 2), torch.tensor([1, 3]))
