"""``fastmask::point_mask_cost``: the matching cost of every query against every target, at points that they share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmask.ops.library import Operator

OPERATOR = Operator("point_mask_cost", native=("cpu",), triton=True)

torch.library.define(
    "fastmask::point_mask_cost",
    "(Tensor class_logits, Tensor mask_logits, Tensor labels, Tensor? masks, Tensor? segments, Tensor? valid, "
    "int void_value, bool ignore_void, Tensor points, float cost_class, float cost_mask, float cost_dice, "
    "str mask_term, float alpha, float gamma) -> Tensor",
)


@torch.library.register_fake("fastmask::point_mask_cost")
def _(class_logits: Tensor, mask_logits: Tensor, labels: Tensor, *_: object) -> Tensor:
    return mask_logits.new_empty((*mask_logits.shape[:3], labels.shape[1]), dtype=torch.float32)


def _triton(*arguments: Any) -> Tensor:
    from fastmask.kernels.point_mask_cost import point_mask_cost

    return point_mask_cost(*arguments)


torch.library.impl("fastmask::point_mask_cost", "cuda", _triton)


def call(backend: str, class_logits: Tensor, *arguments: Any) -> Tensor:
    """Runs the operator on the backend chosen; Triton runs CPU tensors through its interpreter."""
    interpret = backend == "triton" and class_logits.device.type == "cpu"
    run = _triton if interpret else torch.ops.fastmask.point_mask_cost
    return run(class_logits, *arguments)
