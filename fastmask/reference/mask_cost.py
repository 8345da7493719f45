"""The matching cost between every query and every target."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask.reference._common import MASK_TERMS, check_choice, check_focal, check_shape, mask_terms, resize_nearest


def mask_cost(
    class_logits: Tensor,
    mask_logits: Tensor,
    labels: Tensor,
    masks: Tensor,
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

    With x the mask logits, p = sigmoid(x), T the targets on the grid of the logits and P the pixels c counted::

        P[n, m] = softmax(class_logits[n])[label m]
        F[n, m] = (sum_c F+[n, c] T[m, c] + sum_c F-[n, c] (1 - T[m, c])) / #P
        F+ = alpha (1 - p)^gamma softplus(-x),  F- = (1 - alpha) p^gamma softplus(x)     mask_term="focal"
        F+ = softplus(-x),  F- = softplus(x)                                             mask_term="bce"
        D[n, m] = 1 - (2 sum_c p[n, c] T[m, c] + 1) / (sum_c p[n, c] + sum_c T[m, c] + 1)

    Targets are brought to the h x w grid by the "nearest" rule. Sources: MaskFormer (arXiv:2107.06278), section 3.2 and
    its matcher, which adds the dice term (V-Net, arXiv:1606.04797, smoothed by 1) and uses the focal loss (RetinaNet,
    arXiv:1708.02002); Mask2Former (arXiv:2112.01527) uses "bce".

    Args:
        class_logits: ``(..., B, N, K+1)`` float.
        mask_logits: ``(..., B, N, h, w)`` float.
        labels: ``(B, M)`` int64 in ``0..K-1``, -1 for padding.
        masks: ``(B, M, H, W)`` bool or uint8, non-zero where the pixel belongs to the target.
        cost_class, cost_mask, cost_dice: the weights of the three terms.
        mask_term: "focal" or "bce".
        alpha, gamma: of the focal term.
        valid: ``(B, H, W)`` bool; pixels where it is False (after the same downsampling) count nowhere, neither in the
            sums nor in #P, which is at least 1. All pixels by default.

    Returns:
        ``(..., B, N, M)`` in the promoted dtype of the logits, in which all arithmetic runs; 0 in columns of padding.

    Raises:
        ValueError: an unknown ``mask_term``, alpha outside 0..1, a negative gamma, or shapes that do not fit.
    """
    check_choice("mask_term", mask_term, MASK_TERMS)
    check_focal(alpha, gamma)
    dtype = torch.promote_types(class_logits.dtype, mask_logits.dtype)
    batch_size, num_targets = labels.shape
    num_queries, grid = mask_logits.shape[-3], tuple(mask_logits.shape[-2:])
    check_shape("mask_logits", mask_logits, (batch_size, num_queries, *grid))
    check_shape("class_logits", class_logits, (batch_size, num_queries, -1))
    check_shape("masks", masks, (batch_size, num_targets, -1, -1))

    # [B, 1, c]
    counted = torch.ones(batch_size, 1, grid[0] * grid[1], dtype=torch.bool, device=mask_logits.device)
    if valid is not None:
        check_shape("valid", valid, (batch_size, *masks.shape[-2:]))
        counted = resize_nearest(valid, grid).flatten(1)[:, None]
    # [B, M, c]
    foreground = (resize_nearest(masks.bool(), grid).flatten(2) & counted).to(dtype)
    background = counted.to(dtype) - foreground
    # A pixel that is not counted must not contribute even when its logit is NaN, hence the fill before the products.
    x = mask_logits.to(dtype).flatten(-2).masked_fill(~counted, 0)  # [..., B, N, c]
    p = torch.sigmoid(x) * counted

    probabilities = class_logits.to(dtype).softmax(-1)
    index = labels.clamp(min=0)[:, None, :].expand(*probabilities.shape[:-1], num_targets)
    class_term = -probabilities.gather(-1, index)

    positive, negative = mask_terms(x, mask_term, alpha, gamma)
    loss = _pair_sums(positive, foreground) + _pair_sums(negative, background)
    mask_part = loss / counted.sum(-1, keepdim=True).clamp(min=1)

    overlap = 2 * _pair_sums(p, foreground) + 1
    dice_term = 1 - overlap / (p.sum(-1)[..., None] + foreground.sum(-1)[:, None, :] + 1)

    cost = cost_class * class_term + cost_mask * mask_part + cost_dice * dice_term
    return cost.masked_fill((labels < 0)[:, None, :], 0)


def _pair_sums(maps: Tensor, targets: Tensor) -> Tensor:
    """``(..., B, N, c)`` and ``(B, M, c)`` to ``(..., B, N, M)``: the sum over pixels of each pair's product."""
    return torch.einsum("...nc,...mc->...nm", maps, targets)
