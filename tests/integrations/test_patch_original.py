"""Matchers and criteria that look like the original repositories' are patched, others are refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import fastmask
from tests.helpers.original_criteria import HungarianMatcher, SetCriterion, make_criterion, random_inputs

# MaskFormer's, and Mask2Former's at as many points, which are the same where the seed is.
forms = pytest.mark.parametrize("num_points", [0, 60], ids=["pixels", "points"])


def gradients(losses, outputs):
    leaves = [layer[name] for layer in (*outputs["aux_outputs"], outputs) for name in ("pred_logits", "pred_masks")]
    return torch.autograd.grad(sum(losses.values()), leaves, allow_unused=True)


def seeded(call, *arguments):
    torch.manual_seed(0)
    return call(*arguments)


@forms
@pytest.mark.parametrize("losses", [("labels", "masks"), ("labels",), ("masks",)])
@pytest.mark.parametrize("counts", [(3, 2), (4, 0), (0, 0), (8, 1)])
def test_losses_and_gradients_stay(num_points, losses, counts):
    criterion = make_criterion(losses, num_points)
    outputs, targets = random_inputs(0, counts)
    theirs = seeded(criterion, outputs, targets)
    patched = seeded(fastmask.patch(criterion), outputs, targets)
    assert patched.keys() == theirs.keys()
    for name, loss in theirs.items():
        torch.testing.assert_close(patched[name], loss, rtol=1e-5, atol=1e-7)
    for ours, expected in zip(gradients(patched, outputs), gradients(theirs, outputs), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


@forms
def test_the_matcher_by_itself_and_back(num_points):
    criterion = make_criterion(num_points=num_points)
    outputs, targets = random_inputs(1)
    theirs = seeded(criterion.matcher, outputs, targets)
    fastmask.patch(criterion)
    for matcher in (criterion.matcher, copy.deepcopy(criterion).matcher, fastmask.unpatch(criterion).matcher):
        for pair, expected in zip(seeded(matcher, outputs, targets), theirs, strict=True):
            assert all(one.equal(other) for one, other in zip(pair, expected, strict=True))
    assert type(criterion) is SetCriterion


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


class UsersCriterion(SetCriterion):
    def loss_labels(self, outputs, targets, pairs):
        return {name: 2 * loss for name, loss in super().loss_labels(outputs, targets, pairs).items()}


class UsersMatcher(HungarianMatcher):
    def forward(self, outputs, targets):
        return [(queries.flip(0), slots.flip(0)) for queries, slots in super().forward(outputs, targets)]


@forms
@pytest.mark.parametrize("change", ["criterion", "matcher", "neither"])
def test_subclasses_keep_what_they_override(num_points, change):
    """And what they call with super() is replaced."""
    criterion, (outputs, targets) = make_criterion(num_points=num_points), random_inputs(4)
    criterion.__class__ = UsersCriterion if change == "criterion" else type("Own", (SetCriterion,), {})
    criterion.matcher.__class__ = UsersMatcher if change == "matcher" else HungarianMatcher
    criterion.extra = "of the subclass"
    theirs = seeded(criterion, outputs, targets)
    fastmask.patch(criterion)
    assert len(type(criterion.matcher).__mro__) > len(HungarianMatcher.__mro__)
    for name, loss in seeded(criterion, outputs, targets).items():
        torch.testing.assert_close(loss, theirs[name], rtol=1e-5, atol=1e-7)
    assert isinstance(criterion, SetCriterion)


def test_a_matcher_of_another_kind_is_refused():
    matcher = HungarianMatcher()
    matcher.cost_bbox = 5
    with pytest.raises(TypeError, match=r"HungarianMatcher has the attributes cost_bbox, cost_class.*fastmask knows"):
        fastmask.patch(matcher)


def test_a_criterion_of_another_kind_is_refused():
    criterion = make_criterion()
    criterion.matcher = nn.Identity()
    with pytest.raises(TypeError, match="the matcher of SetCriterion is a Identity with no attributes"):
        fastmask.patch(criterion)
    with pytest.raises(
        TypeError, match=r"HungarianMatcher with cost_class, cost_dice, cost_mask; expected .* num_points"
    ):
        fastmask.patch(SetCriterion(HungarianMatcher(), num_points=60))
    criterion = make_criterion(("labels", "masks", "cardinality"))
    with pytest.raises(TypeError, match="'cardinality'"):
        fastmask.patch(criterion)
    assert type(criterion.matcher) is HungarianMatcher
    criterion = make_criterion()
    renamed = type("SetCriterion", (SetCriterion,), {"forward": lambda self, outputs, targets, text: None})
    criterion.__class__ = renamed
    with pytest.raises(TypeError, match="takes outputs, targets, text; expected outputs, targets"):
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
