"""``fastmask::point_mask_loss``: both losses of the matched pairs, each at points of its own, and their gradient.

The forward operator returns, for each pair, both losses and the four sums that backward needs: sum p t, sum v p, sum t
and sum v, the points' weights.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastmask.ops.library import Gradient, Operator
from fastmask.ops.mask_loss import fake_gradient, fake_losses

_ARGUMENTS = (
    "Tensor mask_logits, Tensor assignment, Tensor labels, Tensor? masks, Tensor? segments, Tensor? valid, "
    "int void_value, bool ignore_void, Tensor points, str mask_term, float alpha, float gamma"
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    mask_logits, assignment, labels, masks, segments, valid, void_value, ignore_void, points, *term = inputs
    sums = output[2]
    ctx.mark_non_differentiable(sums)
    ctx.save_for_backward(sums, mask_logits, assignment, labels, masks, segments, valid, points)
    ctx.void, ctx.term = (void_value, ignore_void), term


def _backward_arguments(ctx: Any, grad_mask: Tensor, grad_dice: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    *tensors, points = ctx.saved_tensors
    return grad_mask, grad_dice, *tensors, *ctx.void, points, *ctx.term


BACKWARD = Operator(
    "point_mask_loss_backward",
    f"(Tensor grad_mask, Tensor grad_dice, Tensor sums, {_ARGUMENTS}) -> Tensor",
    fake_gradient,
    native=("cpu",),
    triton="point_mask_loss",
)
OPERATOR = Operator(
    "point_mask_loss",
    f"({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    fake_losses,
    native=("cpu",),
    triton="point_mask_loss",
    gradient=Gradient(BACKWARD, _save, _backward_arguments),
)
