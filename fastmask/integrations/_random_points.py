"""Matching and losses at random points, as the models of other libraries draw these.

Every random number is drawn as the original code and transformers draw it: the same calls of ``torch.rand`` in the same
order. So with one seed the patched model sees the points that the plain one would, and the two can be compared number
by number.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import grid_sample

from fastmask.functional import assign, class_loss, mask_loss
from fastmask.integrations._foreign_targets import Size, mask_term, matching_cost, onto_void
from fastmask.integrations._replacement import Replacement
from fastmask.modules import Predictions
from fastmask.targets import Targets


class PointMatcher(Replacement, nn.Module):
    """Part of a class that replaces a matcher, whose attributes it reads."""

    cost_class: float
    cost_mask: float
    cost_dice: float
    num_points: int

    @torch.no_grad()
    def match(self, predictions: Predictions, targets: Targets, sizes: Sequence[Size]) -> Tensor:
        """``(L, B, M)`` int64: the query of each target, by costs at new random points, which the layers share.

        Args:
            predictions: of L layers.
            targets: of the B images.
            sizes: (H_b, W_b) of each image's masks; the points lie on the mask without padding.
        """
        points = torch.cat([torch.rand(1, self.num_points, 2, device=targets.device) for _ in sizes])
        cost = matching_cost(self, predictions, targets, sizes, points, mask_term(self, "bce"))
        return assign(cost, targets.counts)


class PointLoss(Replacement, nn.Module):
    """Part of a class that replaces a criterion, whose attributes it reads."""

    matcher: PointMatcher
    empty_weight: Tensor
    num_points: int
    oversample_ratio: float
    importance_sample_ratio: float

    def losses_at_points(
        self,
        layers: Sequence[Predictions],
        targets: Targets,
        counts: Sequence[int],
        sizes: Sequence[Size],
        *,
        with_masks: bool = True,
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Mask and dice losses of each layer, summed over the matched pairs, and classification losses ``(L,)``.

        Args:
            layers: one layer each, in the order in which the original code draws their points.
            targets: of the B images.
            counts: targets of each image, known without asking the device.
            sizes: (H_b, W_b) of each image's masks.
            with_masks: whether mask and dice losses are wanted; without them, no points are drawn for them.
        """
        assignments: list[Tensor] = []
        drawn: list[Tensor] = []
        term = mask_term(self, "bce")
        for layer in layers:
            assignment = self.matcher.match(layer, targets, sizes)
            assignments.append(assignment)
            if with_masks:
                points = self.draw_points(layer.detached_mask_logits()[0], assignment[0], counts)
                drawn.append(onto_void(points, targets, term))
        masks: list[Tensor] = []
        dices: list[Tensor] = []
        if with_masks:
            first = 0
            for group in Predictions.joined(layers):
                of_group = slice(first, first + group.num_layers)
                mask_logits, rows = group.matched(targets, torch.cat(assignments[of_group]))
                points = torch.stack(drawn[of_group])
                loss_mask, loss_dice = mask_loss(mask_logits, targets, rows, points, num_masks=1.0, term=term)
                masks += loss_mask
                dices += loss_dice
                first = of_group.stop
        class_logits = torch.cat([layer.class_logits for layer in layers])
        loss_ce = class_loss(class_logits, targets, torch.cat(assignments), class_weights=self.empty_weight)
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
        matched = assignment >= 0
        firsts = matched.sum(1).cumsum(0) - matched.sum(1)
        ranks = (matched[:, None] & (assignment[:, None] < assignment[:, :, None])).sum(2)
        rows = (firsts[:, None] + ranks).masked_fill(~matched, num_pairs)  # [B, M]
        images = torch.arange(batch_size, device=device)[:, None].expand_as(assignment)
        pair_of_row = torch.zeros(2, num_pairs + 1, dtype=torch.int64, device=device)
        pair_of_row.scatter_(1, rows.flatten().expand(2, -1), torch.stack([images, assignment]).flatten(1))
        planes = mask_logits[pair_of_row[0, :num_pairs], pair_of_row[1, :num_pairs]]  # [pairs, h, w]
        points = most_uncertain(planes, candidates, num_uncertain)
        others = torch.rand(num_pairs, self.num_points - num_uncertain, 2, device=device)
        points = torch.cat([points, others], 1)
        unmatched = points.new_zeros(1, self.num_points, 2)
        return torch.cat([points, unmatched])[rows.flatten()].view(batch_size, num_targets, self.num_points, 2)


@torch.no_grad()
def most_uncertain(mask_logits: Tensor, candidates: Tensor, count: int) -> Tensor:
    """``(T, count, 2)``: the candidates ``(T, C, 2)`` at which the mask logits ``(T, h, w)`` are nearest to 0."""
    if len(mask_logits) == 0:
        return candidates[:, :count]
    chosen = sample(mask_logits[:, None], candidates)[:, 0].abs().topk(count, 1, largest=False, sorted=False).indices
    return candidates.gather(1, chosen[..., None].expand(-1, -1, 2))


def sample(planes: Tensor, points: Tensor) -> Tensor:
    """``(T, C, h, w)`` at ``(T, P, 2)``, bilinearly: ``(T, C, P)`` float32, or float64 of such planes."""
    planes = planes.to(torch.promote_types(planes.dtype, torch.float32))
    return grid_sample(planes, (2 * points).sub_(1)[:, None].to(planes.dtype), align_corners=False)[:, :, 0]
