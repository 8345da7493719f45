"""``fastmask::panoptic_winners``: the query that wins each pixel, and how many pixels each query has.

Args of the operator:
    scores: ``(B, N)`` float32, the class probability of each query that was kept and 0 for each that was dropped.
    mask_logits: ``(B, N, rows, w)`` float32, bfloat16 or float16.
    resize_probabilities: resample sigmoid(mask logits), by the second step alone, rather than the logits.
    clip_to_mask: the winner gets only those of its pixels where its own mask reaches ``mask_threshold``.
    mask_threshold: the probability at which a pixel belongs to a mask.
    The other arguments are the geometry that all inference operators share.

Returns of the operator:
    winner: ``(B, out_rows, W)`` int32, the kept query of highest score * probability, the lowest of equals; -1 where
        there is none: nothing was kept, all that was kept is NaN there, or ``clip_to_mask`` took the pixel away.
    areas: ``(B, N, 3)`` int32, pixels that the query wins, pixels of its own mask, and pixels where ``winner`` is it.
    nan_logits: ``(B, N)`` int32, how many of the given logits of a kept query are NaN; 0 for those dropped.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmask.ops._geometry import GEOMETRY
from fastmask.ops.library import Operator


def _fake(
    scores: Tensor,
    mask_logits: Tensor,
    resize_probabilities: bool,
    clip_to_mask: bool,
    mask_threshold: float,
    grid: Sequence[int],
    padded_size: Sequence[int] | None,
    valid_size: Sequence[int] | None,
    size: Sequence[int],
    in_top: int,
    out_top: int,
    out_rows: int,
) -> tuple[Tensor, Tensor, Tensor]:
    batch_size, num_queries = scores.shape
    return (
        scores.new_empty((batch_size, out_rows, size[1]), dtype=torch.int32),
        scores.new_empty((batch_size, num_queries, 3), dtype=torch.int32),
        scores.new_empty((batch_size, num_queries), dtype=torch.int32),
    )


OPERATOR = Operator(
    "panoptic_winners",
    "(Tensor scores, Tensor mask_logits, bool resize_probabilities, bool clip_to_mask, float mask_threshold, "
    f"{GEOMETRY}) -> (Tensor, Tensor, Tensor)",
    _fake,
    native=("cpu",),
    triton="panoptic",
)
