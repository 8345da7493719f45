"""Batched optimal assignment of queries to targets."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask.functional._checks import check_floating


@torch.no_grad()
def assign(cost: Tensor, counts: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    check_floating("cost", cost, 2, "(..., N, M)")
    from fastmask import reference

    return reference.assign(cost, counts)
