"""The mask head of a training step: mask logits from embeddings and the whole criterion, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness.agreement import ErrorBudget
from benchmarks.harness.machine import Work
from benchmarks.harness.providers import require_backend
from benchmarks.harness.registry import Case, Operation, Provider
from benchmarks.ops import criterion, inputs
from fastmask import Targets
from fastmask.functional import mask_products

CHANNELS = 256
GRADIENTS = ("grad_class", "grad_mask_embed", "grad_pixel_embed")
CASES = (
    Case("quick", inputs.QUICK, ("quick",)),
    Case("B2 L7 M20", inputs.TRAINING, ("cpu",)),
    Case("B16 L6 M20", inputs.GPU_TRAINING, ("gpu",), ("bfloat16",)),
)


@dataclass(frozen=True)
class HeadInputs:
    """What the decoder hands to the mask head.

    Args:
        class_logits: ``(L, B, N, K+1)``.
        mask_embed: ``(L, B, N, C)``.
        pixel_embed: ``(B, C, h, w)``.
        targets: of the B images.
        assignment: ``(L, B, M)`` int64, a plausible matching, for counting the work.
    """

    class_logits: Tensor
    mask_embed: Tensor
    pixel_embed: Tensor
    targets: Targets
    assignment: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return [x.detach().requires_grad_() for x in (self.class_logits, self.mask_embed, self.pixel_embed)]

    def as_logits(self, mask_logits: Tensor) -> inputs.Inputs:
        """The inputs of the criterion's benchmark."""
        return inputs.Inputs(self.class_logits, mask_logits, self.targets, self.assignment)


def make_inputs(sizes: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> HeadInputs:
    """Embeddings whose products resemble the segments: a channel for each target, the others noise."""
    made = inputs.build_inputs(dtype, device, **sizes)
    layers, batch, queries = made.class_logits.shape[:3]
    generator = torch.Generator().manual_seed(1)
    pixel_embed = 0.1 * torch.randn(batch, CHANNELS, *sizes["grid"], generator=generator)
    soft = F.adaptive_avg_pool2d(made.targets.dense_masks().float().cpu(), sizes["grid"])
    pixel_embed[:, : soft.shape[1]] += 2 * soft - 1
    seen = torch.arange(queries) % made.targets.counts.cpu()[:, None]  # [B, N]
    mask_embed = 0.3 * torch.randn(layers, batch, queries, CHANNELS, generator=generator)
    confidence = torch.linspace(2, 8, layers)[:, None, None] * torch.rand(layers, batch, queries, generator=generator)
    mask_embed.scatter_add_(-1, seen.expand(layers, -1, -1)[..., None], confidence[..., None])
    mask_embed, pixel_embed = (x.to(device, dtype) for x in (mask_embed, pixel_embed))
    return HeadInputs(made.class_logits, mask_embed, pixel_embed, made.targets, made.assignment)


def named(raw: tuple[dict[str, Tensor], Any], head: HeadInputs) -> dict[str, Tensor]:
    """Losses of all layers, and the gradients; the last layer's losses have no suffix."""
    losses, grads = raw
    suffixes = [*(f"_{i}" for i in range(len(head.class_logits) - 1)), ""]
    result = {name: torch.stack([losses[name + suffix] for suffix in suffixes]) for name in criterion.WEIGHTS}
    return {name: value.detach() for name, value in result.items()} | dict(zip(GRADIENTS, grads, strict=True))


def reference(head: HeadInputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """By the reference in ``dtype``, a layer at a time."""
    judge = criterion.make_criterion(head.as_logits(head.mask_embed), "reference").to(dtype)
    layers: list[dict[str, Tensor]] = []
    for classes, embed in zip(head.class_logits.to(dtype), head.mask_embed.to(dtype), strict=True):
        leaves = [x.detach().requires_grad_() for x in (classes, embed, head.pixel_embed.to(dtype))]
        outputs = {"pred_logits": leaves[0], "pred_masks": mask_products(leaves[1], leaves[2])}
        losses, grads = criterion.backward(judge(outputs, head.targets), (leaves, []))
        layers.append(losses | dict(zip(GRADIENTS, grads, strict=True)))
    result = {name: torch.stack([layer[name].detach() for layer in layers]) for name in layers[0]}
    return result | {"grad_pixel_embed": result["grad_pixel_embed"].sum(0)}


def oracle(head: HeadInputs) -> ErrorBudget:
    return ErrorBudget(reference(head, torch.float64), reference(head, torch.float32))


def work(head: HeadInputs) -> Work:
    """The criterion's own, the products of all queries forward, and those of matched rows backward, two for each."""
    logits_shape = (*head.mask_embed.shape[:-1], *head.pixel_embed.shape[-2:])
    logits = torch.empty(logits_shape, dtype=head.mask_embed.dtype, device=head.mask_embed.device)
    rows = head.mask_embed[..., 0].numel() + 2 * int((head.assignment >= 0).sum())
    products = Work(bytes=0, flops=2 * rows * head.pixel_embed[0].numel())
    return criterion.work(head.as_logits(logits)) + products


def prepare_embeddings(head: HeadInputs) -> Callable[[], Any]:
    """As fastmask's models call it."""
    require_backend("mask_loss", "triton" if head.mask_embed.is_cuda else "native", head.mask_embed)
    leaves = head.leaves
    judge = criterion.make_criterion(head.as_logits(head.mask_embed), "auto")
    outputs = dict(zip(("class_logits", "mask_embed", "pixel_embed"), leaves, strict=True))
    return lambda: criterion.backward(judge(outputs, head.targets), (leaves, []))


def prepare_logits(head: HeadInputs) -> Callable[[], Any]:
    """The same criterion from mask logits, whose gradient is dense."""
    require_backend("mask_loss", "triton" if head.mask_embed.is_cuda else "native", head.mask_embed)
    leaves = head.leaves
    judge = criterion.make_criterion(head.as_logits(head.mask_embed), "auto")

    def call() -> Any:
        outputs = {"class_logits": leaves[0], "mask_logits": mask_products(leaves[1], leaves[2])}
        return criterion.backward(judge(outputs, head.targets), (leaves, []))

    return call


def prepare_transformers(head: HeadInputs) -> Callable[[], Any]:
    """A product a layer and MaskFormerLoss, in float32 as in the criterion's benchmark."""
    judge = criterion.make_transformers_loss(head.class_logits.shape[-1] - 1).to(head.mask_embed.device)
    masks, labels = inputs.as_lists(head.as_logits(head.mask_embed))
    leaves = head.leaves

    def call() -> Any:
        mask_logits = (torch.einsum("bnc,bchw->bnhw", embed, leaves[2]) for embed in leaves[1])
        losses = criterion.transformers_losses(judge, leaves[0], mask_logits, masks, labels)
        return criterion.backward(losses, (leaves, []))

    return call


OPERATION = Operation(
    title="Mask head: products of embeddings and the whole criterion, forward and backward, all layers",
    cases=CASES,
    providers=(
        Provider("fastmask", prepare_embeddings, named),
        Provider("fastmask, mask logits", prepare_logits, named),
        Provider("transformers", prepare_transformers, named, error_factor=20.0),
    ),
    baseline="transformers",
    make_inputs=make_inputs,
    oracle=oracle,
    work=work,
)
