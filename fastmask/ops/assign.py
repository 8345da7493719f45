"""``fastmask::assign``: the best matching of each problem of a batch; ``fastmask::assign_duals`` also proves it.

Both return the query of each target and how many pairs of each problem have a cost that is not finite.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask.ops.library import Operator

torch.library.define("fastmask::assign", "(Tensor cost, Tensor? counts) -> (Tensor, Tensor)")
torch.library.define("fastmask::assign_duals", "(Tensor cost, Tensor? counts) -> (Tensor, Tensor, Tensor, Tensor)")
# The form that CUDA runs, on one CPU thread; for tests. The seed scrambles the order of what a block does at once.
torch.library.define(
    "fastmask::_assign_serial", "(Tensor cost, Tensor? counts, int seed) -> (Tensor, Tensor, Tensor, Tensor)"
)

OPERATOR = Operator(
    "assign",
    native=("cpu", "cuda") if torch._C._dispatch_has_kernel_for_dispatch_key("fastmask::assign", "CUDA") else ("cpu",),
    dtypes=(torch.float32, torch.float64, torch.bfloat16, torch.float16),
)


@torch.library.register_fake("fastmask::assign")
def _(cost: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor]:
    leading = cost.shape[:-2]
    return cost.new_empty((*leading, cost.shape[-1]), dtype=torch.int64), cost.new_empty(leading, dtype=torch.int32)


@torch.library.register_fake("fastmask::assign_duals")
def _(cost: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *leading, num_queries, num_targets = cost.shape
    return (
        cost.new_empty((*leading, num_targets), dtype=torch.int64),
        cost.new_empty(leading, dtype=torch.int32),
        cost.new_empty((*leading, num_queries), dtype=torch.float64),
        cost.new_empty((*leading, num_targets), dtype=torch.float64),
    )
