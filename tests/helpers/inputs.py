"""Random inputs that several tests draw."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask import Targets

# (L, B, N, K, M, h, w, H, W): each shape is there for a reason.
SHAPES = {
    "usual": (2, 2, 20, 5, 6, 32, 32, 128, 128),
    "odd sizes": (1, 3, 7, 3, 5, 13, 29, 50, 117),
    "one of everything": (8, 32, 1, 1, 1, 1, 1, 1, 1),  # for 256 pairs: of few, chance decides which error is larger
    "one logit, many pixels": (4, 8, 12, 2, 8, 1, 1, 9, 20),  # the same
    "one dimension, h = 1": (2, 2, 5, 4, 3, 1, 70, 1, 280),
    "targets at the logits' size": (1, 2, 9, 4, 4, 24, 40, 24, 40),
    "targets smaller than logits": (1, 2, 6, 4, 3, 33, 40, 17, 11),
    "more targets than queries": (2, 2, 3, 6, 11, 16, 16, 61, 47),
    "sums over many pixels": (1, 1, 3, 4, 4, 128, 128, 256, 256),
    "no targets": (2, 2, 4, 3, 0, 8, 8, 16, 16),
    "wider than a block": (1, 1, 2, 2, 3, 36, 61, 70, 130),
}


def random_targets(
    shape: tuple[int, ...], generator: torch.Generator, form: str, *, dtype: torch.dtype = torch.uint8
) -> Targets:
    """Targets in one of the forms "segments", "masks" (overlapping), "masks+valid"; counts vary from 0 to M."""
    _, batch_size, _, num_classes, num_targets, _, _, height, width = shape
    counts = torch.randint(0, num_targets + 1, (batch_size,), generator=generator)
    counts[-1] = num_targets
    labels = torch.randint(0, num_classes, (batch_size, num_targets), generator=generator)
    labels[torch.arange(num_targets) >= counts[:, None]] = -1
    if form == "segments":
        void = 255 if dtype == torch.uint8 else -1
        # Blobs of a few pixels, some void, some background: runs of all lengths occur.
        values = torch.tensor([*range(num_targets), void, 254 if dtype == torch.uint8 else -2])
        coarse = values[torch.randint(0, len(values), (batch_size, height, -(-width // 3)), generator=generator)]
        segments = coarse.repeat_interleave(3, -1)[..., :width].to(dtype)
        return Targets(labels, counts, segments=segments.contiguous(), void=void)
    masks = (torch.rand(batch_size, num_targets, height, width, generator=generator) < 0.4).to(dtype)
    valid = None
    if form == "masks+valid":
        valid = torch.rand(batch_size, height, width, generator=generator) < 0.8
    return Targets(labels, counts, masks=masks, valid=valid)


def random_logits(shape: tuple[int, ...], generator: torch.Generator, scale: float = 4.0) -> tuple[Tensor, Tensor]:
    """(class_logits (L, B, N, K+1), mask_logits (L, B, N, h, w)) float32."""
    layers, batch_size, num_queries, num_classes, _, h, w, _, _ = shape
    class_logits = torch.randn(layers, batch_size, num_queries, num_classes + 1, generator=generator)
    mask_logits = torch.randn(layers, batch_size, num_queries, h, w, generator=generator) * scale
    return class_logits, mask_logits


def random_assignment(shape: tuple[int, ...], targets: Targets, generator: torch.Generator) -> Tensor:
    """(L, B, M) int64: different queries for the targets of an image, -1 for padding and where queries run out."""
    layers, batch_size, num_queries, _, num_targets, *_ = shape
    assignment = torch.full((layers, batch_size, num_targets), -1)
    for layer in range(layers):
        for b, count in enumerate(targets.counts.tolist()):
            chosen = torch.randperm(num_queries, generator=generator)[:count]
            slots = torch.randperm(count, generator=generator)[: len(chosen)]
            assignment[layer, b, slots] = chosen
    return assignment


def at_odd_address(x: Tensor) -> Tensor:
    """The same values, one element after a boundary of 16 bytes, where GPUs cannot load vectors."""
    memory = torch.empty(x.numel() + 1, dtype=x.dtype)
    memory[1:] = x.flatten()
    return memory[1:].view(x.shape)


def without_labels(targets: Targets) -> Targets:
    """The same planes, with nothing but padding for targets."""
    labels, counts = torch.full_like(targets.labels, -1), torch.zeros_like(targets.counts)
    return Targets(
        labels, counts, masks=targets.masks, segments=targets.segments, valid=targets.valid, void=targets.void
    )


def half_void(targets: Targets, mask_logits: Tensor) -> tuple[Targets, Tensor]:
    """Segments with void in the upper half, and NaN in the logits that reach only that."""
    segments, mask_logits = targets.segments.clone(), mask_logits.clone()
    segments[:, : segments.shape[-2] // 2] = targets.void
    mask_logits[..., : mask_logits.shape[-2] // 2 - 2, :] = torch.nan
    return Targets(targets.labels, targets.counts, segments=segments, void=targets.void), mask_logits


def random_points(generator: torch.Generator, *leading_and_count: int) -> Tensor:
    """(..., P, 2) float32 in [0, 1); the first ones, as far as there are so many, lie on corners and borders."""
    points = torch.rand(*leading_and_count, 2, generator=generator)
    border = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0], [1.0, 0.3], [0.6, 0.0]])[: leading_and_count[-1] // 2]
    points[..., : len(border), :] = border
    return points


def reference_inputs(
    seed: int,
    grid: tuple[int, int],
    size: tuple[int, int],
    scale: float,
    *,
    dtype: torch.dtype = torch.float64,
    leading: tuple[int, ...] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Six queries and up to three targets of three images, the last of which has none: class logits of four classes,
    mask logits with the standard deviation ``scale``, labels, masks and valid pixels."""
    generator = torch.Generator().manual_seed(seed)
    class_logits = torch.randn(*leading, 3, 6, 5, generator=generator, dtype=dtype) * 2
    mask_logits = torch.randn(*leading, 3, 6, *grid, generator=generator, dtype=dtype) * scale
    labels = torch.tensor([[0, 3, 1], [2, -1, -1], [-1, -1, -1]])
    masks = torch.rand(3, 3, *size, generator=generator) > 0.6
    valid = torch.rand(3, *size, generator=generator) > 0.3
    return class_logits, mask_logits, labels, masks, valid
