"""The matching cost of every query against every target, at random points."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask.functional._backend import choose_backend
from fastmask.functional._checks import (
    check_class_logits,
    check_mask_logits,
    check_mask_term,
    check_pair_of_logits,
    check_points,
    computing_dtype,
    stack_layers,
)
from fastmask.ops.point_mask_cost import OPERATOR
from fastmask.targets import Targets


@torch.no_grad()
def point_mask_cost(
    class_logits: Tensor,
    mask_logits: Tensor,
    targets: Targets,
    points: Tensor,
    *,
    cost_class: float = 1.0,
    cost_mask: float = 1.0,
    cost_dice: float = 1.0,
    mask_term: str = "bce",
    alpha: float = 0.25,
    gamma: float = 2.0,
    ignore_void: bool = False,
    backend: str = "auto",
) -> Tensor:
    """The matcher's matrix from P points of each image instead of all pixels (Mask2Former, arXiv:2112.01527, 3.3).

    cost = cost_class * (-softmax(class_logits)[label]) + cost_mask * mask term + cost_dice * dice term. With x the mask
    logits and T the binary targets, both sampled bilinearly at a point (align_corners=False, 0 beyond the map), so that
    T is a fraction on an outline, p = sigmoid(x) and v the weight of a point, usually 1:

    - ``mask_term="bce"``: (sum T softplus(-x) + (v - T) softplus(x)) / sum v;
    - ``mask_term="focal"``: the same with alpha (1-p)^gamma softplus(-x) and (1-alpha) p^gamma softplus(x) (RetinaNet,
      arXiv:1708.02002, equation 5);
    - dice term: 1 - (2 sum p T + 1) / (sum v p + sum T + 1) (V-Net, arXiv:1606.04797).

    A query with a NaN logit costs NaN, one with an infinite logit may; ``assign`` takes such pairs last.

    Args:
        class_logits: ``(..., B, N, K+1)`` floating point; the last class is "no object".
        mask_logits: ``(..., B, N, h, w)`` floating point. Any leading dimensions, usually L decoder layers, or none.
        targets: of the B images, on the same device, at any resolution H x W.
        points: ``(B, P, 2)`` float32, (x, y) in 0..1 from the left and the top, shared by all layers, queries and
            targets of an image. Points beyond the map sample 0.
        cost_class, cost_mask, cost_dice: the weights of the three terms.
        mask_term: "bce" or "focal".
        alpha: weight of foreground in the focal loss, 0..1.
        gamma: focusing parameter of the focal loss, >= 0.
        ignore_void: a point counts by v = 1 - the bilinear share of void pixels in it, and sum v is taken to be at
            least 1; otherwise void pixels are background.
        backend: "auto", "reference", "native" or "triton".

    Returns:
        ``(..., B, N, M)`` float32 (float64 for float64 logits, which only the reference reads); 0 in the columns of
        padding. Carries no gradient.

    Raises:
        ValueError: shapes, devices, labels or options that do not fit.
        TypeError: logits that are not floating point, or points that are not float32 or float64.
        RuntimeError: the backend asked for cannot run.
    """
    check_mask_logits(mask_logits, targets)
    check_class_logits(class_logits, targets)
    check_pair_of_logits(class_logits, mask_logits)
    check_points(points, (targets.batch_size,), "(B, P, 2)", targets)
    check_mask_term(mask_term, alpha, gamma)
    backend = choose_backend(OPERATOR, backend, mask_logits)
    if backend == "reference":
        from fastmask import reference

        dtype = computing_dtype(class_logits, mask_logits)
        return reference.point_mask_cost(
            class_logits.to(dtype),
            mask_logits.to(dtype),
            targets.labels,
            targets.dense_masks(),
            points,
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
        points.float(),
        cost_class,
        cost_mask,
        cost_dice,
        mask_term,
        alpha,
        gamma,
    )
    return cost.view(*mask_logits.shape[:-2], targets.num_targets)
