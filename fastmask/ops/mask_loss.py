"""``fastmask::mask_loss``: the mask and dice losses of the matched pairs, and their gradient.

The forward operator returns, for each pair, both losses and the four sums that backward needs: sum p t, sum p, sum t
and the number of counted pixels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmask.kernels._layout import empty_gradient
from fastmask.ops.library import Gradient, Operator

_ARGUMENTS = (
    "Tensor mask_logits, Tensor assignment, Tensor labels, Tensor? masks, Tensor? segments, Tensor? valid, "
    "int void_value, bool ignore_void, str mask_term, float alpha, float gamma"
)


def fake_losses(mask_logits: Tensor, assignment: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    pairs = mask_logits.new_empty(assignment.shape, dtype=torch.float32)
    return pairs, torch.empty_like(pairs), pairs.new_empty((*assignment.shape, 4))


def fake_gradient(grad_mask: Tensor, grad_dice: Tensor, sums: Tensor, mask_logits: Tensor, *_: object) -> Tensor:
    return empty_gradient(mask_logits)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    mask_logits, assignment, labels, masks, segments, valid, *options = inputs
    sums = output[2]
    ctx.mark_non_differentiable(sums)
    ctx.save_for_backward(sums, mask_logits, assignment, labels, masks, segments, valid)
    ctx.options = options


def _backward_arguments(ctx: Any, grad_mask: Tensor, grad_dice: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    return grad_mask, grad_dice, *ctx.saved_tensors, *ctx.options


BACKWARD = Operator(
    "mask_loss_backward",
    f"(Tensor grad_mask, Tensor grad_dice, Tensor sums, {_ARGUMENTS}) -> Tensor",
    fake_gradient,
    native=("cpu",),
    triton="mask_loss_backward",
)
OPERATOR = Operator(
    "mask_loss",
    f"({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    fake_losses,
    native=("cpu",),
    triton="mask_loss",
    gradient=Gradient(BACKWARD, _save, _backward_arguments),
)
