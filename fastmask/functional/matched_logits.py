"""Mask logits of the matched queries, whose gradient never takes the size of all queries'."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


def matched_mask_logits(
    mask_embed: Tensor, pixel_embed: Tensor, mask_logits: Tensor, assignment: Tensor
) -> tuple[Tensor, Tensor]:
    """The rows of ``mask_logits[l, b, n] = mask_embed[l, b, n] . pixel_embed[b]`` that have a target.

    The losses of mask classification reach matched queries only. Differentiating ``mask_logits`` itself would carry a
    gradient of its size, most of it zeros, through the product; here the gradient has M rows instead of N.

    Args:
        mask_embed: ``(L, B, N, C)``.
        pixel_embed: ``(B, C, h, w)``.
        mask_logits: ``(L, B, N, h, w)``, their product, which is known already; its own gradient is not needed.
        assignment: ``(L, B, M)`` int64, the query of each target; -1 for padding and unmatched targets.

    Returns:
        ``logits (L, B, M, h, w)``, differentiable with respect to the embeddings, and ``slots (L, B, M)`` int64, the
        assignment of the same targets to these rows: m, or -1 where ``assignment`` is.
    """
    layers, images = (torch.arange(size, device=assignment.device) for size in assignment.shape[:2])
    rows = layers[:, None, None], images[None, :, None], assignment.clamp(min=0)
    values, embed = mask_logits.detach()[rows], mask_embed[rows]
    logits = _KnownProduct.apply(embed.to(values.dtype), pixel_embed.to(values.dtype), values)
    slots = torch.arange(assignment.shape[-1], device=assignment.device)
    return logits, torch.where(assignment < 0, -1, slots)


class _KnownProduct(torch.autograd.Function):
    """``einsum("lbmc,bchw->lbmhw")`` of the first two arguments, whose value is the third."""

    @staticmethod
    def forward(ctx: FunctionCtx, embed: Tensor, pixel_embed: Tensor, product: Tensor) -> Tensor:
        ctx.save_for_backward(embed, pixel_embed)
        return product.view_as(product)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        embed, pixel_embed = ctx.saved_tensors
        grad_embed = torch.einsum("lbmhw,bchw->lbmc", grad, pixel_embed)
        grad_pixel = torch.einsum("lbmc,lbmhw->bchw", embed, grad)
        return grad_embed, grad_pixel, None
