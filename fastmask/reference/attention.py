"""Masked cross-attention of queries over an image."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmask.reference._common import check_shape, resize_logits


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask_logits: Tensor | None,
    *,
    grid: tuple[int, int],
    num_heads: int,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """softmax(M + scale q k^T) v in each head, M = 0 where a query's mask is foreground and -inf elsewhere.

    Mask2Former (arXiv:2112.01527), equations 2 and 3. Foreground is sigmoid(up(mask_logits)) >= 0.5, which is
    up(mask_logits) >= 0, where up is the bilinear resampling (align_corners=False) to the grid of the keys. A key that
    reads a NaN or -inf is background; otherwise one that reads +inf is foreground; logits of weight 0 are not read. A
    query without any foreground among the keys that are not padding attends to all of those. The mask is shared by all
    heads and carries no gradient. Keys marked as padding are never attended to, whatever they hold; where all keys are
    padding the output is 0.

    Args:
        q: ``(B, N, E)`` float; head i owns channels ``i * E / num_heads`` onward.
        k, v: ``(B, S, E)`` float, row by row over the grid.
        mask_logits: ``(B, N, h, w)`` float, or None for attention without a mask.
        grid: (gh, gw) of the keys, gh * gw = S.
        num_heads: the number of heads, which divides E.
        scale: the factor on q k^T; (E / num_heads)^-0.5 by default.
        key_padding_mask: ``(B, S)`` bool, True at padding.
        dropout_p: the probability of dropping an attention weight; the others are scaled by 1 / (1 - dropout_p).

    Returns:
        ``(B, N, E)`` in the dtype of ``q``, heads concatenated, before any output projection.

    Raises:
        ValueError: shapes that do not fit, or a ``num_heads`` that does not divide E.
    """
    batch_size, num_queries, channels = q.shape
    num_keys = grid[0] * grid[1]
    check_shape("k", k, (batch_size, num_keys, channels))
    check_shape("v", v, (batch_size, num_keys, channels))
    if channels % num_heads != 0:
        raise ValueError(f"num_heads={num_heads} does not divide the {channels} channels of q")
    if scale is None:
        scale = (channels // num_heads) ** -0.5

    padding = torch.zeros(batch_size, num_keys, dtype=torch.bool, device=q.device)
    if key_padding_mask is not None:
        check_shape("key_padding_mask", key_padding_mask, (batch_size, num_keys))
        padding = key_padding_mask
    # A padded key may hold NaN, which a weight of 0 would carry to the output.
    k, v = (x.masked_fill(padding[..., None], 0) for x in (k, v))

    present = ~padding[:, None, :].expand(-1, num_queries, -1)  # [B, N, S]
    attended = present
    if mask_logits is not None:
        check_shape("mask_logits", mask_logits, (batch_size, num_queries, -1, -1))
        foreground = present & (resize_logits(mask_logits.detach(), grid).flatten(2) >= 0)
        attended = foreground | (present & ~foreground.any(-1, keepdim=True))

    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))  # [B, heads, N or S, E / heads]
    scores = scale * q @ k.transpose(-2, -1)
    excluded = ~attended[:, None]  # [B, 1, N, S]
    # Rows without any key keep their scores and are zeroed after the softmax: -inf everywhere would give NaN gradients.
    empty = excluded.all(-1, keepdim=True)
    weights = scores.masked_fill(excluded & ~empty, -torch.inf).softmax(-1).masked_fill(empty, 0)
    weights = F.dropout(weights, dropout_p)
    return (weights @ v).transpose(1, 2).flatten(2)
