"""The matcher against SciPy, its own duals, and itself at every SIMD level and thread count."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fastmask import reference
from fastmask.functional import assign
from fastmask.testing import simd_level, simd_levels
from tests.helpers.assign_problems import FAMILIES, check_duals, check_matching, make

TOLERANCES = {np.float32: 1e-6, np.float64: 1e-12}
# One side of one lane, a vector, a vector and a bit; square, wide and tall.
SHAPES = [(1, 1), (1, 7), (7, 1), (16, 16), (17, 33), (33, 17), (100, 20), (64, 64), (130, 129), (129, 130)]
# NaN and the infinities, by how many of the pairs they are.
BROKEN = [np.nan, np.inf, -np.inf]


def solve(cost, **options):
    return assign(torch.from_numpy(cost), **options)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_solved_and_proved(family, dtype):
    for seed, shape in enumerate(SHAPES):
        cost = make(family, *shape, seed, dtype)
        query_of, (u, v), status = solve(cost, return_duals=True, return_status=True)
        check_matching(cost, query_of.numpy(), TOLERANCES[dtype])
        check_duals(cost, query_of.numpy(), u.numpy(), v.numpy(), TOLERANCES[dtype])
        assert status.item() == 0


@pytest.mark.parametrize("family", ["uniform", "integers", "query_bias", "early_training", "sentinels", "products"])
@pytest.mark.parametrize("shape", [(1000, 300), (300, 300), (300, 100)])
def test_the_largest_problems(family, shape):
    if shape[0] == 1000 and family == "products":
        shape = (500, 150)  # SciPy alone takes seconds
    cost = make(family, *shape, 0)
    query_of, (u, v) = solve(cost, return_duals=True)
    check_matching(cost, query_of.numpy())
    check_duals(cost, query_of.numpy(), u.numpy(), v.numpy())


@pytest.mark.parametrize("seed", range(4))
def test_all_small_shapes(seed):
    rng = np.random.default_rng(seed)
    for n in range(10):
        for m in range(10):
            cost = make(rng.choice(list(FAMILIES)), n, m, seed, np.float64)
            query_of = solve(cost).numpy()
            assert query_of.shape == (m,)
            check_matching(cost, query_of, 1e-12)


@settings(max_examples=300)
@given(
    hnp.arrays(
        st.sampled_from([np.float32, np.float64]),
        hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9),
        elements=st.floats(-(2.0**100), 2.0**100, width=32),
    )
)
def test_any_finite_costs(cost):
    query_of, (u, v) = solve(cost, return_duals=True)
    tolerance = TOLERANCES[cost.dtype.type]
    check_matching(cost, query_of.numpy(), tolerance)
    check_duals(cost, query_of.numpy(), u.numpy(), v.numpy(), tolerance)


def quality(cost, query_of):
    """(pairs that are not finite, total of the others) of a complete matching."""
    targets = np.flatnonzero(query_of >= 0)
    assert len(targets) == min(cost.shape)
    assert len(set(query_of[targets].tolist())) == len(targets)
    chosen = cost[query_of[targets], targets].astype(np.float64)
    finite = np.isfinite(chosen)
    return int((~finite).sum()), float(chosen[finite].sum()), float(np.abs(chosen[finite]).sum())


def check_broken(cost):
    query_of, (u, v), status = solve(cost, return_duals=True, return_status=True)
    broken, total, magnitude = quality(cost, query_of.numpy())
    best_broken, best, _ = quality(cost, reference.assign(torch.from_numpy(cost)).numpy())
    assert broken == status.item() == best_broken
    assert total <= best + 1e-6 * magnitude
    if broken:
        assert u.isnan().all()
        assert v.isnan().all()
    else:
        finite = np.where(np.isfinite(cost), cost, np.inf)
        assert (finite - u.numpy()[:, None] - v.numpy() >= -1e-9 * magnitude).all()


@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("seed", range(6))
def test_pairs_that_are_not_finite_come_last(seed, dtype, share):
    rng = np.random.default_rng(seed)
    for shape in [(1, 1), (5, 5), (9, 4), (4, 9), (100, 20), (40, 60)]:
        cost = rng.normal(size=shape).astype(dtype)
        wrong = rng.random(shape) < share
        cost[wrong] = rng.choice(BROKEN, size=wrong.sum())
        check_broken(cost)
        cost[rng.integers(shape[0])] = np.nan  # a query with broken logits
        check_broken(cost)


@settings(max_examples=200)
@given(
    hnp.arrays(
        np.float64,
        hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=6),
        elements=st.sampled_from([0.0, 1.0, 2.0, 3.5, -4.0, *BROKEN]),
    )
)
def test_any_pattern_of_broken_pairs(cost):
    check_broken(cost)


@pytest.mark.parametrize("assign", [assign, reference.assign], ids=["operator", "reference"])
def test_a_wide_range_next_to_nan(assign):
    """Costs near 1 still decide next to a finite 1e30 and a pair that is not finite."""
    cost = torch.tensor([[1.0, 2.0, 1e30], [2.0, 1.0, 3.0], [torch.nan, -torch.inf, 5.0]], dtype=torch.float64)
    assert assign(cost).tolist() == [0, 1, 2]
    huge = torch.tensor([[1.7e308, -1.7e308], [-1.7e308, 1.7e308]], dtype=torch.float64)
    assert assign(huge).tolist() == [1, 0]
    assert assign(torch.tensor([[1e38, -3e38, torch.nan], [-1e38, 3e38, torch.nan]])).tolist() == [1, 0, -1]
    tiny = torch.tensor([[2e-320, 1e-320], [1e-320, 2e-320]], dtype=torch.float64)
    assert assign(tiny).tolist() == [1, 0]


def test_ties_follow_a_fixed_rule():
    """All equal: target m takes query m; of two, the first from there on."""
    assert assign(torch.zeros(5, 3)).tolist() == [0, 1, 2]
    assert assign(torch.full((4, 4), 7.25)).tolist() == [0, 1, 2, 3]
    assert assign(torch.tensor([[0.0, 9.0], [9.0, 9.0], [0.0, 0.0], [9.0, 0.0]])).tolist() == [0, 2]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_bits_at_every_simd_level(family):
    problems = [torch.from_numpy(make(family, *shape, 3)) for shape in SHAPES]
    problems += [problem.double() for problem in problems] + [problem.t().contiguous().t() for problem in problems]
    results = []
    for level in simd_levels():
        with simd_level(level):
            results.append([assign(problem, return_duals=True, return_status=True) for problem in problems])
    for other in results[1:]:
        for (query_of, (u, v), status), expected in zip(other, results[0], strict=True):
            assert torch.equal(query_of, expected[0])
            assert torch.equal(u, expected[1][0])
            assert torch.equal(v, expected[1][1])
            assert torch.equal(status, expected[2])


def test_the_same_bits_with_any_number_of_threads(generator):
    cost = torch.randn(50, 40, 30, generator=generator)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(assign(cost, return_duals=True))
    finally:
        torch.set_num_threads(threads)
    for query_of, duals in results[1:]:
        assert torch.equal(query_of, results[0][0])
        assert all(map(torch.equal, duals, results[0][1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_layouts_and_dtypes(dtype, generator):
    """Transposed, sliced, expanded and half-precision costs are read as they are."""
    base = torch.randn(3, 2, 80, 60, generator=generator).to(dtype)
    layouts = {
        "contiguous": base,
        "targets first": base.transpose(-1, -2).contiguous().transpose(-1, -2),
        "sliced": base.repeat_interleave(2, -1).repeat_interleave(3, -2)[..., ::3, ::2],
        "layers last": base.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1),
        "wide": base.transpose(-1, -2),
    }
    expected = reference.assign(base)
    totals = base.double().gather(-2, expected.unsqueeze(-2)).sum((-1, -2))
    for name, cost in layouts.items():
        query_of = assign(cost)
        if name == "wide":
            check_matching(cost[0, 0].double().numpy(), query_of[0, 0].numpy())
            continue
        found = cost.double().gather(-2, query_of.unsqueeze(-2)).sum((-1, -2))
        assert torch.allclose(found, totals, rtol=1e-6, atol=0), name
    assert assign(base[:1].expand(4, -1, -1, -1)).equal(assign(base[:1]).expand(4, -1, -1))


def test_ragged_counts(generator):
    cost = torch.randn(3, 4, 30, 12, generator=generator)
    cost[..., -1] = torch.nan  # padding is never read
    counts = torch.tensor([11, 0, 5, 1])
    query_of, (u, v), status = assign(cost, counts, return_duals=True, return_status=True)
    for layer in range(3):
        for b, count in enumerate(counts.tolist()):
            assert query_of[layer, b, :count].equal(assign(cost[layer, b, :, :count].contiguous()))
            assert (query_of[layer, b, count:] == -1).all()
            assert (v[layer, b, count:] == 0).all()
            check_duals(
                cost[layer, b, :, :count].numpy(),
                query_of[layer, b, :count].numpy(),
                u[layer, b].numpy(),
                v[layer, b, :count].numpy(),
            )
    assert status.shape == (3, 4)
    assert (status == 0).all()
    assert assign(cost, counts[None]).equal(query_of)
    assert assign(cost, torch.tensor(5))[..., 5:].eq(-1).all()


def test_counts_beyond_the_queries(generator):
    cost = torch.randn(2, 5, 9, generator=generator)
    query_of = assign(cost, torch.tensor([8, 3]))
    check_matching(cost[0, :, :8].numpy(), query_of[0, :8].numpy())
    check_matching(cost[1, :, :3].numpy(), query_of[1, :3].numpy())


def test_empty_problems():
    for shape in [(0, 0), (0, 3), (3, 0), (0, 4, 3), (2, 0, 3), (2, 4, 0)]:
        query_of, (u, v), status = assign(torch.zeros(shape), return_duals=True, return_status=True)
        assert query_of.shape == (*shape[:-2], shape[-1])
        assert u.shape == shape[:-1]
        assert v.shape == query_of.shape
        assert status.shape == shape[:-2]
        assert (query_of == -1).all()
        assert (u == 0).all()
        assert (v == 0).all()
    assert assign(torch.zeros(2, 4, 3), torch.zeros(2, dtype=torch.int64)).eq(-1).all()
    assert assign(torch.tensor([[3.0]])).tolist() == [0]


def test_policy_raise():
    finite = torch.rand(4, 3)
    assert assign(finite, policy="raise").equal(assign(finite))
    for value in (torch.nan, -torch.inf):
        broken = finite.clone()
        broken[0, 0] = value
        with pytest.raises(ValueError, match="matrix contains invalid numeric entries"):
            assign(broken, policy="raise")
    avoidable, infeasible = finite.clone(), finite.clone()
    avoidable[0, 0] = torch.inf
    infeasible[:, 0] = torch.inf
    assert assign(avoidable, policy="raise").equal(assign(avoidable))
    with pytest.raises(ValueError, match="cost matrix is infeasible"):
        assign(infeasible, policy="raise")
    broken[:, 2] = torch.nan
    with pytest.raises(ValueError, match="invalid"):
        assign(broken[:, 1:], policy="raise")
    assert assign(broken[:, 1:], torch.tensor(1), policy="raise").tolist()[1] == -1


def test_the_reference_backend(generator):
    cost = torch.randn(2, 6, 4, generator=generator)
    cost[0, :, 1] = torch.inf
    query_of, status = assign(cost, backend="reference", return_status=True)
    assert status.tolist() == [1, 0]
    assert query_of.equal(assign(cost))
    assert assign(cost[:, :0], backend="reference", return_status=True)[1].tolist() == [0, 0]
    with pytest.raises(RuntimeError, match="computes no duals"):
        assign(cost, backend="reference", return_duals=True)


def test_gradients_are_not_carried():
    cost = torch.rand(5, 3, requires_grad=True)
    query_of, (u, _) = assign(cost, return_duals=True)
    assert not query_of.requires_grad
    assert not u.requires_grad


def test_wrong_arguments_are_named():
    cost = torch.zeros(2, 4, 3)
    with pytest.raises(TypeError, match="cost must be a tensor"):
        assign(cost.numpy())
    with pytest.raises(TypeError, match="cost must be floating point, got"):
        assign(cost.int())
    with pytest.raises(ValueError, match="cost has shape"):
        assign(torch.zeros(3))
    with pytest.raises(TypeError, match="counts must be an int64 tensor, got torch.int32"):
        assign(cost, torch.zeros(2, dtype=torch.int32))
    with pytest.raises(TypeError, match="counts must be an int64 tensor, got list"):
        assign(cost, [1, 2])
    with pytest.raises(ValueError, match=r"counts has shape \(3,\); expected one that broadcasts to \(2,\)"):
        assign(cost, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"counts must lie in 0\.\.3, got 1\.\.4"):
        assign(cost, torch.tensor([1, 4]))
    with pytest.raises(ValueError, match="policy must be one of last, raise"):
        assign(cost, policy="first")
    with pytest.raises(ValueError, match="expected a CPU tensor, got meta"):
        assign(cost.to("meta"), policy="raise")
    with pytest.raises(ValueError, match="backend must be one of"):
        assign(cost, backend="cuda")


@pytest.mark.parametrize("counts", [None, torch.tensor([2, 3])])
@pytest.mark.parametrize("operator", ["assign", "assign_duals"])
def test_the_operators_are_well_formed(operator, counts):
    torch.library.opcheck(getattr(torch.ops.fastmask, operator).default, (torch.rand(2, 5, 3), counts))


def test_the_operator_checks_what_it_is_given():
    operator = torch.ops.fastmask.assign
    with pytest.raises(RuntimeError, match="cost must be float32"):
        operator(torch.zeros(2, 2, dtype=torch.int32), None)
    with pytest.raises(RuntimeError, match="counts must lie in"):
        operator(torch.zeros(1, 2, 2), torch.tensor([3]))
    with pytest.raises(RuntimeError, match="leading dimensions"):
        operator(torch.zeros(1, 2, 2), torch.tensor([1, 2]))
    with pytest.raises(RuntimeError, match="shorter side"):
        operator(torch.zeros(1).expand(70000, 70000), None)


def test_it_compiles_as_one_graph(generator):
    cost = torch.randn(2, 8, 5, generator=generator)
    counts = torch.tensor([5, 2])
    compiled = torch.compile(lambda *args: assign(*args, return_status=True), fullgraph=True, backend="aot_eager")
    for result, expected in zip(compiled(cost, counts), assign(cost, counts, return_status=True), strict=True):
        assert result.equal(expected)


@pytest.mark.slow
def test_long_fuzz():
    """Random families, shapes, dtypes, layouts and broken pairs."""
    for seed in range(20_000):
        rng = np.random.default_rng(seed)
        n, m = rng.integers(1, 131, 2)
        if rng.random() < 0.5:
            n, m = n // 10 + 1, m // 10 + 1
        if rng.random() < 0.3:
            m = n
        dtype = [np.float32, np.float64][rng.integers(2)]
        cost = make(rng.choice(list(FAMILIES)), n, m, seed, dtype)
        if rng.random() < 0.1:
            cost[rng.random(cost.shape) < rng.random()] = rng.choice(BROKEN)
            check_broken(cost)
            continue
        if rng.random() < 0.3:
            cost = np.ascontiguousarray(cost.T).T
        query_of, (u, v) = solve(cost, return_duals=True)
        check_matching(cost, query_of.numpy(), TOLERANCES[dtype])
        check_duals(cost, query_of.numpy(), u.numpy(), v.numpy(), TOLERANCES[dtype])
