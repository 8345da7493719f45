"""The memory layout of mask logits and their gradient. Imports only PyTorch, as the operators' fake kernels use it."""

from __future__ import annotations

import torch
from torch import Tensor


def with_contiguous_planes(logits: Tensor) -> Tensor:
    """Mask logits ``(L, B, N, h, w)``, copied unless their planes (h, w) are contiguous; other strides are kept."""
    h, w = logits.shape[-2:]
    planes = (w == 1 or logits.stride(-1) == 1) and (h == 1 or logits.stride(-2) == w)
    return logits if planes else logits.contiguous()


def empty_gradient(mask_logits: Tensor) -> Tensor:
    """Memory for the gradient of mask logits ``(L, B, N, h, w)``: contiguous planes, with layers, images and queries in
    the same order as those of the logits, so that the model's backward needs no copy. Logits may overlap in memory;
    their gradient does not. ``csrc/ops/matched_pairs.h`` uses the same layout."""
    mask_logits = with_contiguous_planes(mask_logits)
    h, w = mask_logits.shape[-2:]
    strides, step = [0, 0, 0, w, 1], h * w
    for d in sorted((2, 1, 0), key=mask_logits.stride):
        strides[d] = step
        step *= max(mask_logits.shape[d], 1)
    return mask_logits.new_empty_strided(mask_logits.shape, strides)


def words(points: Tensor) -> Tensor:
    """(x, y) of each point, float32, as one integer, which a thread reads at once."""
    points = points.contiguous()
    return (points if points.data_ptr() % 8 == 0 else points.clone()).view(torch.int64)
