"""A matcher and a criterion that look like those of MaskDINO's repository; inside, the formulas one image at a time."""

from __future__ import annotations

from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from torch.nn.functional import cross_entropy, l1_loss

from tests.helpers.original_criteria import dice, sample, uncertain_points

NUM_CLASSES, NUM_QUERIES, NUM_POINTS, STUFF = 90, 7, 60, 80


def giou(boxes: Tensor, others: Tensor) -> Tensor:
    """``(N, M)`` of boxes as centers and sizes."""
    result = torch.zeros(len(boxes), len(others))
    for n, (ax, ay, aw, ah) in enumerate(boxes):
        for m, (bx, by, bw, bh) in enumerate(others):
            lefts, rights = (ax - aw / 2, bx - bw / 2), (ax + aw / 2, bx + bw / 2)
            tops, bottoms = (ay - ah / 2, by - bh / 2), (ay + ah / 2, by + bh / 2)
            inner = (min(rights) - max(lefts)).clamp(min=0) * (min(bottoms) - max(tops)).clamp(min=0)
            hull, union = (max(rights) - min(lefts)) * (max(bottoms) - min(tops)), aw * ah + bw * bh - inner
            result[n, m] = inner / union - (hull - union) / hull
    return result


class HungarianMatcher(nn.Module):
    def __init__(self, cost_class=4, cost_mask=5, cost_dice=5, num_points=NUM_POINTS, cost_box=5, cost_giou=2,
                 panoptic_on=False) -> None:  # fmt: skip
        super().__init__()
        self.cost_class, self.cost_mask, self.cost_dice = cost_class, cost_mask, cost_dice
        self.cost_box, self.cost_giou = cost_box, cost_giou
        self.panoptic_on, self.num_points = panoptic_on, num_points

    @torch.no_grad()
    def memory_efficient_forward(self, outputs, targets, cost=("cls", "box", "mask")):
        pairs = []
        for b, target in enumerate(targets):
            labels, p = target["labels"], outputs["pred_logits"][b].sigmoid()
            positive = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log()
            total = self.cost_class * (positive - 0.75 * p**2 * -(1 - p + 1e-8).log())[:, labels]
            if "box" in cost:
                terms = [
                    torch.cdist(outputs["pred_boxes"][b], target["boxes"], p=1),
                    -giou(outputs["pred_boxes"][b], target["boxes"]),
                ]
                for weight, term in zip((self.cost_box, self.cost_giou), terms, strict=True):
                    if self.panoptic_on:
                        term[:, labels >= STUFF] = term[:, labels < STUFF].mean()
                        term[term.isnan()] = 0
                    total = total + weight * term
            if "mask" in cost:
                points = torch.rand(1, self.num_points, 2)
                planes = outputs["pred_masks"][b], target["masks"].float()
                x, t = (sample(plane, points.expand(len(plane), -1, -1)) for plane in planes)
                for n, m in torch.cartesian_prod(torch.arange(len(x)), torch.arange(len(t))):
                    total[n, m] += self.cost_mask * bce(x[n], t[m]) + self.cost_dice * dice(x[n], t[m])
            pairs.append(tuple(torch.as_tensor(i, dtype=torch.int64) for i in linear_sum_assignment(total)))
        return pairs

    @torch.no_grad()
    def forward(self, outputs, targets, cost=("cls", "box", "mask")):
        return self.memory_efficient_forward(outputs, targets, cost)


class SetCriterion(nn.Module):
    def __init__(self, matcher, losses=("labels", "masks", "boxes"), dn="seg", panoptic_on=False,
                 semantic_ce_loss=False) -> None:  # fmt: skip
        super().__init__()
        self.num_classes = NUM_CLASSES
        self.matcher = matcher
        self.weight_dict: dict[str, float] = {}
        self.eos_coef, self.losses, self.dn, self.dn_losses = 0.1, list(losses), dn, list(losses)
        empty_weight = torch.ones(NUM_CLASSES + 1)
        empty_weight[-1] = self.eos_coef
        self.register_buffer("empty_weight", empty_weight)
        self.num_points, self.oversample_ratio, self.importance_sample_ratio = NUM_POINTS, 3.0, 0.75
        self.focal_alpha, self.panoptic_on, self.semantic_ce_loss = 0.25, panoptic_on, semantic_ce_loss

    def _wanted(self, outputs, targets, indices):
        wanted = torch.full(outputs["pred_logits"].shape[:2], self.num_classes)
        for b, (queries, slots) in enumerate(indices):
            wanted[b, queries] = targets[b]["labels"][slots]
        return wanted

    def loss_labels_ce(self, outputs, targets, indices, num_masks):
        wanted = self._wanted(outputs, targets, indices)
        return {"loss_ce": cross_entropy(outputs["pred_logits"].transpose(1, 2), wanted, self.empty_weight)}

    def loss_labels(self, outputs, targets, indices, num_boxes, log=True):
        x = outputs["pred_logits"]
        t = torch.eye(self.num_classes + 1)[self._wanted(outputs, targets, indices)][..., :-1]
        p = x.sigmoid()
        factor = (self.focal_alpha * t + (1 - self.focal_alpha) * (1 - t)) * (t * (1 - p) + (1 - t) * p) ** 2
        return {"loss_ce": (factor * bce(x, t, reduction="none")).mean(1).sum() / num_boxes * x.shape[1]}

    def loss_boxes(self, outputs, targets, indices, num_boxes):
        pairs = enumerate(indices)
        boxes = torch.cat([targets[b]["boxes"][slots] for b, (_, slots) in pairs])
        found = outputs["pred_boxes"][self._get_src_permutation_idx(indices)]
        one = giou(found.detach(), boxes).diag().sum()  # for the sum alone
        return {
            "loss_bbox": l1_loss(found, boxes, reduction="sum") / num_boxes,
            "loss_giou": (len(boxes) - one) / num_boxes,
        }

    def loss_boxes_panoptic(self, outputs, targets, indices, num_boxes):
        things = [
            (q[targets[b]["labels"][s] < STUFF], s[targets[b]["labels"][s] < STUFF]) for b, (q, s) in enumerate(indices)
        ]
        return self.loss_boxes(outputs, targets, things, num_boxes)

    def loss_masks(self, outputs, targets, indices, num_masks):
        x = outputs["pred_masks"][self._get_src_permutation_idx(indices)]
        t = torch.cat([targets[b]["masks"][slots] for b, (_, slots) in enumerate(indices)]).float()
        points = uncertain_points(self, x)
        losses = {"loss_mask": outputs["pred_masks"].sum() * 0, "loss_dice": outputs["pred_masks"].sum() * 0}
        if len(x) > 0:
            for logits, target in zip(sample(x, points), sample(t, points), strict=True):
                losses["loss_mask"] = losses["loss_mask"] + bce(logits, target)
                losses["loss_dice"] = losses["loss_dice"] + dice(logits, target)
        return {name: loss / num_masks for name, loss in losses.items()}

    def _get_src_permutation_idx(self, indices):
        images = torch.cat([torch.full_like(queries, b) for b, (queries, _) in enumerate(indices)])
        return images, torch.cat([queries for queries, _ in indices])

    def get_loss(self, loss, outputs, targets, indices, num_masks):
        methods = {
            "labels": self.loss_labels_ce if self.semantic_ce_loss else self.loss_labels,
            "masks": self.loss_masks,
            "boxes": self.loss_boxes_panoptic if self.panoptic_on else self.loss_boxes,
        }
        return methods[loss](outputs, targets, indices, num_masks)

    def forward(self, outputs, targets, mask_dict=None):
        num_masks = max(1, sum(len(target["labels"]) for target in targets))
        layers = [("", outputs), *((f"_{i}", layer) for i, layer in enumerate(outputs.get("aux_outputs", ())))]
        layers += [("_interm", outputs["interm_outputs"])] if "interm_outputs" in outputs else []
        losses = {}
        for suffix, layer in layers:
            indices = self.matcher(layer, targets)
            for name in self.losses:
                found = self.get_loss(name, layer, targets, indices, num_masks)
                losses |= {key + suffix: loss for key, loss in found.items()}
            if self.dn != "no" and mask_dict is not None and suffix == "":
                # Every target has a denoised query in each of several groups.
                groups, size = mask_dict["scalar"], mask_dict["pad_size"] // mask_dict["scalar"]
                known = []
                for target in targets:
                    slots = torch.arange(len(target["labels"])).repeat(groups, 1)
                    known.append(((slots + size * torch.arange(groups)[:, None]).flatten(), slots.flatten()))
                for name in self.dn_losses:
                    denoised = mask_dict["output_known_lbs_bboxes"]
                    found = self.get_loss(name, denoised, targets, known, num_masks * groups)
                    losses |= {f"{key}_dn": loss for key, loss in found.items()}
        return losses


def random_layer(generator: torch.Generator, num_queries: int = NUM_QUERIES) -> dict[str, Tensor]:
    return {
        "pred_logits": torch.randn(2, num_queries, NUM_CLASSES, generator=generator).requires_grad_(),
        "pred_masks": (3 * torch.randn(2, num_queries, 8, 10, generator=generator)).requires_grad_(),
        "pred_boxes": (0.2 + 0.5 * torch.rand(2, num_queries, 4, generator=generator)).requires_grad_(),
    }


def random_inputs(seed: int, counts: tuple[int, int] = (3, 2)) -> tuple[dict[str, Any], list[dict[str, Tensor]], dict]:
    """Outputs of three layers and of the encoder, targets, and denoised queries in two groups."""
    generator = torch.Generator().manual_seed(seed)
    outputs: dict[str, Any] = random_layer(generator)
    outputs["aux_outputs"] = [random_layer(generator) for _ in range(2)]
    outputs["interm_outputs"] = random_layer(generator)
    targets = [
        {
            "labels": torch.randint(NUM_CLASSES, (count,), generator=generator),
            "boxes": 0.2 + 0.5 * torch.rand(count, 4, generator=generator),
            "masks": torch.rand(count, 31, 40, generator=generator) < 0.4,
        }
        for count in counts
    ]
    size = max(counts)
    denoised = {"scalar": 2, "pad_size": 2 * size, "output_known_lbs_bboxes": random_layer(generator, max(1, 2 * size))}
    return outputs, targets, denoised
