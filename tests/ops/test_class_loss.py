"""The classification loss: what the battery of operators does not ask of every operator."""

from __future__ import annotations

import torch

from fastmask import class_loss
from tests.helpers.inputs import SHAPES, random_assignment, random_logits, random_targets


def test_weights_of_every_class(generator):
    shape = SHAPES["usual"]
    class_logits = random_logits(shape, generator)[0]
    targets = random_targets(shape, generator, "segments")
    assignment = random_assignment(shape, targets, generator)
    weights = torch.ones(6)
    weights[-1] = 0.3
    weighted = class_loss(class_logits, targets, assignment, class_weights=weights)
    torch.testing.assert_close(weighted, class_loss(class_logits, targets, assignment, eos_coef=0.3))
