"""``fastmask::uncertain_points``: random points of each matched pair, most of them where its mask is uncertain.

The points come from a stream that the seed, an int64 tensor of one element, determines; see
``fastmask.reference.random_points``. Only chosen points are ever stored.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmask.ops.library import Operator

OPERATOR = Operator("uncertain_points", native=("cpu",), triton=True)

torch.library.define(
    "fastmask::uncertain_points",
    "(Tensor mask_logits, Tensor assignment, Tensor seed, int num_points, int num_candidates, int num_uncertain) "
    "-> Tensor",
)


@torch.library.register_fake("fastmask::uncertain_points")
def _(mask_logits: Tensor, assignment: Tensor, seed: Tensor, num_points: int, *_: object) -> Tensor:
    return mask_logits.new_empty((*assignment.shape, num_points, 2), dtype=torch.float32)


def _triton(*arguments: Any) -> Tensor:
    from fastmask.kernels.uncertain_points import uncertain_points

    return uncertain_points(*arguments)


torch.library.impl("fastmask::uncertain_points", "cuda", _triton)


def call(backend: str, mask_logits: Tensor, *arguments: Any) -> Tensor:
    """Runs the operator on the backend chosen; Triton runs CPU tensors through its interpreter."""
    interpret = backend == "triton" and mask_logits.device.type == "cpu"
    run = _triton if interpret else torch.ops.fastmask.uncertain_points
    return run(mask_logits, *arguments)
