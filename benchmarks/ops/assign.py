"""The best matching of queries and targets, for a batch of costs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from benchmarks.harness.machine import Work
from benchmarks.harness.providers import require_backend
from benchmarks.harness.registry import Case, Operation, Provider, Unavailable
from fastmask import assign

Pairs = list[tuple[np.ndarray, np.ndarray]]  # row and column indices of each problem

TRAINING_PROBLEMS = 96  # 6 layers of 16 images
CPU_SHAPES = ((100, 20), (100, 100), (300, 100))
TOLERANCE = 1e-6  # of the sum of |cost| over the pairs


@dataclass(frozen=True)
class Problems:
    """Costs ``(B, N, M)`` and, for a ragged batch, how many targets each problem has."""

    cost: Tensor
    counts: Tensor | None


def random(n: int, m: int, rng: np.random.Generator) -> np.ndarray:
    return rng.random((n, m))


def early(n: int, m: int, rng: np.random.Generator) -> np.ndarray:
    """Early in training: queries look alike, so that a bias of each query and target and a little of rank 2 say all."""
    bias = 0.3 * rng.normal(size=(n, 1)) + rng.normal(size=(1, m))
    return bias + 0.3 * rng.normal(size=(n, 2)) @ rng.normal(size=(2, m)) + 0.02 * rng.normal(size=(n, m))


def late(n: int, m: int, rng: np.random.Generator) -> np.ndarray:
    """Late in training: each target has found its query."""
    cost = 2 + 0.3 * rng.normal(size=(n, m))
    pairs = min(n, m)
    cost[rng.permutation(n)[:pairs], rng.permutation(m)[:pairs]] -= 3
    return cost


def query_bias(n: int, m: int, rng: np.random.Generator) -> np.ndarray:
    """All targets want the same queries."""
    return 100 * rng.random((n, 1)) + rng.random((n, m))


def target_bias(n: int, m: int, rng: np.random.Generator) -> np.ndarray:
    return 100 * rng.random((1, m)) + rng.random((n, m))


def integers(n: int, m: int, rng: np.random.Generator) -> np.ndarray:
    """Many ties."""
    return rng.integers(0, 10, (n, m)).astype(float)


FAMILIES = {function.__name__: function for function in (random, early, late, query_bias, target_bias, integers)}


def case(family: str, n: int, m: int, problems: int, suites: tuple[str, ...], fewest: int | None = None) -> Case:
    shape = f"{problems} of {n}x{m}" if fewest is None else f"{problems} of {n}x({fewest}..{m})"
    sizes = {"family": family, "queries": n, "targets": m, "problems": problems, "fewest": fewest}
    return Case(f"{family.replace('_', ' ')}, {shape}", sizes, suites)


CASES = (
    *(case(family, 20, 8, 4, ("quick",), fewest=3) for family in ("random", "query_bias")),
    *(case(family, n, m, TRAINING_PROBLEMS, ("cpu", "gpu")) for family in FAMILIES for n, m in CPU_SHAPES),
    case("random", 100, 20, 1, ("cpu",)),
    case("query_bias", 100, 20, 1, ("cpu",)),
    case("early", 100, 40, TRAINING_PROBLEMS, ("cpu", "gpu"), fewest=5),
    case("random", 100, 40, TRAINING_PROBLEMS, ("gpu",), fewest=5),
    case("random", 1000, 300, TRAINING_PROBLEMS, ("gpu",)),
)


def make_inputs(sizes: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> Problems:
    rng = np.random.default_rng(0)
    n, m = sizes["queries"], sizes["targets"]
    cost = np.stack([FAMILIES[sizes["family"]](n, m, rng) for _ in range(sizes["problems"])])
    counts = None
    if sizes["fewest"] is not None:
        counts = torch.from_numpy(rng.integers(sizes["fewest"], m + 1, sizes["problems"])).to(device)
    return Problems(torch.from_numpy(cost).to(device, dtype), counts)


def per_problem(inputs: Problems) -> list[np.ndarray]:
    """Each problem's own targets, on the host."""
    cost = inputs.cost.cpu().numpy()
    counts = [cost.shape[2]] * len(cost) if inputs.counts is None else inputs.counts.tolist()
    return [problem[:, :count] for problem, count in zip(cost, counts, strict=True)]


class LeastTotals:
    """A result is right if every problem's is a complete matching whose total is the least."""

    def __init__(self, inputs: Problems) -> None:
        self.costs = [cost.astype(np.float64) for cost in per_problem(inputs)]
        self.best = [cost[linear_sum_assignment(cost)] for cost in self.costs]

    def disagreement(self, result: Pairs, error_factor: float) -> str | None:
        if len(result) != len(self.costs):
            return f"gives {len(result)} problems; expected {len(self.costs)}"
        for b, (cost, best, (rows, columns)) in enumerate(zip(self.costs, self.best, result, strict=True)):
            if (
                len(rows) != len(best)
                or len(set(rows.tolist())) != len(best)
                or len(set(columns.tolist())) != len(best)
            ):
                return f"problem {b}: no complete matching"
            excess = cost[rows, columns].sum() - best.sum()
            if not excess <= TOLERANCE * np.abs(best).sum():
                return f"problem {b}: the total is {excess:.2e} above the least"
        return None


def work(inputs: Problems) -> Work:
    """Every cost read, every target's query written."""
    return Work(bytes=inputs.cost.nbytes + 8 * inputs.cost[:, 0].numel())


def pairs_of(assignment: Tensor, _: Problems) -> Pairs:
    """Pairs from the query of each target, -1 for none."""
    matched = [(queries, np.flatnonzero(queries >= 0)) for queries in assignment.cpu().numpy()]
    return [(queries[targets], targets) for queries, targets in matched]


def prepare_fastmask(inputs: Problems) -> Callable[[], Tensor]:
    require_backend("assign", "native", inputs.cost)
    return lambda: assign(inputs.cost, inputs.counts, backend="native")


def prepare_scipy(inputs: Problems) -> Callable[[], Pairs]:
    """A loop, as matchers have it; on a GPU, after the copy to the host that it needs."""
    if not inputs.cost.is_cuda:
        costs = per_problem(inputs)
        return lambda: [linear_sum_assignment(cost) for cost in costs]
    return lambda: [linear_sum_assignment(cost) for cost in per_problem(inputs)]


def lapx_solver(name: str) -> Provider:
    """One of lapx's batch solvers, with PyTorch's number of threads. Ragged problems go one by one."""

    def prepare(inputs: Problems) -> Callable[[], Pairs]:
        import lap

        if inputs.cost.is_cuda:
            raise Unavailable("lapx runs on the CPU")
        batch, single = getattr(lap, f"{name}_batch"), getattr(lap, name)
        options = {"extend_cost": True, "return_cost": False}
        if inputs.counts is not None:
            costs = [np.ascontiguousarray(cost) for cost in per_problem(inputs)]
            return lambda: [single(cost, **options) for cost in costs]
        cost, threads = inputs.cost.numpy(), torch.get_num_threads()
        return lambda: list(zip(*batch(cost, **options, n_threads=threads), strict=True))

    return Provider(f"lapx {name}", prepare)


def prepare_torch_linear_assignment(inputs: Problems) -> Callable[[], Tensor]:
    """Its problems are workers by tasks, no more workers than tasks."""
    from torch_linear_assignment import batch_linear_assignment

    if inputs.counts is not None:
        raise Unavailable("torch-linear-assignment has no ragged batches")
    cost = inputs.cost.mT.contiguous()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            batch_linear_assignment(cost[:1])
        except RuntimeWarning as warning:  # it would time SciPy
            raise Unavailable(str(warning)) from None
    return lambda: batch_linear_assignment(cost)


def prepare_torch_lap_cuda(inputs: Problems) -> Callable[[], Tensor]:
    from torch_lap_cuda import solve_lap

    if not inputs.cost.is_cuda:
        raise Unavailable("torch-lap-cuda runs on a GPU")
    if inputs.counts is not None or inputs.cost.shape[1] != inputs.cost.shape[2]:
        raise Unavailable("torch-lap-cuda solves square problems of one size")
    cost = inputs.cost.mT.contiguous()
    return lambda: solve_lap(cost)


OPERATION = Operation(
    title="Best matching of queries and targets",
    cases=CASES,
    providers=(
        Provider("fastmask native", prepare_fastmask, pairs_of),
        Provider("SciPy", prepare_scipy),
        lapx_solver("lapjvh"),
        lapx_solver("lapjvr"),
        lapx_solver("lapjvx"),
        Provider("torch-linear-assignment", prepare_torch_linear_assignment, pairs_of),
        Provider("torch-lap-cuda", prepare_torch_lap_cuda, pairs_of),
    ),
    baseline="SciPy",
    make_inputs=make_inputs,
    oracle=LeastTotals,
    work=work,
)
