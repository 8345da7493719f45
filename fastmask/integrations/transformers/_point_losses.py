"""Matching and losses at random points, with the signatures of transformers' Mask2Former, OneFormer and EoMT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastmask.integrations import _random_points
from fastmask.integrations._foreign_targets import sizes_of
from fastmask.integrations.transformers._loss_arguments import layers_of, make_targets, name_losses, num_masks_of
from fastmask.modules.matcher import index_pairs


class FactoredLayers(list):
    """Auxiliary predictions as a model lists them, which know the factors of the mask logits of all layers.

    Args:
        predictions: of all layers but the last.
        last_masks: ``(B, N, h, w)`` of the last layer.
        factors: mask embeddings ``(B, N, C)`` and pixel embeddings ``(B, C, h, w)`` of each layer, the last one last.
    """

    def __init__(
        self,
        predictions: Sequence[Mapping[str, Tensor]],
        last_masks: Tensor,
        factors: Sequence[tuple[Tensor, Tensor]],
    ) -> None:
        super().__init__(predictions)
        self.last_masks = last_masks
        self.factors = factors


class PointMatcher(_random_points.PointMatcher):
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
        assignment = self.match_layer(class_queries_logits, masks_queries_logits, targets, sizes_of(mask_labels))
        return index_pairs(assignment)


class PointLoss(_random_points.PointLoss):
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
        factors = None
        # Not where the caller puts other logits in the place of the last layer's.
        if isinstance(auxiliary_predictions, FactoredLayers) and auxiliary_predictions.last_masks is last[1]:
            factors = auxiliary_predictions.factors
            factors = [factors[-1], *factors[:-1]]
        counts = [len(labels) for labels in class_labels]
        losses = self.losses_at_points([last, *earlier], targets, counts, sizes_of(mask_labels), factors=factors)
        num_masks = num_masks_of(self, class_labels, targets).view(self.loss_shape)
        return name_losses(*losses, num_masks)
