"""A matcher and a criterion that look like MaskDINO's compute what they computed before."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import fastmask
from tests.helpers.maskdino_criteria import (
    NUM_CLASSES,
    NUM_QUERIES,
    HungarianMatcher,
    SetCriterion,
    random_inputs,
)

OPTIONS = {
    "instances": {},
    "panoptic": {"panoptic_on": True},
    "semantic": {"semantic_ce_loss": True, "losses": ("labels", "masks")},
    "without denoising": {"dn": "no"},
}
COUNTS = [(3, 2), (4, 0), (0, 0), (NUM_QUERIES + 2, 1)]


def make(**options):
    return SetCriterion(HungarianMatcher(panoptic_on=options.get("panoptic_on", False)), **options)


def outputs_for(options, inputs):
    """The cross-entropy has a class for no object."""
    outputs, targets, denoised = inputs
    if "semantic_ce_loss" in options:
        for layer in leaves_of(outputs, denoised):
            layer["pred_logits"] = torch.cat([layer["pred_logits"], layer["pred_logits"][..., :1]], -1)
    return outputs, targets, denoised


def leaves_of(outputs, denoised):
    return [outputs, *outputs["aux_outputs"], outputs["interm_outputs"], denoised["output_known_lbs_bboxes"]]


def step(criterion, inputs):
    torch.manual_seed(0)
    outputs, targets, denoised = inputs
    losses = criterion(outputs, targets, denoised)
    tensors = [
        layer[name] for layer in leaves_of(outputs, denoised) for name in ("pred_logits", "pred_masks", "pred_boxes")
    ]
    return losses, torch.autograd.grad(sum(losses.values()), tensors, allow_unused=True), torch.rand(1)


def assert_same(actual, expected):
    assert list(actual[0]) == list(expected[0])
    for name, loss in expected[0].items():
        torch.testing.assert_close(actual[0][name], loss, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(actual[1], expected[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert actual[2] == expected[2]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("counts", COUNTS)
def test_losses_and_gradients_stay(options, counts):
    criterion, inputs = make(**options), outputs_for(options, random_inputs(0, counts))
    expected = step(criterion, inputs)
    fastmask.patch(criterion)
    assert_same(step(criterion, inputs), expected)
    for twin in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert_same(step(twin, inputs), expected)
    fastmask.unpatch(criterion)
    assert (type(criterion), type(criterion.matcher)) == (SetCriterion, HungarianMatcher)


@pytest.mark.parametrize("cost", [("cls", "box", "mask"), ("cls", "box"), ("cls", "mask"), ("cls",)])
@pytest.mark.parametrize("panoptic_on", [False, True])
def test_the_matcher_by_itself(cost, panoptic_on):
    matcher, (outputs, targets, _) = HungarianMatcher(panoptic_on=panoptic_on), random_inputs(1, (5, 3))
    targets[0]["labels"][:] = torch.tensor([3, 85, 80, 79, 89])
    targets[1]["labels"][:] = 85  # no thing at all
    torch.manual_seed(0)
    expected = matcher(outputs, targets, cost)
    for call in (fastmask.patch(matcher), matcher.memory_efficient_forward):
        torch.manual_seed(0)
        for pair, theirs in zip(call(outputs, targets, cost), expected, strict=True):
            assert all(one.equal(other) for one, other in zip(pair, theirs, strict=True))


def test_bad_inputs():
    criterion, (outputs, targets, denoised) = fastmask.patch(make()), random_inputs(2)
    targets[0]["labels"][1] = NUM_CLASSES
    with pytest.raises(ValueError, match=f"holds {NUM_CLASSES}; expected 0..{NUM_CLASSES - 1}"):
        criterion(outputs, targets, denoised)
    outputs, targets, denoised = random_inputs(2)
    targets[1]["masks"] = targets[1]["masks"][:, :20]
    with pytest.raises(ValueError, match="different sizes"):
        criterion(outputs, targets, denoised)
    outputs, targets, denoised = random_inputs(2)
    with torch.no_grad():
        outputs["pred_masks"][0, 2] = torch.nan
    assert 2 not in criterion.matcher(outputs, targets)[0][0]
    with torch.no_grad():
        outputs["pred_boxes"][0, 2, 2] = -1
    with pytest.raises(ValueError, match="pred_boxes holds a size that is negative or NaN"):
        criterion(outputs, targets, denoised)


def test_void_pixels():
    criterion, (outputs, targets, _) = fastmask.patch(make(dn="no"), ignore_void=True), random_inputs(3)
    masks = [target["masks"].float() for target in targets]
    for target, mask in zip(targets, masks, strict=True):
        target["masks"] = mask.clone()
        target["masks"][0, :, 20:] = 255
    torch.manual_seed(0)
    expected = criterion(outputs, targets)
    for target in targets:  # whatever the other masks say there
        target["masks"][1, :, 20:] = 1
    torch.manual_seed(0)
    for name, loss in criterion(outputs, targets).items():
        assert loss.equal(expected[name])


def test_another_criterion_is_refused():
    criterion = make()
    criterion.matcher = HungarianMatcher()
    criterion.matcher.extra = 1
    with pytest.raises(TypeError, match=r"HungarianMatcher has the attributes .*extra.*fastmask knows"):
        fastmask.patch(criterion)
    criterion = make(losses=("labels", "depth"))
    with pytest.raises(TypeError, match="'depth'"):
        fastmask.patch(criterion)
    assert type(criterion.matcher) is HungarianMatcher
