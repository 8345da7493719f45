"""The mask and dice losses of the matched pairs, at all pixels or at points."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask.reference._common import (
    MASK_TERMS,
    check_choice,
    check_focal,
    check_shape,
    foreground_term,
    mask_terms,
    resize_logits,
)
from fastmask.reference.points import matched_logits, sample_points, sampled_targets


def mask_loss(
    mask_logits: Tensor,
    assignment: Tensor,
    masks: Tensor,
    points: Tensor | None = None,
    *,
    mask_term: str = "focal",
    alpha: float = 0.25,
    gamma: float = 2.0,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The mask and dice losses of each matched pair.

    With x the logits of the target's query, t the target, p = sigmoid(x) and v the weights, all at the pixels or points
    i::

        mask = sum_i (t F+ + (v - t) F-) / sum_i v
        F+ = alpha (1 - p)^gamma softplus(-x),  F- = (1 - alpha) p^gamma softplus(x)     mask_term="focal"
        F+ = softplus(-x),  F- = softplus(x)                                             mask_term="bce"
        dice = 1 - (2 sum_i p t + 1) / (sum_i v p + sum_i t + 1)

    Without ``points``, i are the H x W pixels of the targets, to which the logits are upsampled bilinearly
    (align_corners=False), and v is 1 where the pixel counts, else 0. With ``points``, ``sample_points`` reads both x
    and t there.

    Sources: MaskFormer (arXiv:2107.06278), sections 3.2 and 3.3; focal loss RetinaNet (arXiv:1708.02002), equation 5;
    dice V-Net (arXiv:1606.04797), section 3, smoothed by 1; Mask2Former (arXiv:2112.01527), section 3.3, compares at
    points and uses "bce".

    Args:
        mask_logits: ``(..., B, N, h, w)`` float; differentiable.
        assignment: ``(..., B, M)`` int64, the query of each target; -1 for unmatched targets and padding.
        masks: ``(B, M, H, W)`` bool or uint8, non-zero where the pixel belongs to the target.
        points: ``(..., B, M, P, 2)`` float, each target's points (x, y) in 0..1.
        mask_term: "focal" or "bce".
        alpha, gamma: the parameters of the focal term.
        valid: ``(B, H, W)`` bool, False for void pixels, which belong to no target and do not count: v at a point is
            1 - their bilinear share, and sum_i v counts as at least 1. By default all pixels are valid and v = 1.

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

    matched = matched_logits(mask_logits, assignment)
    if points is None:
        counted = torch.ones(batch_size, 1, height, width, dtype=torch.bool, device=mask_logits.device)
        if valid is not None:
            check_shape("valid", valid, (batch_size, height, width))
            counted = valid[:, None]
        counted = counted.flatten(2)
        x = resize_logits(matched, (height, width)).flatten(-2).masked_fill(~counted, 0)  # [..., B, M, P]
        inside = masks.bool().flatten(2) & counted
        # A single term, of x in the foreground and -x in the background, so that the other term never reaches a
        # gradient, not even times 0.
        alphas = torch.where(inside, x.new_tensor(alpha), x.new_tensor(1 - alpha))
        terms = foreground_term(torch.where(inside, x, -x), mask_term, alphas, gamma) * counted
        t, v = inside.to(x.dtype), counted.to(x.dtype)
    else:
        check_shape("points", points, (*assignment.shape, -1, 2))
        t, v = sampled_targets(masks, valid, points, mask_logits.dtype)
        x = sample_points(matched, points).masked_fill(v == 0, 0)
        foreground, background = mask_terms(x, mask_term, alpha, gamma)
        terms = t * foreground + (v - t) * background

    p = torch.sigmoid(x)
    pair_mask = terms.sum(-1) / v.sum(-1).clamp(min=1)
    pair_dice = 1 - (2 * (p * t).sum(-1) + 1) / ((p * v).sum(-1) + t.sum(-1) + 1)
    unmatched = assignment < 0
    return pair_mask.masked_fill(unmatched, 0), pair_dice.masked_fill(unmatched, 0)
