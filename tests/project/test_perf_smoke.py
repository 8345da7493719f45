"""pytest-benchmark on small, stable shapes.

The suite only checks that they run (``--benchmark-disable`` in pyproject.toml). To measure, run
``pytest tests/project/test_perf_smoke.py --benchmark-enable``; with ``--benchmark-autosave`` and
``--benchmark-compare`` it shows what got slower. ``benchmarks/run.py`` is what compares with others.
"""

from __future__ import annotations

import pytest
import torch

from fastmask import (
    HungarianMatcher,
    SetCriterion,
    assign,
    mask_cost,
    mask_loss,
    masked_attention,
    semantic_inference,
)
from tests.helpers.inputs import SHAPES, random_assignment, random_logits, random_targets

SHAPE = SHAPES["usual"]
FORMS = ("segments", "masks")


@pytest.fixture(params=FORMS)
def targets(request, generator):
    return random_targets(SHAPE, generator, request.param)


@pytest.fixture
def logits(generator):
    return random_logits(SHAPE, generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mask_cost(benchmark, logits, targets, dtype):
    class_logits, mask_logits = (x.to(dtype) for x in logits)
    cost = benchmark(mask_cost, class_logits, mask_logits, targets)
    assert cost.isfinite().all()


def test_assign(benchmark, generator):
    cost = torch.rand(12, 100, 20, generator=generator)
    assignment = benchmark(assign, cost)
    assert assignment.shape == (12, 20)
    assert (assignment >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mask_loss(benchmark, logits, targets, generator, dtype):
    mask_logits = logits[1].to(dtype).requires_grad_()
    assignment = random_assignment(SHAPE, targets, generator)

    def forward_and_backward():
        loss_mask, loss_dice = mask_loss(mask_logits, targets, assignment)
        return torch.autograd.grad(20 * loss_mask.sum() + loss_dice.sum(), mask_logits)

    (grad,) = benchmark(forward_and_backward)
    assert grad.isfinite().all()


def test_criterion(benchmark, logits, targets):
    class_logits, mask_logits = (x.requires_grad_() for x in logits)
    criterion = SetCriterion(SHAPE[3], HungarianMatcher(1.0, 20.0, 1.0), {})

    def forward_and_backward():
        losses = criterion({"class_logits": class_logits, "mask_logits": mask_logits}, targets)
        return torch.autograd.grad(sum(losses.values()), (class_logits, mask_logits))

    grads = benchmark(forward_and_backward)
    assert all(grad.isfinite().all() for grad in grads)


def test_semantic_inference(benchmark, logits):
    class_logits, mask_logits = logits
    labels = benchmark(semantic_inference, class_logits[0], mask_logits[0], (64, 64))
    assert labels.shape == (SHAPE[1], 64, 64)


def test_masked_attention(benchmark, logits, generator):
    mask_logits = logits[1][0]
    leaves = [torch.randn(SHAPE[1], n, 64, generator=generator).requires_grad_() for n in (SHAPE[2], 256, 256)]

    def forward_and_backward():
        out = masked_attention(*leaves, mask_logits, grid=(16, 16), num_heads=4)
        return torch.autograd.grad(out.square().sum(), leaves)

    grads = benchmark(forward_and_backward)
    assert all(grad.isfinite().all() for grad in grads)
