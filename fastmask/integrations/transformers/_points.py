"""Matching and losses at random points, as transformers' Mask2Former, OneFormer and EoMT have them.

Every random number is drawn as transformers draws it: the same calls of ``torch.rand`` in the same order. So with one
seed the patched model sees the points that the plain one would, and the two can be compared number by number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from fastmask.functional import assign, class_loss, point_mask_cost, point_mask_loss
from fastmask.integrations.transformers._labels import (
    cost_of_images,
    layers_of,
    make_targets,
    name_losses,
    num_masks_of,
    sizes_of,
)
from fastmask.modules.matcher import index_pairs
from fastmask.targets import Targets


class PointMatcher:
    """What replaces the three matchers, whose attributes it reads: ``cost_class``, ``cost_mask``, ``cost_dice`` and
    ``num_points``."""

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

    @torch.no_grad()
    def assign(
        self, class_logits: Tensor, mask_logits: Tensor, targets: Targets, sizes: Sequence[tuple[int, int]]
    ) -> Tensor:
        """``(B, M)`` int64: the query of each target of one layer, by costs at new random points.

        Args:
            class_logits: ``(B, N, K+1)``.
            mask_logits: ``(B, N, h, w)``.
            targets: of the B images.
            sizes: (H_b, W_b) of each image's masks, whose points are of the mask without padding.
        """
        points = torch.cat([torch.rand(1, self.num_points, 2, device=mask_logits.device) for _ in sizes])

        def cost(class_logits: Tensor, mask_logits: Tensor, targets: Targets, images: slice) -> Tensor:
            return point_mask_cost(
                class_logits,
                mask_logits,
                targets,
                points[images],
                cost_class=self.cost_class,
                cost_mask=self.cost_mask,
                cost_dice=self.cost_dice,
            )

        return assign(cost_of_images(cost, class_logits, mask_logits, targets, sizes), targets.counts)


class PointLoss:
    """What replaces the three criteria, whose attributes it reads: ``matcher``, ``empty_weight``, ``num_points``,
    ``oversample_ratio`` and ``importance_sample_ratio``."""

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
        assignments, masks, dices = [], [], []
        for class_logits, mask_logits in (last, *earlier):
            assignment = self.matcher.assign(class_logits, mask_logits, targets, sizes_of(mask_labels))
            points = self.draw_points(mask_logits, assignment, [len(labels) for labels in class_labels])
            loss_mask, loss_dice = point_mask_loss(mask_logits, targets, assignment, points, num_masks=1.0)
            assignments.append(assignment)
            masks.append(loss_mask)
            dices.append(loss_dice)
        class_logits = torch.stack([classes for classes, _ in (last, *earlier)])
        loss_ce = class_loss(class_logits, targets, torch.stack(assignments), class_weights=self.empty_weight)
        num_masks = num_masks_of(self, class_labels, targets).view(self.loss_shape)
        return name_losses(masks, dices, loss_ce, num_masks)

    @torch.no_grad()
    def draw_points(self, mask_logits: Tensor, assignment: Tensor, counts: Sequence[int]) -> Tensor:
        """``(B, M, P, 2)`` float32: the points of each pair, most of them where the query's mask is uncertain.

        transformers numbers the pairs of a batch by image, then by query, and draws candidates for all of them at once;
        so does this, and then hands each target its own.

        Args:
            mask_logits: ``(B, N, h, w)``.
            assignment: ``(B, M)``.
            counts: targets of each image, known without asking the device.
        """
        device, (batch_size, num_targets) = mask_logits.device, assignment.shape
        pairs = [min(count, mask_logits.shape[1]) for count in counts]
        num_pairs, num_candidates = sum(pairs), int(self.num_points * self.oversample_ratio)
        num_uncertain = int(self.importance_sample_ratio * self.num_points)
        candidates = torch.rand(num_pairs, num_candidates, 2, device=device)
        firsts = torch.tensor([sum(pairs[:b]) for b in range(batch_size)], device=device)
        matched = assignment >= 0
        ranks = (matched[:, None] & (assignment[:, None] < assignment[:, :, None])).sum(2)
        rows = (firsts[:, None] + ranks).masked_fill(~matched, num_pairs)  # [B, M]
        images = torch.arange(batch_size, device=device)[:, None].expand_as(assignment)
        pair_of_row = torch.zeros(2, num_pairs + 1, dtype=torch.int64, device=device)
        pair_of_row.scatter_(1, rows.flatten().expand(2, -1), torch.stack([images, assignment]).flatten(1))
        planes = mask_logits[pair_of_row[0, :num_pairs], pair_of_row[1, :num_pairs]].float()  # [pairs, h, w]
        points = candidates[:, :num_uncertain]
        if num_pairs > 0:
            logits = grid_sample(planes[:, None], 2 * candidates[:, :, None] - 1, align_corners=False)[:, 0, :, 0]
            chosen = (-logits.abs()).topk(num_uncertain, dim=1, sorted=False).indices
            points = candidates.gather(1, chosen[..., None].expand(-1, -1, 2))
        others = torch.rand(num_pairs, self.num_points - num_uncertain, 2, device=device)
        points = torch.cat([points, others], 1)
        unmatched = points.new_zeros(1, self.num_points, 2)
        return torch.cat([points, unmatched])[rows.flatten()].view(batch_size, num_targets, self.num_points, 2)
