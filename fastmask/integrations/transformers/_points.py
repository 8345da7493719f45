"""Matching and losses at random points, with the signatures of transformers' Mask2Former, OneFormer and EoMT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastmask.integrations import _points
from fastmask.integrations._labels import sizes_of
from fastmask.integrations.transformers._labels import layers_of, make_targets, name_losses, num_masks_of
from fastmask.modules.matcher import index_pairs


class PointMatcher(_points.PointMatcher):
    """What replaces the three matchers."""

    @torch.no_grad()
    def forward(
        self,
        masks_queries_logits: Tensor,
        class_queries_logits: Tensor,
        mask_labels: Sequence[Tensor],
        class_labels: Sequence[Tensor],
    ) -> list[tuple[Tensor, Tensor]]:
        """For each image (queries, targets), int64 on the CPU, by ascending query."""
        num_classes = class_queries_logits.shape[-1] - 1
        targets = make_targets(self, mask_labels, class_labels, num_classes, masks_queries_logits.device)
        return index_pairs(self.assign(class_queries_logits, masks_queries_logits, targets, sizes_of(mask_labels)))


class PointLoss(_points.PointLoss):
    """What replaces the three criteria."""

    loss_shape: tuple[int, ...] = ()

    def forward(
        self,
        masks_queries_logits: Tensor,
        class_queries_logits: Tensor,
        mask_labels: Sequence[Tensor],
        class_labels: Sequence[Tensor],
        auxiliary_predictions: Sequence[Mapping[str, Tensor]] | None = None,
    ) -> dict[str, Tensor]:
        """Unweighted losses under transformers' names, of all layers."""
        num_classes = self.empty_weight.shape[0] - 1
        targets = make_targets(self, mask_labels, class_labels, num_classes, masks_queries_logits.device)
        *earlier, last = layers_of(class_queries_logits, masks_queries_logits, auxiliary_predictions)
        counts = [len(labels) for labels in class_labels]
        losses = self.losses_at_points([last, *earlier], targets, counts, sizes_of(mask_labels))
        num_masks = num_masks_of(self, class_labels, targets).view(self.loss_shape)
        return name_losses(*losses, num_masks)
