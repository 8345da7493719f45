"""The mask and dice losses of the matched pairs, at all pixels or at points, and their gradient.

``fastmask::mask_loss`` and ``fastmask::point_mask_loss`` return, for each pair, both losses and four sums: sum p t,
sum v p, sum t and sum v, where v is the weight of a pixel or point. If a gradient will be wanted (``keep_slopes``),
forward also sums slopes at the resolution of the logits, which backward only scales and adds: on a CPU those of both
losses; on a GPU, where the sums of a pair are complete only later, those of the mask loss, of v p and of p t. At points
on a GPU, backward evaluates the pairs again with their sums instead.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastmask.kernels._layout import empty_gradient
from fastmask.mask_term import FOCAL, MaskTerm
from fastmask.ops._checks import (
    check_assignment,
    check_choice,
    check_mask_logits,
    check_mask_term,
    check_points,
    computing_dtype,
    stack_layers,
)
from fastmask.ops._registry import Gradient, Operator, choose_backend
from fastmask.ops._targets import TARGETS, target_arguments
from fastmask.targets import Targets


def mask_loss(
    mask_logits: Tensor,
    targets: Targets,
    assignment: Tensor,
    points: Tensor | None = None,
    *,
    num_masks: Tensor | float | None = None,
    term: MaskTerm = FOCAL,
    reduction: str = "sum",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Focal (or cross-entropy) and dice losses of the matched queries, at the targets' resolution or at points.

    Let x be the logits of a target's query, t the target, p = sigmoid(x) and v the weights of pixels or points. With
    sums over pixels or points, a pair's losses are

    - mask: (sum t F+ + (v - t) F-) / sum v with F+ = alpha (1-p)^gamma softplus(-x) and
      F- = (1-alpha) p^gamma softplus(x) (RetinaNet, arXiv:1708.02002, equation 5), or for "bce" with
      F+ = softplus(-x) and F- = softplus(x);
    - dice: 1 - (2 sum p t + 1) / (sum v p + sum t + 1) (V-Net, arXiv:1606.04797; MaskFormer, arXiv:2107.06278).

    Without ``points`` the logits are upsampled bilinearly (align_corners=False) to the H x W pixels of the targets.
    With ``points`` both x and t are sampled bilinearly there (align_corners=False, 0 beyond the map), so that t is a
    fraction on outlines (Mask2Former, arXiv:2112.01527, section 3.3).

    Neither forward nor backward gathers logits, or stores anything of size H * W, except for 4 bytes per pixel of a
    segment map on a GPU at points. If ``mask_logits`` require a gradient, forward stores float32 maps of h x w for each
    target: two on a CPU, three on a GPU, none on a GPU at points. A logit whose weight in a pixel or point is 0 is not
    read. A NaN affects only the losses of its own pair; an infinite logit of the correct sign costs nothing.

    Args:
        mask_logits: ``(..., B, N, h, w)`` floating point; any leading dimensions, usually L decoder layers, or none.
        targets: the targets of the B images, on the same device, at any resolution H x W.
        assignment: ``(..., B, M)`` int64, the query of each target; -1 for padding and unmatched targets.
        points: ``(..., B, M, P, 2)`` float32, each target's points (x, y) in 0..1 from the left and the top, usually
            from ``uncertain_points``. Points beyond the map sample 0. They get no gradient. None compares all pixels.
        num_masks: the divisor of the sums over pairs; by default the number of targets in the batch, at least 1.
        term: the mask term with its alpha and gamma. With ``ignore_void``, v is 0 at a void pixel and 1 - the bilinear
            share of void pixels at a point, and sum v counts as at least 1; otherwise v is 1 everywhere.
        reduction: "sum" adds up the pairs and divides by ``num_masks``; "none" returns a value for each pair.
        backend: "auto", "reference", "native" or "triton".

    Returns:
        (loss_mask, loss_dice), float32 (float64 for float64 logits, which only the reference reads): ``(...)``, one per
        layer, or ``(..., B, M)`` with ``reduction="none"``, 0 for unmatched targets. Differentiable once with
        respect to ``mask_logits``; queries without a target get a zero gradient.

    Raises:
        ValueError: shapes, devices, indices or options that do not fit.
        TypeError: logits that are not floating point, an assignment that is not int64, or points that are not
            float32 or float64.
        RuntimeError: the requested backend cannot run.
    """
    check_mask_logits(mask_logits, targets)
    check_assignment(assignment, tuple(mask_logits.shape[:-4]), mask_logits.shape[-3], targets)
    if points is not None:
        check_points(points, tuple(assignment.shape), "(..., B, M, P, 2)", targets)
    check_mask_term(term)
    check_choice("reduction", reduction, ("sum", "none"))
    operator = MASK_LOSS if points is None else POINT_MASK_LOSS
    backend = choose_backend(operator, backend, mask_logits)
    if backend == "reference":
        from fastmask import reference

        pair_mask, pair_dice = reference.mask_loss(
            mask_logits.to(computing_dtype(mask_logits)),
            assignment,
            targets.dense_masks(),
            points,
            mask_term=term.kind,
            alpha=term.alpha,
            gamma=term.gamma,
            valid=targets.valid_pixels() if term.ignore_void else None,
        )
    else:
        keep_slopes = mask_logits.requires_grad and torch.is_grad_enabled()
        pair_mask, pair_dice, _, _ = operator(
            backend,
            stack_layers(mask_logits, 4),
            stack_layers(assignment, 2),
            *target_arguments(targets, term.ignore_void),
            *(() if points is None else (stack_layers(points.float(), 4),)),
            *(term.kind, term.alpha, term.gamma),
            keep_slopes,
        )
        if assignment.dim() != 3:
            pair_mask, pair_dice = pair_mask.view(assignment.shape), pair_dice.view(assignment.shape)
    if reduction == "none":
        return pair_mask, pair_dice
    if num_masks is None:
        num_masks = targets.counts.sum().clamp(min=1)
    return pair_mask.sum((-2, -1)) / num_masks, pair_dice.sum((-2, -1)) / num_masks


def _fake(gpu_maps: int, mask_logits: Tensor, assignment: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    """``gpu_maps`` of slopes for each pair on a GPU, two on a CPU."""
    pairs = mask_logits.new_empty(assignment.shape, dtype=torch.float32)
    maps = 0 if not inputs[-1] else 2 if mask_logits.device.type == "cpu" else gpu_maps
    slopes = pairs.new_empty((*assignment.shape, maps, *mask_logits.shape[-2:]) if maps > 0 else (0,))
    return pairs, torch.empty_like(pairs), pairs.new_empty((*assignment.shape, 4)), slopes


def _fake_backward(
    grad_mask: Tensor, grad_dice: Tensor, sums: Tensor, slopes: Tensor, mask_logits: Tensor, *_: object
) -> Tensor:
    return empty_gradient(mask_logits)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    kept = output[2:]
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)  # zeros as large as the slopes would be made and passed to backward
    tensors = [x if isinstance(x, Tensor) else None for x in inputs[:-1]]
    ctx.save_for_backward(*kept, *tensors)
    ctx.others = [None if isinstance(x, Tensor) else x for x in inputs[:-1]]


def _backward_arguments(
    ctx: Any, grad_mask: Tensor | None, grad_dice: Tensor | None, *_: Tensor | None
) -> tuple[Any, ...]:
    sums, slopes, *tensors = ctx.saved_tensors
    grads = (sums.new_zeros(sums.shape[:-1]) if grad is None else grad for grad in (grad_mask, grad_dice))
    inputs = (x if tensor is None else tensor for tensor, x in zip(tensors, ctx.others, strict=True))
    return *grads, sums, slopes, *inputs


def _register(name: str, points: str, gpu_maps: int) -> tuple[Operator, Operator]:
    """The operator and its gradient."""
    arguments = f"Tensor mask_logits, Tensor assignment, {TARGETS}, {points}str mask_term, float alpha, float gamma"
    backward = Operator(
        f"{name}_backward",
        f"(Tensor grad_mask, Tensor grad_dice, Tensor sums, Tensor slopes, {arguments}) -> Tensor",
        _fake_backward,
        native=("cpu",),
        triton=name,
    )
    forward = Operator(
        name,
        f"({arguments}, bool keep_slopes) -> (Tensor, Tensor, Tensor, Tensor)",
        partial(_fake, gpu_maps),
        native=("cpu",),
        triton=name,
        gradient=Gradient(backward, _save, _backward_arguments),
    )
    return forward, backward


MASK_LOSS, MASK_LOSS_BACKWARD = _register("mask_loss", "", gpu_maps=3)
POINT_MASK_LOSS, POINT_MASK_LOSS_BACKWARD = _register("point_mask_loss", "Tensor points, ", gpu_maps=0)
