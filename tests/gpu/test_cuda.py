"""On a GPU: every operator against the reference in float64, and a training step of the model."""

from __future__ import annotations

import pytest
import torch

from fastmask import MaskFormer, MaskFormerConfig, assign, mask_cost, mask_loss
from fastmask.data import CLASS_NAMES, ComposedScenes, collate_scenes
from fastmask.testing import assert_within_budget
from tests.helpers import gpu_errors
from tests.helpers.inputs import SHAPES, random_assignment, random_logits, random_targets

pytestmark = pytest.mark.cuda

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_mask_cost(shape, dtype, generator):
    class_logits, mask_logits = (x.to(dtype) for x in random_logits(shape, generator))
    targets = random_targets(shape, generator, "segments")
    exact = mask_cost(class_logits.double(), mask_logits.double(), targets, backend="reference")
    same_dtype = mask_cost(class_logits.float(), mask_logits.float(), targets, backend="reference")
    actual = mask_cost(class_logits.cuda(), mask_logits.cuda(), targets.to("cuda"))
    assert_within_budget(actual, same_dtype, exact, name="cost", gpu=gpu_errors.mask_cost(1.0, 1.0, 1.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_mask_loss(shape, dtype, generator):
    mask_logits = random_logits(shape, generator)[1].to(dtype)
    targets = random_targets(shape, generator, "masks")
    assignment = random_assignment(shape, targets, generator)
    results = []
    for logits, backend in ((mask_logits.cuda(), "auto"), (mask_logits.float(), "reference")):
        logits.requires_grad_()
        losses = mask_loss(logits, targets.to(logits.device), assignment.to(logits.device), backend=backend)
        results.append((*losses, *torch.autograd.grad(sum(loss.sum() for loss in losses), logits)))
    exact = mask_logits.double().requires_grad_()
    losses = mask_loss(exact, targets, assignment, backend="reference")
    results.append((*losses, *torch.autograd.grad(sum(loss.sum() for loss in losses), exact)))
    for name, *values, gpu in zip(
        ("loss_mask", "loss_dice", "gradient"), *results, gpu_errors.mask_loss(), strict=True
    ):
        assert_within_budget(*values, name=name, gpu=gpu)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_assign(shape, generator):
    targets = random_targets(shape, generator, "segments")
    cost = mask_cost(*random_logits(shape, generator), targets)
    assignment = assign(cost.cuda(), targets.counts.cuda()).cpu()
    expected = assign(cost, targets.counts)
    totals = [
        torch.where(found >= 0, cost.gather(2, found.clamp(min=0)[:, :, None]).squeeze(2), 0).sum(-1)
        for found in (assignment, expected)
    ]
    torch.testing.assert_close(*totals)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_a_training_step_equals_that_on_the_cpu(autocast):
    torch.manual_seed(0)
    model = MaskFormer(MaskFormerConfig.preset("tiny", len(CLASS_NAMES)))
    scenes = ComposedScenes("train", size=(64, 64))
    images, targets = collate_scenes([scenes[i] for i in range(4)])
    expected = model(images, targets)
    model.cuda()
    with torch.autocast("cuda", dtype=autocast or torch.float32, enabled=autocast is not None):
        losses = model(images.cuda(), targets.to("cuda"))
    sum(losses.values()).backward()
    tolerance = 1e-3 if autocast is None else 0.1
    for name, loss in losses.items():
        torch.testing.assert_close(loss.cpu(), expected[name], rtol=tolerance, atol=tolerance)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
