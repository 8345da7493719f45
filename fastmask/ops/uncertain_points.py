"""``fastmask::uncertain_points``: random points of each matched pair, most of them where its mask is uncertain.

The points come from a stream that the seed, an int64 tensor of one element, determines; see
``fastmask.reference.random_points``. Only chosen points are ever stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask.ops.library import Operator


def _fake(mask_logits: Tensor, assignment: Tensor, seed: Tensor, num_points: int, *_: object) -> Tensor:
    return mask_logits.new_empty((*assignment.shape, num_points, 2), dtype=torch.float32)


OPERATOR = Operator(
    "uncertain_points",
    "(Tensor mask_logits, Tensor assignment, Tensor seed, int num_points, int num_candidates, int num_uncertain) "
    "-> Tensor",
    _fake,
    native=("cpu",),
    triton="uncertain_points",
)
