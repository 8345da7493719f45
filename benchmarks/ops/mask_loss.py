"""Focal and dice losses of the matched pairs at the targets' resolution, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness.agreement import ErrorBudget
from benchmarks.harness.machine import Work
from benchmarks.harness.providers import compiled, fastmask_backends
from benchmarks.harness.registry import Case, Operation, Provider
from benchmarks.ops.inputs import (
    GPU_TRAINING,
    QUICK,
    TRAINING,
    Inputs,
    as_lists,
    judged,
    judged_layers,
    make_inputs,
    single_images,
)
from fastmask import mask_loss

WEIGHT_MASK, WEIGHT_DICE = 20.0, 1.0
CASES = (
    Case("quick", QUICK, ("quick",)),
    Case("B2 L7 M20, segment map", TRAINING, ("cpu",), ("float32", "bfloat16")),
    Case("B2 L1 M20, masks", TRAINING | {"form": "masks", "layers": 1}, ("cpu",)),
    Case("B16 L6 M20, segment map", GPU_TRAINING, ("gpu",), ("bfloat16", "float32")),
    Case("B16 L6 M20, masks", GPU_TRAINING | {"form": "masks"}, ("gpu",), ("bfloat16",)),
)
Losses = tuple[Tensor, Tensor, tuple[Tensor, ...]]  # (L,) mask losses, (L,) dice losses, gradients of the logits


def backward(loss_mask: Tensor, loss_dice: Tensor, leaves: list[Tensor]) -> Losses:
    total = WEIGHT_MASK * loss_mask.sum() + WEIGHT_DICE * loss_dice.sum()
    return loss_mask, loss_dice, torch.autograd.grad(total, leaves)


def named(raw: Losses, inputs: Inputs) -> dict[str, Tensor]:
    """The losses and gradients of the judged layers."""
    loss_mask, loss_dice, grads = raw
    result = {"loss_mask": loss_mask, "loss_dice": loss_dice, "grad": torch.stack(grads).view_as(inputs.mask_logits)}
    return {name: value[judged_layers(inputs)] for name, value in result.items()}


def reference(inputs: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """By the reference in ``dtype``, an image and layer at a time; the gradient is rounded to the logits' dtype unless
    ``dtype`` is float64."""
    grad = torch.empty_like(inputs.mask_logits, dtype=dtype if dtype == torch.float64 else inputs.mask_logits.dtype)
    losses = torch.zeros(2, inputs.mask_logits.shape[0], dtype=dtype, device=grad.device)
    for layer, image, one in single_images(inputs):
        x = one.mask_logits.to(dtype).requires_grad_()
        pair = mask_loss(x, one.targets, one.assignment, num_masks=inputs.num_masks, backend="reference")
        loss_mask, loss_dice, (one_grad,) = backward(*pair, [x])
        losses[:, layer] += torch.cat([loss_mask, loss_dice]).detach()
        grad[layer, image] = one_grad[0, 0].to(grad.dtype)
    return {"loss_mask": losses[0], "loss_dice": losses[1], "grad": grad}


def oracle(inputs: Inputs) -> ErrorBudget:
    inputs = judged(inputs)
    return ErrorBudget(reference(inputs, torch.float64), reference(inputs, torch.float32))


def work(inputs: Inputs) -> Work:
    """Matched logits and targets read once; for each upsampled pixel of each pair, exp, log and reciprocal on a GPU and
    55 operations on a CPU: interpolation 2, these functions 26, the loss, its slopes and their sums 27. Backward writes
    the gradient of every logit."""
    targets, logits = inputs.targets, inputs.mask_logits
    pairs = int((inputs.assignment >= 0).sum())
    planes = targets.segments if targets.masks is None else targets.masks
    matched = pairs * logits[0, 0, 0].nbytes
    pixels = pairs * targets.size[0] * targets.size[1]
    moved = matched + planes.nbytes + logits.nbytes
    return Work(bytes=moved, specials=3 * pixels) if logits.is_cuda else Work(bytes=moved, operations=55 * pixels)


def prepare_fastmask(inputs: Inputs, backend: str) -> Callable[[], Losses]:
    x = inputs.mask_logits.detach().requires_grad_()
    return lambda: backward(*mask_loss(x, inputs.targets, inputs.assignment, backend=backend), [x])


*KERNELS, REFERENCE = fastmask_backends("mask_loss", "mask_logits", prepare_fastmask, named)


def prepare_transformers(inputs: Inputs) -> Callable[[], Losses]:
    """The mask losses of transformers' criterion, layer by layer as it calls them. Logits in float32, as its arithmetic
    in bfloat16 would miss the error budget."""
    from transformers.models.maskformer.modeling_maskformer import MaskFormerHungarianMatcher, MaskFormerLoss

    criterion = MaskFormerLoss(inputs.num_classes, MaskFormerHungarianMatcher(), {}, 0.1)
    masks, _ = as_lists(inputs)
    pairs = [
        [(queries[queries >= 0], (queries >= 0).nonzero().squeeze(1)) for queries in layer]
        for layer in inputs.assignment
    ]
    num_masks = inputs.num_masks
    leaves = [layer.detach().requires_grad_() for layer in inputs.mask_logits]

    def call() -> Losses:
        losses = [
            criterion.loss_masks(layer.float(), masks, indices, num_masks)
            for layer, indices in zip(leaves, pairs, strict=True)
        ]
        loss_mask, loss_dice = (torch.stack([loss[name] for loss in losses]) for name in ("loss_mask", "loss_dice"))
        return backward(loss_mask, loss_dice, leaves)

    return call


def minimal_loss(matched: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over pairs of both losses of one layer with as little work as PyTorch's operators allow.

    Args:
        matched: ``(P, h, w)``, the logits of each pair's query, float32: gradients summed in bfloat16 would be slow.
        t: ``(P, H, W)`` bool, the pair's target.
    """
    x = F.interpolate(matched[:, None], t.shape[1:], mode="bilinear", align_corners=False)[:, 0]
    p = torch.sigmoid(x)
    wrong = torch.where(t, 1 - p, p)
    entropy = torch.where(t, -x, x).clamp(min=0) + torch.log1p(torch.exp(-x.abs()))
    focal = (torch.where(t, 0.25, 0.75) * wrong * wrong * entropy).mean((1, 2))
    dice = 1 - (2 * torch.where(t, p, 0).sum((1, 2)) + 1) / (p.sum((1, 2)) + t.sum((1, 2)) + 1)
    return focal.sum(), dice.sum()


def prepare_compiled(inputs: Inputs) -> Callable[[], Losses]:
    loss = compiled(minimal_loss, inputs.mask_logits.device)
    leaves = [layer.detach().requires_grad_() for layer in inputs.mask_logits]
    image, target = (inputs.targets.labels >= 0).nonzero(as_tuple=True)
    queries = inputs.assignment[:, image, target]  # [L, P]

    def call() -> Losses:
        t = inputs.targets.dense_masks()[image, target]
        losses = [loss(x[image, query].float(), t) for x, query in zip(leaves, queries, strict=True)]
        loss_mask, loss_dice = (torch.stack(values) / inputs.num_masks for values in zip(*losses, strict=True))
        return backward(loss_mask, loss_dice, leaves)

    return call


OPERATION = Operation(
    title="Mask and dice losses of the matched pairs, forward and backward, all layers",
    cases=CASES,
    providers=(
        *KERNELS,
        Provider("transformers", prepare_transformers, named, error_factor=20.0),
        REFERENCE,
        Provider("torch.compile", prepare_compiled, named, error_factor=20.0, compiles=True),
    ),
    baseline="transformers",
    make_inputs=make_inputs,
    oracle=oracle,
    work=work,
)
