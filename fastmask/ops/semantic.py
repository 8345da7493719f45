"""``fastmask::semantic_inference``: class labels or scores of pixels, from class probabilities and mask logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmask.ops._geometry import GEOMETRY
from fastmask.ops.library import Operator
from fastmask.targets import label_dtype

OPERATOR = Operator("semantic_inference", native=("cpu",), triton=True)

# (labels or scores, winning score, winning minus runner-up score, NaN logits of each query); the two in the middle are
# empty without `details`.
torch.library.define(
    "fastmask::semantic_inference",
    f"(Tensor probabilities, Tensor mask_logits, str order, str output, bool details, {GEOMETRY}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.register_fake("fastmask::semantic_inference")
def _(
    probabilities: Tensor,
    mask_logits: Tensor,
    order: str,
    output: str,
    details: bool,
    grid: list[int],
    padded_size: list[int] | None,
    valid_size: list[int] | None,
    size: list[int],
    in_top: int,
    out_top: int,
    out_rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch_size, num_queries, num_classes = probabilities.shape
    pixels = (batch_size, out_rows, size[1])
    if output == "labels":
        result = mask_logits.new_empty(pixels, dtype=label_dtype(num_classes))
    else:
        result = mask_logits.new_empty((batch_size, num_classes, *pixels[1:]), dtype=torch.float32)
    score = mask_logits.new_empty(pixels if details else 0, dtype=torch.float32)
    return result, score, torch.empty_like(score), mask_logits.new_empty((batch_size, num_queries), dtype=torch.int32)


def _triton(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from fastmask.kernels.semantic import semantic_inference

    return semantic_inference(*arguments)


torch.library.impl("fastmask::semantic_inference", "cuda", _triton)


def call(backend: str, probabilities: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Runs the operator on the backend chosen.

    The dispatcher has C++ for CPU tensors; their Triton kernels, which the interpreter runs, are called past it.
    """
    interpret = backend == "triton" and probabilities.device.type == "cpu"
    return (_triton if interpret else torch.ops.fastmask.semantic_inference)(probabilities, *arguments)


torch.library.define("fastmask::_set_query_skipping", "(bool on) -> bool")


def set_query_skipping(on: bool) -> bool:
    """Whether the C++ kernel leaves out queries that cannot change a label, for tests: labels are the same either way.

    Returns what it was before.
    """
    return torch.ops.fastmask._set_query_skipping(on)
