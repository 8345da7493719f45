"""Matchers and criteria that look like those of the original Mask2Former are patched, at the same points."""

from __future__ import annotations

import copy

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from torch.nn.functional import cross_entropy, grid_sample

import fastmask
from tests.integrations.test_patch_original import HungarianMatcher as PixelMatcher
from tests.integrations.test_patch_original import dice, gradients, random_inputs

NUM_CLASSES = 4


def sample(maps, points):
    """``(T, h, w)`` at ``(T, P, 2)``: ``(T, P)``."""
    return grid_sample(maps[:, None], 2 * points[:, :, None] - 1, align_corners=False)[:, 0, :, 0]


class HungarianMatcher(nn.Module):
    """Mask2Former's in its outer form; inside, the formulas one pair at a time."""

    def __init__(self, cost_class=2, cost_mask=5, cost_dice=5, num_points=60):
        super().__init__()
        self.cost_class = cost_class
        self.cost_mask = cost_mask
        self.cost_dice = cost_dice
        self.num_points = num_points

    @torch.no_grad()
    def forward(self, outputs, targets):
        pairs = []
        for logits, masks, target in zip(outputs["pred_logits"], outputs["pred_masks"], targets, strict=True):
            points = torch.rand(1, self.num_points, 2)
            x = sample(masks, points.expand(len(masks), -1, -1))
            t = sample(target["masks"].float(), points.expand(len(target["masks"]), -1, -1))
            cost = torch.zeros(len(x), len(t))
            for n, m in torch.cartesian_prod(torch.arange(len(x)), torch.arange(len(t))):
                cost[n, m] = (
                    -self.cost_class * logits[n].softmax(-1)[target["labels"][m]]
                    + self.cost_mask * bce(x[n], t[m])
                    + self.cost_dice * dice(x[n], t[m])
                )
            pairs.append(tuple(torch.as_tensor(i) for i in linear_sum_assignment(cost)))
        return pairs


class SetCriterion(nn.Module):
    """Mask2Former's in its outer form."""

    def __init__(self, losses=("labels", "masks"), matcher=None):
        super().__init__()
        self.num_classes = NUM_CLASSES
        self.matcher = matcher or HungarianMatcher()
        self.weight_dict = {"loss_ce": 2, "loss_mask": 5, "loss_dice": 5}
        self.eos_coef = 0.1
        self.losses = list(losses)
        self.num_points = 60
        self.oversample_ratio = 3
        self.importance_sample_ratio = 0.75
        empty_weight = torch.ones(NUM_CLASSES + 1)
        empty_weight[-1] = self.eos_coef
        self.register_buffer("empty_weight", empty_weight)

    def loss_labels(self, outputs, targets, pairs):
        wanted = torch.full(outputs["pred_logits"].shape[:2], self.num_classes)
        for b, (queries, slots) in enumerate(pairs):
            wanted[b, queries] = targets[b]["labels"][slots]
        return {"loss_ce": cross_entropy(outputs["pred_logits"].transpose(1, 2), wanted, self.empty_weight)}

    def loss_masks(self, outputs, targets, pairs):
        x = torch.cat([masks[queries] for masks, (queries, _) in zip(outputs["pred_masks"], pairs, strict=True)])
        t = torch.cat([target["masks"][slots] for target, (_, slots) in zip(targets, pairs, strict=True)]).float()
        candidates = torch.rand(len(x), int(self.num_points * self.oversample_ratio), 2)
        num_uncertain = int(self.importance_sample_ratio * self.num_points)
        points = candidates[:, :num_uncertain]
        if len(x) > 0:
            chosen = (-sample(x.detach(), candidates).abs()).topk(num_uncertain, 1).indices
            points = candidates[torch.arange(len(x))[:, None], chosen]
        points = torch.cat([points, torch.rand(len(x), self.num_points - num_uncertain, 2)], 1)
        losses = {"loss_mask": outputs["pred_masks"].sum() * 0, "loss_dice": outputs["pred_masks"].sum() * 0}
        if len(x) > 0:
            for logits, target in zip(sample(x, points), sample(t, points), strict=True):
                losses["loss_mask"] = losses["loss_mask"] + bce(logits, target)
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


@pytest.mark.parametrize("losses", [("labels", "masks"), ("labels",), ("masks",)])
@pytest.mark.parametrize("counts", [(3, 2), (4, 0), (0, 0), (8, 1)])
def test_losses_and_gradients_stay(losses, counts):
    criterion = SetCriterion(losses)
    outputs, targets = random_inputs(0, counts)
    torch.manual_seed(0)
    theirs = criterion(outputs, targets)
    torch.manual_seed(0)
    patched = fastmask.patch(criterion)(outputs, targets)
    assert patched.keys() == theirs.keys()
    for name, loss in theirs.items():
        torch.testing.assert_close(patched[name], loss, rtol=1e-5, atol=1e-7)
    for ours, expected in zip(gradients(patched, outputs), gradients(theirs, outputs), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


def test_the_matcher_by_itself_and_back():
    criterion = SetCriterion()
    outputs, targets = random_inputs(1)
    torch.manual_seed(1)
    theirs = criterion.matcher(outputs, targets)
    fastmask.patch(criterion)
    for matcher in (criterion.matcher, copy.deepcopy(criterion).matcher, fastmask.unpatch(criterion).matcher):
        torch.manual_seed(1)
        for pair, expected in zip(matcher(outputs, targets), theirs, strict=True):
            assert all(one.equal(other) for one, other in zip(pair, expected, strict=True))
    assert type(criterion) is SetCriterion


def test_a_matcher_without_points_is_refused():
    with pytest.raises(TypeError, match="samples points, the other does not"):
        fastmask.patch(SetCriterion(matcher=PixelMatcher()))
