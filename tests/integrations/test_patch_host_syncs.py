"""Patched matchers and mask losses never wait for the device; see tests/gpu/test_host_syncs.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers.loss import (
    loss_deformable_detr,
    loss_for_object_detection,
    loss_grounding_dino,
    loss_lw_detr,
    loss_rf_detr,
    loss_rt_detr,
)

import fastmask
from tests.gpu.test_host_syncs import DEVICE, _kernels_for_meta_tensors, check  # noqa: F401
from tests.helpers import maskdino_criteria
from tests.helpers.foreign_models import tiny_eomt, tiny_mask2former, tiny_maskformer
from tests.helpers.subclassed_criteria import MaskClassificationLoss

QUERIES, CLASSES, SIDE, COUNTS = 9, 5, 32, (3, 12)


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


def targets(labels="class_labels", dtype=torch.float32):
    return [
        {
            labels: zeros(count, dtype=torch.int64),
            "boxes": zeros(count, 4),
            "masks": zeros(count, SIDE, SIDE, dtype=dtype),
        }
        for count in COUNTS
    ]


def layer(logits="logits", num_queries=QUERIES):
    return {
        logits: zeros(2, num_queries, CLASSES).requires_grad_(),
        "pred_boxes": zeros(2, num_queries, 4),
        "pred_masks": zeros(2, num_queries, 8, 8).requires_grad_(),
        "label_maps": [zeros(CLASSES, CLASSES) for _ in COUNTS],
    }


@pytest.mark.parametrize("form", ["masks", "maps"])
@pytest.mark.parametrize("ignore_void", [False, True])
@pytest.mark.parametrize("make", [tiny_maskformer, tiny_mask2former, tiny_eomt])
def test_criteria_of_transformers(make, ignore_void, form):
    """With the fix; without it, transformers' own code hands the number of masks to the device."""
    criterion = fastmask.patch(make().criterion, fix=True, ignore_void=ignore_void).to(DEVICE)
    masks, classes = zeros(2, QUERIES, 8, 8).requires_grad_(), zeros(2, QUERIES, CLASSES + 1)
    labels = [target["class_labels"] for target in targets()]
    mask_labels = (
        [target["masks"] for target in targets()] if form == "masks" else zeros(2, SIDE, SIDE, dtype=torch.uint8)
    )
    auxiliary = [{"masks_queries_logits": masks, "class_queries_logits": classes}]
    check(lambda: sum(criterion(masks, classes, mask_labels, labels, auxiliary).values()).sum().backward())


def test_the_criterion_of_eomts_authors():
    criterion = fastmask.patch(MaskClassificationLoss()).to(DEVICE)
    masks = zeros(2, QUERIES, 8, 8).requires_grad_()
    check(
        lambda: sum(criterion(masks, targets("labels", torch.bool), zeros(2, QUERIES, CLASSES + 1)).values()).backward()
    )


RT_DETR = {"matcher_class_cost": 2, "matcher_bbox_cost": 5, "matcher_giou_cost": 2}
RT_DETR |= {"use_focal_loss": True, "matcher_alpha": 0.25, "matcher_gamma": 2.0}
MATCHERS = {
    "DETR": (loss_for_object_detection.HungarianMatcher, 1),
    "Deformable DETR": (loss_deformable_detr.DeformableDetrHungarianMatcher, 1),
    "RT-DETR": (lambda: loss_rt_detr.RTDetrHungarianMatcher(SimpleNamespace(**RT_DETR)), 1),
    "Grounding DINO": (loss_grounding_dino.GroundingDinoHungarianMatcher, 1),
    "LW-DETR": (loss_lw_detr.LwDetrHungarianMatcher, 3),
    "RF-DETR": (loss_rf_detr.RfDetrHungarianMatcher, 3),
}


@pytest.mark.parametrize("name", MATCHERS)
def test_matchers_of_detectors(name):
    make, num_groups = MATCHERS[name]
    matcher = fastmask.patch(make())
    check(lambda: matcher.match([layer(num_queries=QUERIES * num_groups) for _ in range(3)], targets(), num_groups))


@pytest.mark.parametrize("ignore_void", [False, True])
def test_mask_losses_of_rf_detr(ignore_void):
    matcher = loss_rf_detr.RfDetrHungarianMatcher()
    criterion = loss_rf_detr.RfDetrImageLoss(matcher, CLASSES, 0.25, ["masks"], 3, 16)
    fastmask.patch(criterion, ignore_void=ignore_void)
    layers = [layer(num_queries=QUERIES * 3) for _ in range(3)]
    check(lambda: criterion.match_ahead(layers, targets(), 3))
    assert len(vars(criterion)["mask_losses"]) == len(layers)


def test_maskdino():
    criterion = maskdino_criteria.SetCriterion(maskdino_criteria.HungarianMatcher(panoptic_on=True))
    fastmask.patch(criterion)
    outputs, labels = layer("pred_logits"), targets("labels", torch.bool)

    def step():
        pairs = criterion.matcher(outputs, labels)
        losses = criterion.loss_masks(outputs, labels, pairs, 3.0) | criterion.loss_labels(outputs, labels, pairs, 3.0)
        sum(losses.values()).backward()

    check(step)
