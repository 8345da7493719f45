"""Semantic inference's scores, for the battery of operators."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastmask import reference, semantic_inference
from fastmask.ops._geometry import Geometry
from fastmask.testing import GpuError
from tests.helpers import gpu_errors
from tests.helpers.inference_inputs import SMALL_GEOMETRIES, random_classes, random_masks, steps
from tests.helpers.op_info import Arguments, Case, OpInfo, Refused

Size = tuple[int, int]
# (B, N, K, (h, w), (H, W)): each shape is there for a reason.
SHAPES: dict[str, tuple[int, int, int, Size, Size]] = {
    "usual": (2, 20, 5, (32, 32), (128, 128)),
    "odd sizes": (1, 7, 13, (13, 29), (50, 117)),
    "one of everything": (1, 1, 1, (1, 1), (1, 1)),
    "one logit, many pixels": (1, 3, 2, (1, 1), (9, 150)),
    "one row": (2, 5, 4, (1, 70), (1, 280)),
    "one class": (1, 4, 1, (6, 7), (24, 30)),
    "same size": (1, 9, 6, (24, 70), (24, 70)),
    "smaller than the logits": (1, 6, 4, (33, 140), (17, 31)),
    "much smaller than the logits": (1, 3, 7, (90, 400), (2, 3)),
    "no queries": (2, 0, 3, (5, 6), (9, 11)),
    "a query more than a vector": (1, 17, 19, (16, 16), (40, 70)),
    "as many classes as a byte holds": (1, 4, 256, (5, 6), (20, 24)),
    "labels of two bytes": (1, 4, 257, (5, 6), (20, 24)),
    "labels of four bytes": (1, 2, 32769, (2, 2), (3, 3)),
}
STEPS: dict[str, dict[str, Size]] = {
    "one step": {},
    "two steps": {"padded_size": (96, 160), "valid_size": (90, 131)},
    "crop only": {"valid_size": (23, 35)},
    "padding only": {"padded_size": (96, 160)},
    "smaller, then larger": {"padded_size": (10, 13), "valid_size": (9, 13)},
}
ORDERS = ("masks", "scores")


@dataclass(frozen=True)
class Inputs:
    """Noise, for the CPU's kernel; blobs, for Triton's."""

    shape: tuple[int, int, int, Size, Size]
    order: str
    steps: dict[str, Any] = field(default_factory=dict)
    blobs: bool = False

    def __call__(self, generator: torch.Generator) -> Arguments:
        batch, queries, classes, grid, size = self.shape
        if self.blobs:
            class_logits = random_classes(batch, queries, classes, generator)
            mask_logits = random_masks(batch, queries, grid, generator)
        else:
            class_logits = 2 * torch.randn(batch, queries, classes + 1, generator=generator)
            mask_logits = 4 * torch.randn(batch, queries, *grid, generator=generator)
        return {
            "class_logits": class_logits, "mask_logits": mask_logits, "size": size, "order": self.order, **self.steps
        }  # fmt: skip


CASES: dict[str, Case] = {
    f"{name}, {order} first": Inputs(shape, order) for name, shape in SHAPES.items() for order in ORDERS
} | {
    f"{name} to {size}, {order} first": Inputs((1, 8, 9, (24, 40), size), order, sizes)
    for name, sizes in STEPS.items()
    for size in ((70, 333), (90, 131), (11, 40))
    for order in ORDERS
}
TRITON_CASES: dict[str, Case] = {
    f"{name}, {order} first": Inputs((1, 18, 5, sizes.grid, sizes.size), order, steps(sizes), blobs=True)
    for name, sizes in SMALL_GEOMETRIES.items()
    for order in ORDERS
}
NO_RATIO = SMALL_GEOMETRIES["no ratio"]
for queries, classes in ((1, 1), (16, 19), (33, 1), (100, 150), (40, 400)):  # 400: more than a program holds
    TRITON_CASES[f"{queries} queries, {classes} classes"] = Inputs(
        (1, queries, classes, NO_RATIO.grid, NO_RATIO.size), "masks", blobs=True
    )


def scores(**arguments: Any) -> Tensor:
    """The reference in the dtype of the logits: the public function has float32 for halves."""
    arguments = {"output": "scores"} | arguments
    if arguments.get("backend") == "reference":
        del arguments["backend"]
        return reference.semantic_inference(**arguments)
    return semantic_inference(**arguments)


def operands(arguments: Arguments) -> tuple[Any, ...]:
    mask_logits = arguments["mask_logits"]
    sizes = (arguments.get(name) for name in ("padded_size", "valid_size"))
    geometry = Geometry(tuple(mask_logits.shape[2:]), *sizes, arguments["size"]).arguments()
    probabilities = arguments["class_logits"].softmax(-1)[..., :-1].contiguous()
    return (probabilities, mask_logits, arguments["order"], "scores", False, *geometry)


def gpu_error(arguments: Arguments, _: torch.dtype) -> tuple[GpuError, ...]:
    return (gpu_errors.semantic(arguments["mask_logits"].shape[1]),)


REFUSED: dict[str, Refused] = {
    "size 0": (lambda a: a | {"size": (0, 4)}, ValueError, "size must be"),
    "integer logits": (
        lambda a: a | {"mask_logits": a["mask_logits"].int()}, TypeError, "mask_logits must be floating point"
    ),
    "another batch": (
        lambda a: a | {"class_logits": a["class_logits"][:0]}, ValueError, "class_logits has shape"
    ),
    "no classes": (lambda a: a | {"class_logits": a["class_logits"][..., :1]}, ValueError, "K at least 1"),
    "no pixels": (
        lambda a: a | {"mask_logits": a["mask_logits"][..., :0]}, ValueError, "expected at least one pixel"
    ),
    "unknown order": (lambda a: a | {"order": "labels"}, ValueError, "order must be one of"),
    "unknown output": (lambda a: a | {"output": "masks"}, ValueError, "output must be one of"),
    "details of scores": (lambda a: a | {"details": True}, ValueError, "details"),
    "valid beyond": (lambda a: a | {"valid_size": (33, 1)}, ValueError, "does not lie within"),
    "one embedding": (lambda a: a | {"mask_logits": (a["mask_logits"],)}, TypeError, "a pair"),
    "embeddings do not fit": (
        lambda a: a | {"mask_logits": (a["class_logits"], a["mask_logits"])}, ValueError, "mask_embed"
    ),
    "float64": (
        lambda a: a | {"mask_logits": a["mask_logits"].double(), "backend": "native"}, RuntimeError,
        "do not support float64",
    ),
}  # fmt: skip

SEMANTIC_INFERENCE = OpInfo(
    name="semantic_inference",
    operator="semantic_inference",
    function=scores,
    outputs=("scores",),
    logits=("class_logits", "mask_logits"),
    cases=CASES,
    triton=TRITON_CASES,
    typical=(
        "odd sizes, masks first", "odd sizes, scores first", "both steps, masks first", "both steps, scores first",
        "100 queries, 150 classes",
    ),
    refused=REFUSED,
    operands=operands,
    gpu_error=gpu_error,
    own_products=(torch.bfloat16,),  # of one part, of float16, for each factor; others have more
)  # fmt: skip
