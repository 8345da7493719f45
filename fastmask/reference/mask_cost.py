"""The matching cost between every query and every target, at all pixels or at points."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask.reference._common import MASK_TERMS, check_choice, check_focal, check_shape, mask_terms, resize_nearest
from fastmask.reference.points import sample_points, sampled_targets


def mask_cost(
    class_logits: Tensor,
    mask_logits: Tensor,
    labels: Tensor,
    masks: Tensor,
    points: Tensor | None = None,
    *,
    cost_class: float = 1.0,
    cost_mask: float = 1.0,
    cost_dice: float = 1.0,
    mask_term: str = "focal",
    alpha: float = 0.25,
    gamma: float = 2.0,
    valid: Tensor | None = None,
) -> Tensor:
    """C = cost_class * (-P) + cost_mask * F + cost_dice * D for each query n and target m.

    With x the mask logits, T the targets, p = sigmoid(x) and v the weights, all at the pixels or points i::

        P[n, m] = softmax(class_logits[n])[label m]
        F[n, m] = (sum_i F+[n, i] T[m, i] + sum_i F-[n, i] (v[i] - T[m, i])) / sum_i v[i]
        F+ = alpha (1 - p)^gamma softplus(-x),  F- = (1 - alpha) p^gamma softplus(x)     mask_term="focal"
        F+ = softplus(-x),  F- = softplus(x)                                             mask_term="bce"
        D[n, m] = 1 - (2 sum_i p[n, i] T[m, i] + 1) / (sum_i v[i] p[n, i] + sum_i T[m, i] + 1)

    Without ``points``, i are the pixels of the h x w logits, T is resized to them by the "nearest" rule, and v is 1
    where the pixel counts, else 0. With ``points``, ``sample_points`` reads both x and T there, so that T is a fraction
    on outlines.

    Sources: MaskFormer (arXiv:2107.06278), section 3.2 and its matcher, which adds the dice term (V-Net,
    arXiv:1606.04797, smoothed by 1) and uses the focal loss (RetinaNet, arXiv:1708.02002); Mask2Former
    (arXiv:2112.01527), section 3.3, compares at points and uses "bce".

    Args:
        class_logits: ``(..., B, N, K+1)`` float.
        mask_logits: ``(..., B, N, h, w)`` float.
        labels: ``(B, M)`` int64 in ``0..K-1``, -1 for padding.
        masks: ``(B, M, H, W)`` bool or uint8, non-zero where the pixel belongs to the target.
        points: ``(B, P, 2)`` float, (x, y) in 0..1, shared by all layers, queries and targets of an image.
        cost_class, cost_mask, cost_dice: the weights of the three terms.
        mask_term: "focal" or "bce".
        alpha, gamma: the parameters of the focal term.
        valid: ``(B, H, W)`` bool, False for void pixels, which belong to no target and do not count: v at a point is
            1 - their bilinear share, and sum_i v counts as at least 1. By default all pixels are valid and v = 1.

    Returns:
        ``(..., B, N, M)`` in the promoted dtype of the logits, in which all arithmetic runs; 0 in columns of padding.

    Raises:
        ValueError: an unknown ``mask_term``, alpha outside 0..1, a negative gamma, or shapes that do not fit.
    """
    check_choice("mask_term", mask_term, MASK_TERMS)
    check_focal(alpha, gamma)
    dtype = torch.promote_types(class_logits.dtype, mask_logits.dtype)
    batch_size, num_targets = labels.shape
    num_queries, height, width = mask_logits.shape[-3:]
    grid = (height, width)
    check_shape("mask_logits", mask_logits, (batch_size, num_queries, *grid))
    check_shape("class_logits", class_logits, (batch_size, num_queries, -1))
    check_shape("masks", masks, (batch_size, num_targets, -1, -1))

    if points is None:
        weights = torch.ones(batch_size, 1, *grid, dtype=torch.bool, device=mask_logits.device)
        if valid is not None:
            check_shape("valid", valid, (batch_size, *masks.shape[-2:]))
            weights = resize_nearest(valid, grid)[:, None]
        weights = weights.flatten(2).to(dtype)  # [B, 1, P]
        targets = resize_nearest(masks.bool(), grid).flatten(2) * weights  # [B, M, P]
        x = mask_logits.to(dtype).flatten(-2)  # [..., B, N, P]
    else:
        check_shape("points", points, (batch_size, -1, 2))
        targets, weights = sampled_targets(masks, valid, points[:, None], dtype)
        x = sample_points(mask_logits.to(dtype), points[:, None].expand(*mask_logits.shape[:-2], *points.shape[-2:]))
    # Filled before the products, so that NaN logits of weight 0 do not contribute.
    x = x.masked_fill(weights == 0, 0)
    p = torch.sigmoid(x)

    probabilities = class_logits.to(dtype).softmax(-1)
    index = labels.clamp(min=0)[:, None, :].expand(*probabilities.shape[:-1], num_targets)
    class_term = -probabilities.gather(-1, index)

    positive, negative = mask_terms(x, mask_term, alpha, gamma)
    loss = _pair_sums(positive, targets) + _pair_sums(negative, weights - targets)
    mask_part = loss / weights.sum(-1, keepdim=True).clamp(min=1)

    overlap = 2 * _pair_sums(p, targets) + 1
    dice_term = 1 - overlap / ((p * weights).sum(-1)[..., None] + targets.sum(-1)[:, None, :] + 1)

    cost = cost_class * class_term + cost_mask * mask_part + cost_dice * dice_term
    return cost.masked_fill((labels < 0)[:, None, :], 0)


def _pair_sums(maps: Tensor, targets: Tensor) -> Tensor:
    """``(..., B, N, P)`` and ``(B, M, P)`` to ``(..., B, N, M)``: the sum over P of each pair's product."""
    return torch.einsum("...nc,...mc->...nm", maps, targets)
