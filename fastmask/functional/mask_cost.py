"""The matching cost of every query against every target."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask.functional._backend import choose_backend
from fastmask.functional._checks import (
    check_class_logits,
    check_mask_logits,
    check_mask_term,
    check_pair_of_logits,
    computing_dtype,
    stack_layers,
)
from fastmask.ops.mask_cost import OPERATOR
from fastmask.targets import Targets


@torch.no_grad()
def mask_cost(
    class_logits: Tensor,
    mask_logits: Tensor,
    targets: Targets,
    *,
    cost_class: float = 1.0,
    cost_mask: float = 1.0,
    cost_dice: float = 1.0,
    mask_term: str = "focal",
    alpha: float = 0.25,
    gamma: float = 2.0,
    ignore_void: bool = False,
    backend: str = "auto",
) -> Tensor:
    """The matrix that the matcher solves, for all layers, images, queries and targets in one pass over the logits.

    cost = cost_class * (-softmax(class_logits)[label]) + cost_mask * mask term + cost_dice * dice term, where, with
    T the targets sampled at the nearest of their pixels for each of the h x w logits x, and p = sigmoid(x):

    - ``mask_term="focal"``: mean over pixels of alpha (1-p)^gamma softplus(-x) inside T and (1-alpha) p^gamma
      softplus(x) outside (RetinaNet, arXiv:1708.02002, equation 5; MaskFormer, arXiv:2107.06278, section 3.2);
    - ``mask_term="bce"``: mean over pixels of softplus(-x) inside and softplus(x) outside (Mask2Former,
      arXiv:2112.01527);
    - dice term: 1 - (2 sum p T + 1) / (sum p + sum T + 1) (V-Net, arXiv:1606.04797).

    A query with a NaN logit costs NaN, one with an infinite logit may; ``assign`` takes such pairs last.

    Args:
        class_logits: ``(..., B, N, K+1)`` floating point; the last class is "no object".
        mask_logits: ``(..., B, N, h, w)`` floating point. Any leading dimensions, usually L decoder layers, or none.
        targets: of the B images, on the same device, at any resolution H x W.
        cost_class, cost_mask, cost_dice: the weights of the three terms.
        mask_term: "focal" or "bce".
        alpha: weight of foreground in the focal loss, 0..1.
        gamma: focusing parameter of the focal loss, >= 0.
        ignore_void: leave void pixels out of all sums and means; otherwise they are background.
        backend: "auto", "reference", "native" or "triton".

    Returns:
        ``(..., B, N, M)`` float32 (float64 for float64 logits, which only the reference reads); 0 in the columns of
        padding. Carries no gradient.

    Raises:
        ValueError: shapes, devices, labels or options that do not fit.
        TypeError: logits that are not floating point.
        RuntimeError: the backend asked for cannot run.
    """
    check_mask_logits(mask_logits, targets)
    check_class_logits(class_logits, targets)
    check_pair_of_logits(class_logits, mask_logits)
    check_mask_term(mask_term, alpha, gamma)
    backend = choose_backend(OPERATOR, backend, mask_logits)
    if backend == "reference":
        from fastmask import reference

        dtype = computing_dtype(class_logits, mask_logits)
        return reference.mask_cost(
            class_logits.to(dtype),
            mask_logits.to(dtype),
            targets.labels,
            targets.dense_masks(),
            cost_class=cost_class,
            cost_mask=cost_mask,
            cost_dice=cost_dice,
            mask_term=mask_term,
            alpha=alpha,
            gamma=gamma,
            valid=targets.valid_pixels() if ignore_void else None,
        )
    cost = OPERATOR(
        backend,
        stack_layers(class_logits, 3),
        stack_layers(mask_logits, 4),
        targets.labels,
        targets.masks,
        targets.segments,
        targets.valid,
        targets.void,
        ignore_void,
        cost_class,
        cost_mask,
        cost_dice,
        mask_term,
        alpha,
        gamma,
    )
    return cost.view(*mask_logits.shape[:-2], targets.num_targets)
