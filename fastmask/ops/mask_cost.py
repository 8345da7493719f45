"""The matching cost of every query against every target, at all pixels or at points.

``fastmask::mask_cost`` and ``fastmask::point_mask_cost`` return ``(L, B, N, M)`` float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask.mask_term import FOCAL, MaskTerm
from fastmask.ops._checks import (
    check_class_logits,
    check_mask_logits,
    check_mask_term,
    check_pair_of_logits,
    check_points,
    computing_dtype,
    stack_layers,
)
from fastmask.ops._registry import Operator, choose_backend
from fastmask.ops._targets import TARGETS, target_arguments
from fastmask.targets import Targets


@torch.no_grad()
def mask_cost(
    class_logits: Tensor,
    mask_logits: Tensor,
    targets: Targets,
    points: Tensor | None = None,
    *,
    cost_class: float = 1.0,
    cost_mask: float = 1.0,
    cost_dice: float = 1.0,
    term: MaskTerm = FOCAL,
    backend: str = "auto",
) -> Tensor:
    """The matcher's cost matrices, for all layers, images, queries and targets in one pass over the logits.

    cost = cost_class * (-softmax(class_logits)[label]) + cost_mask * mask term + cost_dice * dice term, where x are the
    mask logits, T the targets, p = sigmoid(x), v the weights of pixels or points, and sums run over pixels or points:

    - "focal": (sum T F+ + (v - T) F-) / sum v with F+ = alpha (1-p)^gamma softplus(-x) and
      F- = (1-alpha) p^gamma softplus(x) (RetinaNet, arXiv:1708.02002, equation 5; MaskFormer, arXiv:2107.06278,
      section 3.2);
    - "bce": the same with F+ = softplus(-x) and F- = softplus(x) (Mask2Former, arXiv:2112.01527);
    - dice term: 1 - (2 sum p T + 1) / (sum v p + sum T + 1) (V-Net, arXiv:1606.04797).

    Without ``points`` the sums run over the h x w logits, and T is resized to them by the "nearest" rule, as in
    MaskFormer's matcher. With ``points`` both x and T are sampled bilinearly (align_corners=False, 0 beyond the map),
    so that T is a fraction on outlines, as in Mask2Former's matcher (section 3.3).

    A query with a NaN logit costs NaN; one with an infinite logit may, too. ``assign`` takes such pairs last.

    Args:
        class_logits: ``(..., B, N, K+1)`` floating point; the last class is "no object".
        mask_logits: ``(..., B, N, h, w)`` floating point. Any leading dimensions, usually L decoder layers, or none.
        targets: the targets of the B images, on the same device, at any resolution H x W.
        points: ``(B, P, 2)`` float32, (x, y) in 0..1 from the left and the top, shared by all layers, queries and
            targets of an image. Points beyond the map sample 0. None compares all pixels.
        cost_class, cost_mask, cost_dice: the weights of the three terms.
        term: the mask term with its alpha and gamma. With ``ignore_void``, v is 0 at a void pixel and 1 - the bilinear
            share of void pixels at a point, and sum v counts as at least 1; otherwise v is 1 everywhere.
        backend: "auto", "reference", "native" or "triton".

    Returns:
        ``(..., B, N, M)`` float32 (float64 for float64 logits, which only the reference reads); 0 in the columns of
        padding. Carries no gradient.

    Raises:
        ValueError: shapes, devices, labels or options that do not fit.
        TypeError: logits that are not floating point, or points that are not float32 or float64.
        RuntimeError: the requested backend cannot run.
    """
    check_mask_logits(mask_logits, targets)
    check_class_logits(class_logits, targets)
    check_pair_of_logits(class_logits, mask_logits)
    if points is not None:
        check_points(points, (targets.batch_size,), "(B, P, 2)", targets)
    check_mask_term(term)
    operator = MASK_COST if points is None else POINT_MASK_COST
    backend = choose_backend(operator, backend, mask_logits)
    if backend == "reference":
        from fastmask import reference

        dtype = computing_dtype(class_logits, mask_logits)
        return reference.mask_cost(
            class_logits.to(dtype),
            mask_logits.to(dtype),
            targets.labels,
            targets.dense_masks(),
            points,
            cost_class=cost_class,
            cost_mask=cost_mask,
            cost_dice=cost_dice,
            mask_term=term.kind,
            alpha=term.alpha,
            gamma=term.gamma,
            valid=targets.valid_pixels() if term.ignore_void else None,
        )
    cost = operator(
        backend,
        stack_layers(class_logits, 3),
        stack_layers(mask_logits, 4),
        *target_arguments(targets, term.ignore_void),
        *(() if points is None else (points.float(),)),
        cost_class,
        cost_mask,
        cost_dice,
        *(term.kind, term.alpha, term.gamma),
    )
    return cost if mask_logits.dim() == 5 else cost.view(*mask_logits.shape[:-2], targets.num_targets)


def _fake(class_logits: Tensor, mask_logits: Tensor, labels: Tensor, *_: object) -> Tensor:
    return mask_logits.new_empty((*mask_logits.shape[:3], labels.shape[1]), dtype=torch.float32)


_SCHEMA = (
    f"(Tensor class_logits, Tensor mask_logits, {TARGETS}, {{points}}float cost_class, float cost_mask, "
    "float cost_dice, str mask_term, float alpha, float gamma) -> Tensor"
)
MASK_COST = Operator("mask_cost", _SCHEMA.format(points=""), _fake, native=("cpu",), triton="mask_cost")
POINT_MASK_COST = Operator(
    "point_mask_cost", _SCHEMA.format(points="Tensor points, "), _fake, native=("cpu",), triton="point_mask_cost"
)
