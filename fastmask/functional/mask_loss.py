"""The mask and dice losses of the matched pairs."""

from __future__ import annotations

from torch import Tensor

from fastmask.functional._backend import choose_backend
from fastmask.functional._checks import (
    check_assignment,
    check_choice,
    check_mask_logits,
    check_mask_term,
    computing_dtype,
    stack_layers,
)
from fastmask.ops.mask_loss import OPERATOR
from fastmask.targets import Targets


def mask_loss(
    mask_logits: Tensor,
    targets: Targets,
    assignment: Tensor,
    *,
    num_masks: Tensor | float | None = None,
    mask_term: str = "focal",
    alpha: float = 0.25,
    gamma: float = 2.0,
    ignore_void: bool = False,
    reduction: str = "sum",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Focal (or cross-entropy) and dice losses of the matched queries at the resolution of the targets.

    The logits of each matched query are upsampled bilinearly (align_corners=False) to H x W. With p = sigmoid(x) and
    the target t, a pair's losses are

    - mask: mean over pixels of alpha_t (1-p_t)^gamma (-log p_t), p_t being p inside the target and 1-p outside
      (RetinaNet, arXiv:1708.02002, equation 5), or of -log p_t for ``mask_term="bce"``;
    - dice: 1 - (2 sum p t + 1) / (sum p + sum t + 1) (V-Net, arXiv:1606.04797; MaskFormer, arXiv:2107.06278).

    Nothing of size H * W is stored, neither forward nor for backward. A logit without weight in a pixel is not read.
    NaN reaches the losses of its own pair alone; an infinite logit on its pixel's right side costs nothing.

    Args:
        mask_logits: ``(..., B, N, h, w)`` floating point; any leading dimensions, usually L decoder layers, or none.
        targets: of the B images, on the same device, at any resolution H x W.
        assignment: ``(..., B, M)`` int64, the query of each target; -1 for padding and unmatched targets.
        num_masks: what the sums over pairs are divided by; the number of targets of the batch, at least 1, by default.
        mask_term: "focal" or "bce".
        alpha: weight of foreground in the focal loss, 0..1.
        gamma: focusing parameter of the focal loss, >= 0.
        ignore_void: leave void pixels out of all sums and means; otherwise they are background.
        reduction: "sum", over pairs and divided by ``num_masks``; or "none".
        backend: "auto", "reference", "native" or "triton".

    Returns:
        (loss_mask, loss_dice), float32 (float64 for float64 logits, which only the reference reads): ``(...)``, one
        value a layer, or ``(..., B, M)`` with ``reduction="none"``, 0 for unmatched targets. Differentiable once with
        respect to ``mask_logits``; queries without a target get a zero gradient.

    Raises:
        ValueError: shapes, devices, indices or options that do not fit.
        TypeError: logits that are not floating point, or an assignment that is not int64.
        RuntimeError: the backend asked for cannot run.
    """
    check_mask_logits(mask_logits, targets)
    check_assignment(assignment, tuple(mask_logits.shape[:-4]), mask_logits.shape[-3], targets)
    check_mask_term(mask_term, alpha, gamma)
    check_choice("reduction", reduction, ("sum", "none"))
    backend = choose_backend(OPERATOR, backend, mask_logits)
    if backend == "reference":
        from fastmask import reference

        pair_mask, pair_dice = reference.mask_loss(
            mask_logits.to(computing_dtype(mask_logits)),
            assignment,
            targets.dense_masks(),
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
