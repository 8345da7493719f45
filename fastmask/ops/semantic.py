"""``fastmask::semantic_inference``: class labels or scores of pixels, from class probabilities and mask logits.

It returns labels or scores, the winning score, the winning score minus that of the runner-up, and the number of NaN
logits of each query; the two in the middle are empty without ``details``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask.ops._geometry import GEOMETRY
from fastmask.ops.library import Operator
from fastmask.targets import label_dtype


def _fake(
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


OPERATOR = Operator(
    "semantic_inference",
    f"(Tensor probabilities, Tensor mask_logits, str order, str output, bool details, {GEOMETRY}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
    native=("cpu",),
    triton="semantic",
)

torch.library.define("fastmask::_set_query_skipping", "(bool on) -> bool")


def set_query_skipping(on: bool) -> bool:
    """Whether the C++ kernel leaves out queries that cannot change a label, for tests: labels are the same either way.

    Returns what it was before.
    """
    return torch.ops.fastmask._set_query_skipping(on)
