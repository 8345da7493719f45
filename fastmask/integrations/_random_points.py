"""Matching and losses at random points, as the models of other libraries draw these.

Every random number is drawn as the original code and transformers draw it: the same calls of ``torch.rand`` in the same
order. So with one seed the patched model sees the points that the plain one would, and the two can be compared number
by number.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from fastmask.functional import assign, class_loss, mask_cost, mask_loss, matched_mask_logits
from fastmask.integrations._foreign_targets import cost_of_images
from fastmask.mask_term import MaskTerm
from fastmask.targets import Targets

CROSS_ENTROPY = MaskTerm("bce")


class PointMatcher:
    """Part of what replaces a matcher, whose attributes it reads: ``cost_class``, ``cost_mask``, ``cost_dice`` and
    ``num_points``."""

    @torch.no_grad()
    def match_layer(
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
            return mask_cost(
                class_logits,
                mask_logits,
                targets,
                points[images],
                cost_class=self.cost_class,
                cost_mask=self.cost_mask,
                cost_dice=self.cost_dice,
                term=CROSS_ENTROPY,
            )

        return assign(cost_of_images(cost, class_logits, mask_logits, targets, sizes), targets.counts)


class PointLoss:
    """Part of what replaces a criterion, whose attributes it reads: ``matcher``, ``empty_weight``, ``num_points``,
    ``oversample_ratio`` and ``importance_sample_ratio``."""

    def losses_at_points(
        self,
        layers: Sequence[tuple[Tensor, Tensor]],
        targets: Targets,
        counts: Sequence[int],
        sizes: Sequence[tuple[int, int]],
        *,
        factors: Sequence[tuple[Tensor, Tensor]] | None = None,
        with_masks: bool = True,
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Mask and dice losses of each layer, summed over pairs, and classification losses ``(L,)``.

        Args:
            layers: class logits ``(B, N, K+1)`` and mask logits ``(B, N, h, w)`` of each, in the order in which the
                original code draws their points.
            targets: of the B images.
            counts: targets of each image, known without asking the device.
            sizes: (H_b, W_b) of each image's masks.
            factors: of each layer's mask logits, if they are known: mask embeddings ``(B, N, C)`` and pixel embeddings
                ``(B, C, h, w)``. The gradient then goes to them, and carries the matched queries only.
            with_masks: whether mask and dice losses are wanted; without them, no points are drawn for them.
        """
        assignments, masks, dices = [], [], []
        for layer, (class_logits, mask_logits) in enumerate(layers):
            assignment = self.matcher.match_layer(class_logits, mask_logits, targets, sizes)
            assignments.append(assignment)
            if not with_masks:
                continue
            points = self.draw_points(mask_logits, assignment, counts)
            rows = assignment
            if factors is not None:
                mask_logits, rows = matched_mask_logits(*factors[layer], targets, assignment)
            loss_mask, loss_dice = mask_loss(mask_logits, targets, rows, points, num_masks=1.0, term=CROSS_ENTROPY)
            masks.append(loss_mask)
            dices.append(loss_dice)
        class_logits = torch.stack([classes for classes, _ in layers])
        loss_ce = class_loss(class_logits, targets, torch.stack(assignments), class_weights=self.empty_weight)
        return masks, dices, loss_ce

    @torch.no_grad()
    def draw_points(self, mask_logits: Tensor, assignment: Tensor, counts: Sequence[int]) -> Tensor:
        """``(B, M, P, 2)`` float32: the points of each pair, most of them where the query's mask is uncertain.

        The original code numbers the pairs of a batch by image, then by query, and draws candidates for all of them at
        once; so does this, and then hands each target its own.

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
