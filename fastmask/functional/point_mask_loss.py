"""The mask and dice losses of the matched pairs, at points instead of all pixels."""

from __future__ import annotations

from torch import Tensor

from fastmask.functional._backend import choose_backend
from fastmask.functional._checks import (
    check_assignment,
    check_choice,
    check_mask_logits,
    check_mask_term,
    check_points,
    computing_dtype,
    stack_layers,
)
from fastmask.ops.point_mask_loss import OPERATOR
from fastmask.targets import Targets


def point_mask_loss(
    mask_logits: Tensor,
    targets: Targets,
    assignment: Tensor,
    points: Tensor,
    *,
    num_masks: Tensor | float | None = None,
    mask_term: str = "bce",
    alpha: float = 0.25,
    gamma: float = 2.0,
    ignore_void: bool = False,
    reduction: str = "sum",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Cross-entropy (or focal) and dice losses of the matched queries at P points of each pair (Mask2Former,
    arXiv:2112.01527, section 3.3).

    With x the logits of a target's query and t the binary target, both sampled bilinearly at a point
    (align_corners=False, 0 beyond the map), so that t is a fraction on an outline, p = sigmoid(x) and v the weight of a
    point, usually 1, a pair's losses are

    - mask: (sum t softplus(-x) + (v - t) softplus(x)) / sum v, or for ``mask_term="focal"`` the same with
      alpha (1-p)^gamma softplus(-x) and (1-alpha) p^gamma softplus(x) (RetinaNet, arXiv:1708.02002, equation 5);
    - dice: 1 - (2 sum p t + 1) / (sum v p + sum t + 1) (V-Net, arXiv:1606.04797).

    Nothing of size H * W is stored, and no logits are gathered, neither forward nor for backward. A logit without
    weight in a point is not read; an infinite one or NaN beside a point that counts reaches its pair's losses alone.

    Args:
        mask_logits: ``(..., B, N, h, w)`` floating point; any leading dimensions, usually L decoder layers, or none.
        targets: of the B images, on the same device, at any resolution H x W.
        assignment: ``(..., B, M)`` int64, the query of each target; -1 for padding and unmatched targets.
        points: ``(..., B, M, P, 2)`` float32, (x, y) in 0..1 from the left and the top, of each target; usually from
            ``uncertain_points``. Points beyond the map sample 0. They get no gradient.
        num_masks: what the sums over pairs are divided by; the number of targets of the batch, at least 1, by default.
        mask_term: "bce" or "focal".
        alpha: weight of foreground in the focal loss, 0..1.
        gamma: focusing parameter of the focal loss, >= 0.
        ignore_void: a point counts by v = 1 - the bilinear share of void pixels in it, and sum v is taken to be at
            least 1; otherwise void pixels are background.
        reduction: "sum", over pairs and divided by ``num_masks``; or "none".
        backend: "auto", "reference", "native" or "triton".

    Returns:
        (loss_mask, loss_dice), float32 (float64 for float64 logits, which only the reference reads): ``(...)``, one
        value a layer, or ``(..., B, M)`` with ``reduction="none"``, 0 for unmatched targets. Differentiable once with
        respect to ``mask_logits``; queries without a target get a zero gradient.

    Raises:
        ValueError: shapes, devices, indices or options that do not fit.
        TypeError: logits that are not floating point, an assignment that is not int64, or points that are not
            float32 or float64.
        RuntimeError: the backend asked for cannot run.
    """
    check_mask_logits(mask_logits, targets)
    check_assignment(assignment, tuple(mask_logits.shape[:-4]), mask_logits.shape[-3], targets)
    check_points(points, tuple(assignment.shape), "(..., B, M, P, 2)", targets)
    check_mask_term(mask_term, alpha, gamma)
    check_choice("reduction", reduction, ("sum", "none"))
    backend = choose_backend(OPERATOR, backend, mask_logits)
    if backend == "reference":
        from fastmask import reference

        pair_mask, pair_dice = reference.point_mask_loss(
            mask_logits.to(computing_dtype(mask_logits)),
            assignment,
            targets.dense_masks(),
            points,
            mask_term=mask_term,
            alpha=alpha,
            gamma=gamma,
            valid=targets.valid_pixels() if ignore_void else None,
        )
    else:
        pair_mask, pair_dice, _ = OPERATOR(
            backend,
            stack_layers(mask_logits, 4),
            stack_layers(assignment, 2),
            targets.labels,
            targets.masks,
            targets.segments,
            targets.valid,
            targets.void,
            ignore_void,
            stack_layers(points.float(), 4),
            mask_term,
            alpha,
            gamma,
        )
        pair_mask, pair_dice = pair_mask.view(assignment.shape), pair_dice.view(assignment.shape)
    if reduction == "none":
        return pair_mask, pair_dice
    if num_masks is None:
        num_masks = targets.counts.sum().clamp(min=1)
    return pair_mask.sum((-2, -1)) / num_masks, pair_dice.sum((-2, -1)) / num_masks
