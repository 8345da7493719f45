"""``fastmask::mask_cost``: the matching cost of every query against every target, for all layers and images."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask.ops.library import Operator


def fake_cost(class_logits: Tensor, mask_logits: Tensor, labels: Tensor, *_: object) -> Tensor:
    return mask_logits.new_empty((*mask_logits.shape[:3], labels.shape[1]), dtype=torch.float32)


OPERATOR = Operator(
    "mask_cost",
    "(Tensor class_logits, Tensor mask_logits, Tensor labels, Tensor? masks, Tensor? segments, Tensor? valid, "
    "int void_value, bool ignore_void, float cost_class, float cost_mask, float cost_dice, str mask_term, "
    "float alpha, float gamma) -> Tensor",
    fake_cost,
    native=("cpu",),
    triton="mask_cost",
)
