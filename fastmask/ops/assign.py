"""``fastmask::assign``: the best matching of each problem of a batch; ``fastmask::assign_duals`` also proves it.

Both return the query of each target and how many pairs of each problem have a cost that is not finite.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask.ops.library import Operator

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _fake(cost: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor]:
    leading = cost.shape[:-2]
    return cost.new_empty((*leading, cost.shape[-1]), dtype=torch.int64), cost.new_empty(leading, dtype=torch.int32)


def _fake_duals(cost: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *leading, num_queries, num_targets = cost.shape
    return (
        *_fake(cost, counts),
        cost.new_empty((*leading, num_queries), dtype=torch.float64),
        cost.new_empty((*leading, num_targets), dtype=torch.float64),
    )


OPERATOR = Operator(
    "assign", "(Tensor cost, Tensor? counts) -> (Tensor, Tensor)", _fake, native=("cpu", "cuda"), dtypes=_DTYPES
)
ASSIGN_DUALS = Operator(
    "assign_duals",
    "(Tensor cost, Tensor? counts) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_duals,
    native=("cpu", "cuda"),
    dtypes=_DTYPES,
)
# The form that CUDA runs, on one CPU thread; for tests. The seed scrambles the order of what a block does at once.
torch.library.define(
    "fastmask::_assign_serial", "(Tensor cost, Tensor? counts, int seed) -> (Tensor, Tensor, Tensor, Tensor)"
)
