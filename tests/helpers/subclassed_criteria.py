"""Criteria that derive from transformers', as the EoMT authors' repository and LightlyTrain define theirs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.mask2former.modeling_mask2former import Mask2FormerHungarianMatcher, Mask2FormerLoss

from tests.helpers.foreign_models import NUM_CLASSES, NUM_POINTS


class MaskClassificationLoss(Mask2FormerLoss):
    """Takes targets as dicts and a layer at a time, and divides mask losses by the number of matched pairs."""

    def __init__(self, matcher: nn.Module | None = None) -> None:
        nn.Module.__init__(self)
        self.num_points, self.oversample_ratio, self.importance_sample_ratio = NUM_POINTS, 3.0, 0.75
        self.num_labels, self.eos_coef = NUM_CLASSES, 0.1
        empty_weight = torch.ones(NUM_CLASSES + 1)
        empty_weight[-1] = self.eos_coef
        self.register_buffer("empty_weight", empty_weight)
        costs = {"cost_mask": 5.0, "cost_dice": 5.0, "cost_class": 2.0}
        self.matcher = matcher or Mask2FormerHungarianMatcher(num_points=NUM_POINTS, **costs)

    def forward(self, masks_queries_logits: Tensor, targets: list[dict[str, Tensor]], class_queries_logits: Tensor):
        labels = {
            "mask_labels": [target["masks"].to(masks_queries_logits.dtype) for target in targets],
            "class_labels": [target["labels"].long() for target in targets],
        }
        pairs = self.matcher(
            masks_queries_logits=masks_queries_logits, class_queries_logits=class_queries_logits, **labels
        )
        losses = self.loss_masks(masks_queries_logits, labels["mask_labels"], pairs)
        return losses | self.loss_labels(class_queries_logits, labels["class_labels"], pairs)

    def loss_masks(self, masks_queries_logits: Tensor, mask_labels: list[Tensor], indices: Any) -> dict[str, Tensor]:
        losses = super().loss_masks(masks_queries_logits, mask_labels, indices, 1)
        num_pairs = max(1, sum(len(targets) for _, targets in indices))
        return {name: loss / num_pairs for name, loss in losses.items()}


class PlainSubclass(Mask2FormerLoss):
    """Overrides nothing."""


class OtherClassLoss(Mask2FormerLoss):
    """Computes the classification loss in its own way; transformers' forward calls it."""

    def loss_labels(self, class_queries_logits: Tensor, class_labels: list[Tensor], indices: Any) -> dict[str, Tensor]:
        return {
            name: 2 * loss for name, loss in super().loss_labels(class_queries_logits, class_labels, indices).items()
        }


class LastQueryMatcher(Mask2FormerHungarianMatcher):
    """Matches each target with one of the last queries."""

    def forward(self, masks_queries_logits, class_queries_logits, mask_labels, class_labels):
        queries = torch.arange(masks_queries_logits.shape[1]).flip(0)
        return [(queries[: len(labels)], torch.arange(len(labels))) for labels in class_labels]
