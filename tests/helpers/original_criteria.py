"""Matchers and criteria that look like the original repositories'; inside, the formulas one pair at a time."""

from __future__ import annotations

from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from torch.nn.functional import cross_entropy, grid_sample, interpolate

NUM_CLASSES = 4


def focal(x: Tensor, t: Tensor) -> Tensor:
    p = x.sigmoid()
    return ((0.25 * t + 0.75 * (1 - t)) * (t * (1 - p) + (1 - t) * p) ** 2 * bce(x, t, reduction="none")).mean()


def dice(x: Tensor, t: Tensor) -> Tensor:
    p = x.sigmoid()
    return 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)


def sample(maps: Tensor, points: Tensor) -> Tensor:
    """``(T, h, w)`` at ``(T, P, 2)``: ``(T, P)``."""
    return grid_sample(maps[:, None], 2 * points[:, :, None] - 1, align_corners=False)[:, 0, :, 0]


def uncertain_points(criterion: Any, x: Tensor) -> Tensor:
    """``(T, P, 2)``: of the criterion's number of points, those where the logits ``x (T, h, w)`` are nearest to 0, and
    random ones."""
    candidates = torch.rand(len(x), int(criterion.num_points * criterion.oversample_ratio), 2)
    num_uncertain = int(criterion.importance_sample_ratio * criterion.num_points)
    points = candidates[:, :num_uncertain]
    if len(x) > 0:
        chosen = (-sample(x.detach(), candidates).abs()).topk(num_uncertain, 1).indices
        points = candidates[torch.arange(len(x))[:, None], chosen]
    return torch.cat([points, torch.rand(len(x), criterion.num_points - num_uncertain, 2)], 1)


class HungarianMatcher(nn.Module):
    """MaskFormer's, or with ``num_points`` Mask2Former's."""

    def __init__(self, cost_class: float = 1, cost_mask: float = 20, cost_dice: float = 1, num_points: int = 0) -> None:
        super().__init__()
        self.cost_class = cost_class
        self.cost_mask = cost_mask
        self.cost_dice = cost_dice
        if num_points:
            self.num_points = num_points

    def compared(self, masks: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if not hasattr(self, "num_points"):
            return masks, interpolate(targets[:, None], masks.shape[-2:])[:, 0]
        points = torch.rand(1, self.num_points, 2)
        x, t = (sample(maps, points.expand(len(maps), -1, -1)) for maps in (masks, targets))
        return x, t

    @torch.no_grad()
    def forward(self, outputs, targets):
        pairs = []
        mask_term = bce if hasattr(self, "num_points") else focal
        for logits, masks, target in zip(outputs["pred_logits"], outputs["pred_masks"], targets, strict=True):
            x, t = self.compared(masks, target["masks"].float())
            cost = torch.zeros(len(x), len(t))
            for n, m in torch.cartesian_prod(torch.arange(len(x)), torch.arange(len(t))):
                cost[n, m] = (
                    -self.cost_class * logits[n].softmax(-1)[target["labels"][m]]
                    + self.cost_mask * mask_term(x[n], t[m])
                    + self.cost_dice * dice(x[n], t[m])
                )
            pairs.append(tuple(torch.as_tensor(i) for i in linear_sum_assignment(cost)))
        return pairs


class SetCriterion(nn.Module):
    """MaskFormer's, or with ``num_points`` Mask2Former's."""

    def __init__(self, matcher: nn.Module, losses: tuple[str, ...] = ("labels", "masks"), num_points: int = 0) -> None:
        super().__init__()
        self.num_classes = NUM_CLASSES
        self.matcher = matcher
        self.weight_dict = {"loss_ce": 1, "loss_mask": 20}
        self.eos_coef = 0.1
        self.losses = list(losses)
        if num_points:
            self.num_points, self.oversample_ratio, self.importance_sample_ratio = num_points, 3, 0.75
        empty_weight = torch.ones(NUM_CLASSES + 1)
        empty_weight[-1] = self.eos_coef
        self.register_buffer("empty_weight", empty_weight)

    def loss_labels(self, outputs, targets, pairs):
        wanted = torch.full(outputs["pred_logits"].shape[:2], self.num_classes)
        for b, (queries, slots) in enumerate(pairs):
            wanted[b, queries] = targets[b]["labels"][slots]
        return {"loss_ce": cross_entropy(outputs["pred_logits"].transpose(1, 2), wanted, self.empty_weight)}

    def compared(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        if not hasattr(self, "num_points"):
            return interpolate(x[:, None], t.shape[-2:], mode="bilinear")[:, 0], t
        points = uncertain_points(self, x)
        return (sample(x, points), sample(t, points)) if len(x) > 0 else (x, t)

    def loss_masks(self, outputs, targets, pairs):
        x = torch.cat([masks[queries] for masks, (queries, _) in zip(outputs["pred_masks"], pairs, strict=True)])
        t = torch.cat([target["masks"][slots] for target, (_, slots) in zip(targets, pairs, strict=True)]).float()
        mask_term = bce if hasattr(self, "num_points") else focal
        losses = {"loss_mask": outputs["pred_masks"].sum() * 0, "loss_dice": outputs["pred_masks"].sum() * 0}
        for logits, target in zip(*self.compared(x, t), strict=True):
            losses["loss_mask"] = losses["loss_mask"] + mask_term(logits, target)
            losses["loss_dice"] = losses["loss_dice"] + dice(logits, target)
        count = max(1, sum(len(target["labels"]) for target in targets))
        return {name: loss / count for name, loss in losses.items()}

    def forward(self, outputs, targets):
        losses = {}
        for suffix, layer in [("", outputs), *((f"_{i}", aux) for i, aux in enumerate(outputs.get("aux_outputs", [])))]:
            pairs = self.matcher(layer, targets)
            for name in self.losses:
                for key, loss in getattr(self, f"loss_{name}")(layer, targets, pairs).items():
                    losses[key + suffix] = loss
        return losses


def make_criterion(losses: tuple[str, ...] = ("labels", "masks"), num_points: int = 0) -> SetCriterion:
    return SetCriterion(HungarianMatcher(num_points=num_points), losses, num_points)


def random_inputs(seed: int, counts: tuple[int, ...] = (3, 0)) -> tuple[dict[str, Any], list[dict[str, Tensor]]]:
    """Outputs of three layers for two images, and ``counts[b]`` targets of image b."""
    generator = torch.Generator().manual_seed(seed)
    layers = [
        {
            "pred_logits": torch.randn(2, 6, NUM_CLASSES + 1, generator=generator).requires_grad_(),
            "pred_masks": (torch.randn(2, 6, 8, 10, generator=generator) * 3).requires_grad_(),
        }
        for _ in range(3)
    ]
    targets = [
        {
            "labels": torch.randint(NUM_CLASSES, (count,), generator=generator),
            "masks": torch.rand(count, 31, 40, generator=generator) < 0.4,
        }
        for count in counts
    ]
    return {**layers[-1], "aux_outputs": layers[:-1]}, targets
