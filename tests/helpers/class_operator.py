"""The classification loss, for the battery of operators. PyTorch's own operators compute it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastmask import class_loss, reference
from tests.helpers.inputs import SHAPES, random_assignment, random_logits, random_targets
from tests.helpers.op_info import Arguments, OpInfo, Refused, changed


@dataclass(frozen=True)
class Inputs:
    shape: tuple[int, ...]

    def __call__(self, generator: torch.Generator) -> Arguments:
        class_logits = random_logits(self.shape, generator)[0]
        targets = random_targets(self.shape, generator, "segments")
        assignment = random_assignment(self.shape, targets, generator)
        return {"class_logits": class_logits, "targets": targets, "assignment": assignment}


def loss(*, backend: str = "auto", **arguments: Any) -> Tensor:
    if backend != "reference":
        return class_loss(**arguments)
    class_logits, targets, assignment = arguments.values()
    return reference.class_loss(class_logits, targets.labels, assignment, eos_coef=0.1)


REFUSED: dict[str, Refused] = {
    "weights of other classes": (
        lambda a: a | {"class_weights": torch.ones(a["class_logits"].shape[-1] - 1)},
        ValueError,
        "class_weights has shape",
    ),
    "integer logits": (
        changed("class_logits", Tensor.int), TypeError, "class_logits must be floating point"
    ),
    "query beyond N": (changed("assignment", lambda x: x + 20), ValueError, "assignment holds"),
    "float assignment": (
        changed("assignment", Tensor.float), TypeError, "assignment must have dtype int64"
    ),
    "another number of targets": (
        changed("assignment", lambda x: x[..., :2]), ValueError, "assignment has shape"
    ),
}  # fmt: skip

CLASS_LOSS = OpInfo(
    name="class_loss",
    operator=None,
    function=loss,
    outputs=("loss",),
    logits=("class_logits",),
    cases={name: Inputs(shape) for name, shape in SHAPES.items()},
    triton={},
    typical=("odd sizes", "usual"),
    refused=REFUSED,
    differentiable=("class_logits",),
    backends=("native",),
)
