"""Matchers and criteria that look like the original repositories' are patched, others are refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from torch.nn.functional import cross_entropy, interpolate

import fastmask

NUM_CLASSES = 4


class HungarianMatcher(nn.Module):
    """MaskFormer's in its outer form; inside, the formulas one pair at a time."""

    def __init__(self, cost_class=1, cost_mask=20, cost_dice=1):
        super().__init__()
        self.cost_class = cost_class
        self.cost_mask = cost_mask
        self.cost_dice = cost_dice

    @torch.no_grad()
    def forward(self, outputs, targets):
        pairs = []
        for logits, masks, target in zip(outputs["pred_logits"], outputs["pred_masks"], targets, strict=True):
            small = interpolate(target["masks"][:, None].float(), masks.shape[-2:])[:, 0]
            cost = torch.zeros(len(masks), len(small))
            for n, m in torch.cartesian_prod(torch.arange(len(masks)), torch.arange(len(small))):
                cost[n, m] = (
                    -self.cost_class * logits[n].softmax(-1)[target["labels"][m]]
                    + self.cost_mask * focal(masks[n], small[m])
                    + self.cost_dice * dice(masks[n], small[m])
                )
            pairs.append(tuple(torch.as_tensor(i) for i in linear_sum_assignment(cost)))
        return pairs


class SetCriterion(nn.Module):
    """MaskFormer's in its outer form."""

    def __init__(self, num_classes, matcher, weight_dict, eos_coef, losses):
        super().__init__()
        self.num_classes = num_classes
        self.matcher = matcher
        self.weight_dict = weight_dict
        self.eos_coef = eos_coef
        self.losses = losses
        empty_weight = torch.ones(num_classes + 1)
        empty_weight[-1] = eos_coef
        self.register_buffer("empty_weight", empty_weight)

    def loss_labels(self, outputs, targets, pairs):
        wanted = torch.full(outputs["pred_logits"].shape[:2], self.num_classes)
        for b, (queries, slots) in enumerate(pairs):
            wanted[b, queries] = targets[b]["labels"][slots]
        return {"loss_ce": cross_entropy(outputs["pred_logits"].transpose(1, 2), wanted, self.empty_weight)}

    def loss_masks(self, outputs, targets, pairs):
        losses = {"loss_mask": outputs["pred_masks"].sum() * 0, "loss_dice": outputs["pred_masks"].sum() * 0}
        for masks, target, (queries, slots) in zip(outputs["pred_masks"], targets, pairs, strict=True):
            for n, m in zip(queries, slots, strict=True):
                large = interpolate(masks[None, None, n], target["masks"].shape[-2:], mode="bilinear")[0, 0]
                losses["loss_mask"] = losses["loss_mask"] + focal(large, target["masks"][m].float())
                losses["loss_dice"] = losses["loss_dice"] + dice(large, target["masks"][m].float())
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


def focal(x, t):
    p = x.sigmoid()
    return ((0.25 * t + 0.75 * (1 - t)) * (t * (1 - p) + (1 - t) * p) ** 2 * bce(x, t, reduction="none")).mean()


def dice(x, t):
    p = x.sigmoid()
    return 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)


def make_criterion(losses=("labels", "masks")):
    return SetCriterion(NUM_CLASSES, HungarianMatcher(), {"loss_ce": 1, "loss_mask": 20}, 0.1, list(losses))


def random_inputs(seed, counts=(3, 0)):
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


def gradients(losses, outputs):
    leaves = [layer[name] for layer in (*outputs["aux_outputs"], outputs) for name in ("pred_logits", "pred_masks")]
    return torch.autograd.grad(sum(losses.values()), leaves, allow_unused=True)


@pytest.mark.parametrize("losses", [("labels", "masks"), ("labels",)])
@pytest.mark.parametrize("counts", [(3, 2), (4, 0), (0, 0), (8, 1)])
def test_losses_and_gradients_stay(losses, counts):
    criterion = make_criterion(losses)
    outputs, targets = random_inputs(0, counts)
    theirs = criterion(outputs, targets)
    patched = fastmask.patch(criterion)(outputs, targets)
    assert patched.keys() == theirs.keys()
    for name, loss in theirs.items():
        torch.testing.assert_close(patched[name], loss, rtol=1e-5, atol=1e-7)
    for ours, expected in zip(gradients(patched, outputs), gradients(theirs, outputs), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


def test_the_matcher_by_itself():
    matcher = HungarianMatcher()
    outputs, targets = random_inputs(1)
    theirs = matcher(outputs, targets)
    for pair, expected in zip(fastmask.patch(matcher)(outputs, targets), theirs, strict=True):
        assert all(one.equal(other) for one, other in zip(pair, expected, strict=True))


def test_patched_inside_a_model_and_back():
    model = nn.ModuleDict({"net": nn.Linear(2, 2), "criterion": make_criterion()})
    criterion, matcher, keys = model["criterion"], model["criterion"].matcher, list(model.state_dict())
    inputs = random_inputs(2)
    expected = criterion(*inputs)
    fastmask.patch(fastmask.patch(model))
    assert list(model.state_dict()) == keys
    assert model["criterion"] is criterion
    assert type(criterion) is not SetCriterion
    for twin in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        for name, loss in twin(*inputs).items():
            torch.testing.assert_close(loss, expected[name], rtol=1e-5, atol=1e-7)
    fastmask.unpatch(model)
    assert (type(criterion), type(matcher)) == (SetCriterion, HungarianMatcher)
    assert criterion(*inputs)["loss_mask"].equal(expected["loss_mask"])


def test_a_matcher_of_another_kind_is_refused():
    matcher = HungarianMatcher()
    matcher.cost_bbox = 5
    with pytest.raises(TypeError, match=r"HungarianMatcher has the attributes cost_bbox, cost_class.*fastmask knows"):
        fastmask.patch(matcher)


def test_a_criterion_of_another_kind_is_refused():
    criterion = make_criterion(["labels", "masks"])
    criterion.matcher = nn.Identity()
    with pytest.raises(TypeError, match="the matcher of SetCriterion is a Identity"):
        fastmask.patch(criterion)
    criterion = make_criterion(["labels", "masks", "cardinality"])
    with pytest.raises(TypeError, match="'cardinality'"):
        fastmask.patch(criterion)
    assert type(criterion.matcher) is HungarianMatcher
    criterion = make_criterion()
    renamed = type("SetCriterion", (SetCriterion,), {"forward": lambda self, outputs, targets, text: None})
    criterion.__class__ = renamed
    with pytest.raises(TypeError, match="takes self, outputs, targets, text"):
        fastmask.patch(criterion)


def test_masks_that_the_original_could_not_take_are_refused():
    criterion = fastmask.patch(make_criterion())
    outputs, targets = random_inputs(3, (2, 2))
    targets[1]["masks"] = targets[1]["masks"][:, :20]
    with pytest.raises(ValueError, match="different sizes"):
        criterion(outputs, targets)
    outputs, targets = random_inputs(3, (2, 2))
    targets[1]["masks"] = targets[1]["masks"] * 0.5
    with pytest.raises(ValueError, match='"masks".* holds 0.5'):
        criterion(outputs, targets)


def test_fastmask_modules_are_nobody_elses():
    with pytest.raises(TypeError, match="knows nothing inside SetCriterion"):
        fastmask.patch(fastmask.SetCriterion(2, fastmask.HungarianMatcher(), {}))
