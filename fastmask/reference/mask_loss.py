"""The mask and dice losses of the matched pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask.reference._common import (
    MASK_TERMS,
    check_choice,
    check_focal,
    check_shape,
    foreground_term,
    resize_logits,
)


def mask_loss(
    mask_logits: Tensor,
    assignment: Tensor,
    masks: Tensor,
    *,
    mask_term: str = "focal",
    alpha: float = 0.25,
    gamma: float = 2.0,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Both losses of each matched pair, at the resolution of the targets.

    With x the logits of the target's query, upsampled bilinearly (align_corners=False) to H x W, p = sigmoid(x), t the
    binary target and P the pixels c counted::

        mask = sum_c (t F+ + (1 - t) F-) / #P
        F+ = alpha (1 - p)^gamma softplus(-x),  F- = (1 - alpha) p^gamma softplus(x)     mask_term="focal"
        F+ = softplus(-x),  F- = softplus(x)                                             mask_term="bce"
        dice = 1 - (2 sum_c p t + 1) / (sum_c p + sum_c t + 1)

    Sources: MaskFormer (arXiv:2107.06278), sections 3.2 and 3.3; focal loss RetinaNet (arXiv:1708.02002), equation 5;
    dice V-Net (arXiv:1606.04797), section 3, smoothed by 1; Mask2Former (arXiv:2112.01527) uses "bce".

    Args:
        mask_logits: ``(..., B, N, h, w)`` float; differentiable.
        assignment: ``(..., B, M)`` int64, the query of each target; -1 where there is none.
        masks: ``(B, M, H, W)`` bool or uint8, non-zero where the pixel belongs to the target.
        mask_term: "focal" or "bce".
        alpha, gamma: of the focal term.
        valid: ``(B, H, W)`` bool; pixels where it is False count nowhere, neither in the sums nor in #P, which is at
            least 1. All pixels by default.

    Returns:
        ``(pair_mask, pair_dice)``, both ``(..., B, M)`` in the dtype of the logits; 0 where ``assignment`` is -1.

    Raises:
        ValueError: an unknown ``mask_term``, alpha outside 0..1, a negative gamma, or shapes that do not fit.
    """
    check_choice("mask_term", mask_term, MASK_TERMS)
    check_focal(alpha, gamma)
    batch_size, num_targets, height, width = masks.shape
    check_shape("mask_logits", mask_logits, (batch_size, -1, -1, -1))
    check_shape("assignment", assignment, (*mask_logits.shape[:-4], batch_size, num_targets))
    counted = torch.ones(batch_size, 1, height, width, dtype=torch.bool, device=mask_logits.device)
    if valid is not None:
        check_shape("valid", valid, (batch_size, height, width))
        counted = valid[:, None]

    unmatched = assignment < 0
    index = assignment.clamp(min=0)[..., None, None]
    # Filled before anything else: a NaN of the query that stands in for "none" must not reach its gradient.
    matched = torch.take_along_dim(mask_logits, index, dim=-3).masked_fill(unmatched[..., None, None], 0)
    x = resize_logits(matched, (height, width)).masked_fill(~counted, 0)  # [..., B, M, H, W]
    p = torch.sigmoid(x) * counted
    t = masks.bool() & counted

    # One term for both kinds of pixel, of -x in the background: not even 0 times the other reaches a gradient.
    alphas = torch.where(t, x.new_tensor(alpha), x.new_tensor(1 - alpha))
    per_pixel = foreground_term(torch.where(t, x, -x), mask_term, alphas, gamma) * counted
    pair_mask = _sum_pixels(per_pixel) / _sum_pixels(counted).clamp(min=1)
    pair_dice = 1 - (2 * _sum_pixels(p * t) + 1) / (_sum_pixels(p) + _sum_pixels(t) + 1)
    return pair_mask.masked_fill(unmatched, 0), pair_dice.masked_fill(unmatched, 0)


def _sum_pixels(maps: Tensor) -> Tensor:
    return maps.sum((-2, -1))
