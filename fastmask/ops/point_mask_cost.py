"""``fastmask::point_mask_cost``: the matching cost of every query against every target, at points that they share."""

from __future__ import annotations

from fastmask.ops.library import Operator
from fastmask.ops.mask_cost import fake_cost

OPERATOR = Operator(
    "point_mask_cost",
    "(Tensor class_logits, Tensor mask_logits, Tensor labels, Tensor? masks, Tensor? segments, Tensor? valid, "
    "int void_value, bool ignore_void, Tensor points, float cost_class, float cost_mask, float cost_dice, "
    "str mask_term, float alpha, float gamma) -> Tensor",
    fake_cost,
    native=("cpu",),
    triton="point_mask_cost",
)
