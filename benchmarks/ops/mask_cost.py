"""The matching cost of all layers, images, queries and targets."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness.agreement import ErrorBudget
from benchmarks.harness.machine import Work
from benchmarks.harness.providers import compiled, fastmask_backends
from benchmarks.harness.registry import Case, Operation, Provider
from benchmarks.ops.inputs import GPU_TRAINING, QUICK, TRAINING, Inputs, as_lists, make_inputs
from fastmask import mask_cost

WEIGHTS = {"cost_class": 1.0, "cost_mask": 20.0, "cost_dice": 1.0}
CASES = (
    Case("quick", QUICK, ("quick",)),
    Case("B2 L7 M20, segment map", TRAINING, ("cpu",), ("float32", "bfloat16")),
    Case("B2 L7 M20, masks", TRAINING | {"form": "masks"}, ("cpu",)),
    Case("B16 L6 M20, segment map", GPU_TRAINING, ("gpu",), ("bfloat16", "float32")),
    Case("B16 L6 M20, masks", GPU_TRAINING | {"form": "masks"}, ("gpu",), ("bfloat16",)),
)


def cost_by_layer(inputs: Inputs, dtype: torch.dtype) -> Tensor:
    """``(L, B, N, M)`` by the reference in ``dtype``, a layer at a time to save memory."""
    layers = zip(inputs.class_logits.to(dtype), inputs.mask_logits, strict=True)
    costs = [mask_cost(c, m.to(dtype), inputs.targets, backend="reference", **WEIGHTS) for c, m in layers]
    return torch.stack(costs)


def oracle(inputs: Inputs) -> ErrorBudget:
    expected, reference = (cost_by_layer(inputs, dtype) for dtype in (torch.float64, torch.float32))
    return ErrorBudget({"cost": expected}, {"cost": reference})


def work(inputs: Inputs) -> Work:
    """Logits and targets read once; exp, log and reciprocal for each logit, on a CPU 26 operations, and 12 for both
    kinds of loss and their sums.

    A segment map needs no product with the targets, whose sums are running sums; masks are counted by the grid's
    pixels, which is all that the nearest rule reads.
    """
    targets = inputs.targets
    grid_pixels = inputs.mask_logits[0, 0, 0].numel()
    planes = targets.batch_size if targets.masks is None else targets.labels.numel()
    pixel = (targets.segments if targets.masks is None else targets.masks).element_size()
    return Work(
        bytes=inputs.mask_logits.nbytes
        + inputs.class_logits.nbytes
        + planes * grid_pixels * pixel
        + 4 * inputs.class_logits[..., 0].numel() * targets.num_targets,
        specials=3 * inputs.mask_logits.numel() if inputs.mask_logits.is_cuda else 0,
        operations=0 if inputs.mask_logits.is_cuda else 38 * inputs.mask_logits.numel(),
    )


def prepare_fastmask(inputs: Inputs, backend: str) -> Callable[[], Tensor]:
    return lambda: mask_cost(inputs.class_logits, inputs.mask_logits, inputs.targets, backend=backend, **WEIGHTS)


*KERNELS, REFERENCE = fastmask_backends("mask_cost", "mask_logits", prepare_fastmask, lambda raw, _: {"cost": raw})


def prepare_transformers(inputs: Inputs) -> Callable[[], list[list[Tensor]]]:
    """The matcher of transformers, layer by layer as its loss calls it, without the solver. Logits in float32, as its
    arithmetic in bfloat16 would miss the error budget."""
    from transformers.models.maskformer import modeling_maskformer

    matcher = modeling_maskformer.MaskFormerHungarianMatcher(**WEIGHTS)
    masks, labels = as_lists(inputs)
    costs: list[Tensor] = []

    def keep(cost: Tensor) -> tuple[np.ndarray, np.ndarray]:
        costs.append(cost)
        return np.empty(0, np.int64), np.empty(0, np.int64)

    def call() -> list[list[Tensor]]:
        result = []
        with mock.patch.object(modeling_maskformer, "linear_sum_assignment", keep):
            for class_logits, mask_logits in zip(inputs.class_logits, inputs.mask_logits, strict=True):
                matcher(mask_logits.float(), class_logits.float(), masks, labels)
                result.append(costs.copy())
                costs.clear()
        return result

    return call


def pad_costs(raw: list[list[Tensor]], inputs: Inputs) -> dict[str, Tensor]:
    width = inputs.targets.num_targets
    padded = [[F.pad(cost, (0, width - cost.shape[1])) for cost in layer] for layer in raw]
    return {"cost": torch.stack([torch.stack(layer) for layer in padded])}


def minimal_cost(class_logits: Tensor, mask_logits: Tensor, labels: Tensor, planes: Tensor) -> Tensor:
    """The cost of one layer with as little work as PyTorch's operators allow, for torch.compile to fuse.

    One softplus gives both terms of the focal loss; then two matrix products and two row sums. Inductor vectorizes
    these two functions better than their parts, and a layer at a time beats all layers at once, which leave the cache.

    Args:
        class_logits: ``(B, N, K+1)``. mask_logits: ``(B, N, h, w)``.
        planes: a segment map ``(B, h, w)`` or masks ``(B, M, h, w)``, at the grid of the logits.
    """
    x = mask_logits.flatten(2).float()  # [B, N, P]
    if planes.dim() == 3:
        planes = planes[:, None] == torch.arange(labels.shape[1], device=x.device)[:, None, None]
    t = planes.flatten(2).float().transpose(1, 2)  # [B, P, M]
    p = torch.sigmoid(x)
    softplus = F.softplus(x)
    negative = 0.75 * p**2 * softplus
    difference = 0.25 * (1 - p) ** 2 * (softplus - x) - negative
    focal = (difference @ t + negative.sum(2, keepdim=True)) / x.shape[2]
    dice = 1 - (2 * (p @ t) + 1) / (p.sum(2, keepdim=True) + t.sum(1, keepdim=True) + 1)
    index = labels.clamp(min=0)[:, None].expand(-1, x.shape[1], -1)
    classes = class_logits.float().softmax(-1).gather(2, index)
    cost = WEIGHTS["cost_mask"] * focal + WEIGHTS["cost_dice"] * dice - WEIGHTS["cost_class"] * classes
    return cost.masked_fill((labels < 0)[:, None], 0)


def prepare_compiled(inputs: Inputs) -> Callable[[], Tensor]:
    targets = inputs.targets
    cost = compiled(minimal_cost, inputs.mask_logits.device)
    rows, columns = (
        torch.arange(count, device=targets.device) * full // count
        for count, full in zip(inputs.mask_logits.shape[-2:], targets.size, strict=True)
    )

    @torch.no_grad()
    def call() -> Tensor:
        planes = targets.segments if targets.masks is None else targets.masks
        planes = planes[..., rows[:, None], columns]
        layers = zip(inputs.class_logits, inputs.mask_logits, strict=True)
        return torch.stack([cost(*layer, targets.labels, planes) for layer in layers])

    return call


OPERATION = Operation(
    title="Matching cost of every query against every target, all layers and images",
    cases=CASES,
    providers=(
        *KERNELS,
        Provider("transformers", prepare_transformers, pad_costs, error_factor=20.0),
        REFERENCE,
        Provider("torch.compile", prepare_compiled, lambda raw, _: {"cost": raw}, error_factor=20.0, compiles=True),
    ),
    baseline="transformers",
    make_inputs=make_inputs,
    oracle=oracle,
    work=work,
)
