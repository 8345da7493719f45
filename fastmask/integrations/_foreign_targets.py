"""What patched matchers and criteria share: the sizes of foreign masks, their matching cost and their number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, distributed

from fastmask.functional import mask_cost
from fastmask.mask_term import FOCAL, MaskTerm
from fastmask.modules import Predictions
from fastmask.targets import Targets

Size = tuple[int, int]


class Costs(Protocol):
    """The weights of the matching cost, under the original's names."""

    cost_class: float
    cost_mask: float
    cost_dice: float


def sizes_of(mask_labels: Sequence[Tensor]) -> list[Size]:
    """(H_b, W_b) of each image's masks."""
    return [(masks.shape[-2], masks.shape[-1]) for masks in mask_labels]


def average_num_masks(targets: Targets) -> Tensor:
    """The number of targets of an average process, at least 1: the original repositories divide mask losses by it."""
    num_masks = targets.counts.sum().float()
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(num_masks)
        num_masks = num_masks / distributed.get_world_size()
    return num_masks.clamp(min=1)


def matching_cost(
    matcher: Costs,
    predictions: Predictions,
    targets: Targets,
    sizes: Sequence[Size],
    points: Tensor | None = None,
    term: MaskTerm = FOCAL,
) -> Tensor:
    """``(L, B, N, M)``: the matching cost, without the padding of masks.

    transformers' models pad masks for the losses only. Where sizes differ, each image has a call of its own.

    Args:
        matcher: has the weights.
        predictions: of L layers.
        targets: of the B images, as binary masks.
        sizes: (H_b, W_b) of each image's masks.
        points: ``(B, P, 2)`` of each image's mask without padding; all pixels if None.
        term: the mask term.
    """
    groups = [(slice(None), targets)]
    if len(set(sizes)) > 1:
        groups = [(slice(b, b + 1), _image_targets(targets, b, size)) for b, size in enumerate(sizes)]
    mask_logits = predictions.detached_mask_logits()
    costs = [
        mask_cost(
            predictions.class_logits[:, images],
            mask_logits[:, images],
            own,
            None if points is None else points[images],
            cost_class=matcher.cost_class,
            cost_mask=matcher.cost_mask,
            cost_dice=matcher.cost_dice,
            term=term,
        )
        for images, own in groups
    ]
    return torch.cat(costs, 1)


def _image_targets(targets: Targets, image: int, size: Size) -> Targets:
    """The targets of one image, cropped to its size."""
    assert targets.masks is not None
    images = slice(image, image + 1)
    masks = targets.masks[images, :, : size[0], : size[1]].contiguous()
    return Targets(targets.labels[images], targets.counts[images], masks=masks)
