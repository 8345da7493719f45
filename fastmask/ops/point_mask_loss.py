"""``fastmask::point_mask_loss``: both losses of the matched pairs, each at points of its own, and their gradient.

The forward operator returns, for each pair, both losses and the four sums that backward needs: sum p t, sum v p, sum t
and sum v, the points' weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmask.ops.library import Operator

OPERATOR = Operator("point_mask_loss", native=("cpu",), triton=True)

_TARGET_ARGUMENTS = (
    "Tensor mask_logits, Tensor assignment, Tensor labels, Tensor? masks, Tensor? segments, Tensor? valid, "
    "int void_value, bool ignore_void, Tensor points, str mask_term, float alpha, float gamma"
)
torch.library.define("fastmask::point_mask_loss", f"({_TARGET_ARGUMENTS}) -> (Tensor, Tensor, Tensor)")
torch.library.define(
    "fastmask::point_mask_loss_backward",
    f"(Tensor grad_mask, Tensor grad_dice, Tensor sums, {_TARGET_ARGUMENTS}) -> Tensor",
)


@torch.library.register_fake("fastmask::point_mask_loss")
def _(mask_logits: Tensor, assignment: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    pairs = mask_logits.new_empty(assignment.shape, dtype=torch.float32)
    return pairs, torch.empty_like(pairs), pairs.new_empty((*assignment.shape, 4))


@torch.library.register_fake("fastmask::point_mask_loss_backward")
def _(grad_mask: Tensor, grad_dice: Tensor, sums: Tensor, mask_logits: Tensor, *_: object) -> Tensor:
    h, w = mask_logits.shape[-2:]
    contiguous_planes = (w == 1 or mask_logits.stride(-1) == 1) and (h == 1 or mask_logits.stride(-2) == w)
    return torch.empty_like(mask_logits if contiguous_planes else mask_logits.contiguous())


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    mask_logits, assignment, labels, masks, segments, valid, void_value, ignore_void, points, *term = inputs
    sums = output[2]
    ctx.mark_non_differentiable(sums)
    ctx.save_for_backward(sums, mask_logits, assignment, labels, masks, segments, valid, points)
    ctx.void, ctx.term = (void_value, ignore_void), term


def _backward_arguments(ctx: Any) -> tuple[Any, ...]:
    *tensors, points = ctx.saved_tensors
    return *tensors, *ctx.void, points, *ctx.term


def _backward(ctx: Any, grad_mask: Tensor, grad_dice: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    grad = torch.ops.fastmask.point_mask_loss_backward(grad_mask, grad_dice, *_backward_arguments(ctx))
    return grad, *[None] * 11


torch.library.register_autograd("fastmask::point_mask_loss", _backward, setup_context=_setup_context)


def _triton(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    from fastmask.kernels.point_mask_loss import point_mask_loss

    return point_mask_loss(*arguments)


torch.library.impl("fastmask::point_mask_loss", "cuda", _triton)


def _triton_backward(*arguments: Any) -> Tensor:
    from fastmask.kernels.point_mask_loss import point_mask_loss_backward

    return point_mask_loss_backward(*arguments)


torch.library.impl("fastmask::point_mask_loss_backward", "cuda", _triton_backward)


class _InterpretedPointMaskLoss(torch.autograd.Function):
    """The Triton kernels on CPU tensors, past the dispatcher, which has C++ for them."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _triton(*arguments)

    setup_context = staticmethod(_setup_context)

    @staticmethod
    def backward(ctx: Any, grad_mask: Tensor, grad_dice: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        return _triton_backward(grad_mask, grad_dice, *_backward_arguments(ctx)), *[None] * 11


def call(backend: str, mask_logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the operator on the backend chosen; Triton runs CPU tensors through its interpreter."""
    interpret = backend == "triton" and mask_logits.device.type == "cpu"
    run = _InterpretedPointMaskLoss.apply if interpret else torch.ops.fastmask.point_mask_loss
    return run(mask_logits, *arguments)
