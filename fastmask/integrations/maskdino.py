"""The matcher and the criterion of MaskDINO's repository (arXiv:2206.02777); ``fastmask.integrations.original`` finds
them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from fastmask.functional import assign, mask_cost
from fastmask.integrations._boxes import box_costs, focal_costs
from fastmask.integrations._foreign_targets import (
    Pairs,
    TargetList,
    device_pairs,
    mask_term,
    matched_masks,
    onto_void,
    pair_losses,
    targets_of_list,
)
from fastmask.integrations._random_points import most_uncertain
from fastmask.integrations._replacement import Replacement
from fastmask.mask_term import MaskTerm

FIRST_STUFF_CLASS = 80  # of COCO, as the repository writes it
ALL_COSTS = ("cls", "box", "mask")


class MaskDinoMatcher(Replacement, nn.Module):
    """The matcher: mask costs by fastmask's kernels, and one assignment for all images."""

    cost_class: float
    cost_mask: float
    cost_dice: float
    cost_box: float
    cost_giou: float
    num_points: int
    panoptic_on: bool

    @torch.no_grad()
    def forward(self, outputs: Mapping[str, Any], targets: TargetList, cost: Sequence[str] = ALL_COSTS) -> Pairs:
        """For each image (queries, targets), int64 on the device of the logits, by ascending query.

        Args:
            outputs: "pred_logits" ``(B, N, K)``, "pred_boxes" ``(B, N, 4)`` and "pred_masks" ``(B, N, h, w)``.
            targets: of each image "labels", "boxes" and "masks".
            cost: which terms count; that of classes always does.
        """
        logits = outputs["pred_logits"].float()
        padded = targets_of_list(self, targets, num_classes=logits.shape[-1], device=logits.device)
        labels = padded.labels.clamp(min=0)
        total = self.cost_class * focal_costs(logits.gather(2, labels[:, None].expand(-1, logits.shape[1], -1)))
        if "box" in cost:
            wanted = pad_sequence([target["boxes"] for target in targets], batch_first=True).to(logits)
            distance, giou = box_costs(outputs["pred_boxes"].to(logits), wanted)
            if self.panoptic_on:
                things = (padded.labels >= 0) & (padded.labels < FIRST_STUFF_CLASS)
                distance, giou = (_mean_for_stuff(term, things) for term in (distance, giou))
            total = total + self.cost_box * distance + self.cost_giou * giou
        if "mask" in cost:
            term = mask_term(self, "bce")
            points = torch.cat([torch.rand(1, self.num_points, 2, device=logits.device) for _ in targets])
            total = total + mask_cost(
                logits.new_zeros(*logits.shape[:2], logits.shape[2] + 1),
                outputs["pred_masks"],
                padded,
                onto_void(points, padded, term),
                cost_class=0.0,
                cost_mask=self.cost_mask,
                cost_dice=self.cost_dice,
                term=term,
            )
        counts = [len(target["labels"]) for target in targets]
        return device_pairs(assign(total, padded.counts), counts, logits.shape[1])

    def memory_efficient_forward(
        self, outputs: Mapping[str, Any], targets: TargetList, cost: Sequence[str] = ALL_COSTS
    ) -> Pairs:
        """What ``forward`` returns."""
        return self.forward(outputs, targets, cost)


class MaskDinoCriterion(Replacement, nn.Module):
    """The criterion: mask and classification losses by fastmask's kernels, of boxes by PyTorch."""

    num_classes: int
    num_points: int
    oversample_ratio: float
    importance_sample_ratio: float
    focal_alpha: float
    _get_src_permutation_idx: Callable[[Pairs], tuple[Tensor, Tensor]]

    def loss_masks(
        self, outputs: Mapping[str, Any], targets: TargetList, indices: Pairs, num_masks: float
    ) -> dict[str, Tensor]:
        """Cross-entropy and dice losses of the matched queries at random points; a target may have several queries."""
        mask_logits = outputs["pred_masks"][self._get_src_permutation_idx(indices)]  # [T, h, w]
        padded = targets_of_list(self, targets, num_classes=self.num_classes, device=mask_logits.device)
        masks, valid = matched_masks(padded, indices)
        num_pairs, num_uncertain = len(mask_logits), int(self.importance_sample_ratio * self.num_points)
        candidates = torch.rand(num_pairs, int(self.num_points * self.oversample_ratio), 2, device=mask_logits.device)
        points = most_uncertain(mask_logits, candidates, num_uncertain)
        others = torch.rand(num_pairs, self.num_points - num_uncertain, 2, device=mask_logits.device)
        points, term = torch.cat([points, others], 1), mask_term(self, "bce")
        loss_mask, loss_dice = pair_losses(mask_logits, masks, points, term=term, valid=valid)
        return {"loss_mask": loss_mask.sum() / num_masks, "loss_dice": loss_dice.sum() / num_masks}

    def loss_labels(
        self, outputs: Mapping[str, Any], targets: TargetList, indices: Pairs, num_boxes: float, log: bool = True
    ) -> dict[str, Tensor]:
        """The focal loss of all logits: that of a mask of one row, of K pixels, for each query."""
        logits = outputs["pred_logits"]
        images, queries = self._get_src_permutation_idx(indices)
        wanted = torch.zeros_like(logits, dtype=torch.bool)
        labels = torch.cat([target["labels"][slots] for target, (_, slots) in zip(targets, indices, strict=True)])
        wanted[images, queries, labels] = True
        term = MaskTerm("focal", alpha=self.focal_alpha)
        means, _ = pair_losses(logits.flatten(0, 1)[:, None], wanted.flatten(0, 1)[:, None], term=term)
        return {"loss_ce": means.sum() * logits.shape[-1] / num_boxes}


def _mean_for_stuff(costs: Tensor, things: Tensor) -> Tensor:
    """Costs ``(B, N, M)`` in which every target of image b that is no thing has the mean of all things; 0 without."""
    columns = things[:, None]
    count = things.sum(1) * costs.shape[1]
    mean = torch.where(columns, costs, 0).sum((1, 2)) / count.clamp(min=1)
    costs = torch.where(columns, costs, mean[:, None, None])
    return costs.masked_fill(costs.isnan(), 0)
