from __future__ import annotations

import pytest
import torch

from fastmask import class_loss, reference
from fastmask.testing import assert_within_budget
from tests.helpers.inputs import SHAPES, random_assignment, random_logits, random_targets


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_the_reference(shape, generator):
    class_logits = random_logits(shape, generator)[0]
    targets = random_targets(shape, generator, "segments")
    assignment = random_assignment(shape, targets, generator)
    results = []
    for function, dtype, arguments in (
        (class_loss, torch.float32, (targets, assignment)),
        (reference.class_loss, torch.float32, (targets.labels, assignment)),
        (reference.class_loss, torch.float64, (targets.labels, assignment)),
    ):
        logits = class_logits.to(dtype).requires_grad_()
        losses = function(logits, *arguments, eos_coef=0.1)
        results.append((losses, *torch.autograd.grad(losses.sum(), logits)))
    for name, *values in zip(("loss_ce", "gradient"), *results, strict=True):
        assert_within_budget(*values, name=name)


def test_weights_of_every_class(generator):
    shape = SHAPES["usual"]
    class_logits = random_logits(shape, generator)[0]
    targets = random_targets(shape, generator, "segments")
    assignment = random_assignment(shape, targets, generator)
    weights = torch.ones(6)
    weights[-1] = 0.3
    weighted = class_loss(class_logits, targets, assignment, class_weights=weights)
    torch.testing.assert_close(weighted, class_loss(class_logits, targets, assignment, eos_coef=0.3))
    with pytest.raises(ValueError, match="class_weights has shape"):
        class_loss(class_logits, targets, assignment, class_weights=weights[1:])


def test_half_precision_gives_a_float32_loss(generator):
    shape = SHAPES["usual"]
    class_logits = random_logits(shape, generator)[0].bfloat16().requires_grad_()
    targets = random_targets(shape, generator, "segments")
    losses = class_loss(class_logits, targets, random_assignment(shape, targets, generator))
    assert losses.dtype == torch.float32
    assert torch.autograd.grad(losses.sum(), class_logits)[0].dtype == torch.bfloat16
