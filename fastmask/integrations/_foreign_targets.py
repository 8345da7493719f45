"""Labels in foreign formats."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, distributed

from fastmask.targets import Targets


def sizes_of(mask_labels: Sequence[Tensor]) -> list[tuple[int, int]]:
    """(H_b, W_b) of each image's masks."""
    return [tuple(masks.shape[-2:]) for masks in mask_labels]


def average_num_masks(targets: Targets) -> Tensor:
    """Targets of an average process's batch, at least 1: what the original repositories divide mask losses by."""
    num_masks = targets.counts.sum().float()
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(num_masks)
        num_masks = num_masks / distributed.get_world_size()
    return num_masks.clamp(min=1)


def cost_of_images(
    cost: Callable[[Tensor, Tensor, Targets, slice], Tensor],
    class_logits: Tensor,
    mask_logits: Tensor,
    targets: Targets,
    sizes: Sequence[tuple[int, int]],
) -> Tensor:
    """``(..., B, N, M)``: the matching cost, of masks without padding.

    transformers' models pad masks for the losses only. Where sizes differ, each image is matched by itself.

    Args:
        cost: from the logits and targets of some images, and which these are, to their costs.
        class_logits: ``(..., B, N, K+1)``.
        mask_logits: ``(..., B, N, h, w)``.
        targets: of the B images, as binary masks.
        sizes: (H_b, W_b) of each image's masks.
    """
    if len(set(sizes)) == 1:
        return cost(class_logits, mask_logits, targets, slice(None))
    costs = []
    for b, (height, width) in enumerate(sizes):
        image = slice(b, b + 1)
        masks = targets.masks[image, :, :height, :width].contiguous()
        own = Targets(targets.labels[image], targets.counts[image], masks=masks)
        costs.append(cost(class_logits[..., image, :, :], mask_logits[..., image, :, :, :], own, image))
    return torch.cat(costs, -3)
