"""Batches of composed scenes, each cropped, stretched, turned, warped, mirrored and changed in tone at random."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, interpolate

from fastmask.data import ComposedScenes
from fastmask.data.composed.render import MIN_VISIBLE_PIXELS, VOID
from fastmask.targets import PADDING_LABEL, Targets

# The logarithms of the smallest and the largest magnification of a scene. Neither depends on the strength.
ZOOMS = (-0.2, 0.25)


class DistortedScenes:
    """Composed scenes in memory, of which each batch shows random ones, distorted anew.

    Args:
        scenes: all of them are composed at once, and kept in 64 KiB each for 128 x 128 pixels.
        strength: of the distortion but for the magnification, usually up to 1.
    """

    def __init__(self, scenes: ComposedScenes, strength: float) -> None:
        self.strength = strength
        height, width = scenes.size
        self.images = torch.empty(len(scenes), 3, height, width, dtype=torch.uint8)
        self.segments = torch.empty(len(scenes), height, width, dtype=torch.uint8)
        labels = []
        for i in range(len(scenes)):
            scene = scenes[i]
            self.images[i] = (scene.image * 255).round()
            self.segments[i] = scene.segments
            labels.append(scene.labels)
        self.labels = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=PADDING_LABEL)

    def __call__(self, seed: int, i: int, batch_size: int, size: int) -> tuple[Tensor, Targets]:
        """Batch i of a seed: images ``(B, 3, size, size)`` in 0..1, and their segments."""
        generator = torch.Generator().manual_seed(seed << 32 | i)
        chosen = torch.randint(len(self.images), (batch_size,), generator=generator)
        images = self.images[chosen].float() / 255
        return distort(images, self.segments[chosen], self.labels[chosen], size, self.strength, generator)


def distort(
    images: Tensor, segments: Tensor, labels: Tensor, size: int, strength: float, generator: torch.Generator
) -> tuple[Tensor, Targets]:
    """A random part of each scene, stretched, turned, warped and perhaps mirrored, with new tones of its segments.

    Args:
        images: ``(B, 3, H, H)`` float32 in 0..1.
        segments: ``(B, H, H)`` uint8, as those of :class:`fastmask.data.Scene`.
        labels: ``(B, M)`` int64, -1 for padding.
        size: height and width of the results; at H they show about whole scenes.
        strength: of the distortion but for the magnification, usually up to 1.
        generator: the source of randomness.

    Returns:
        Images ``(B, 3, size, size)`` in 0..1 and their targets. A segment of which too little is left is void.
    """
    batch_size, _, height, _ = images.shape

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(batch_size, *shape, generator=generator)

    # A row of the matrix times (x, y, 1) is where the pixel at (x, y), both in -1..1, comes from.
    stretch = size / height * torch.exp(-uniform(*ZOOMS, 1) + strength * uniform(-0.2, 0.2, 2))
    turn, shear = strength * uniform(-0.15, 0.15), strength * uniform(-0.15, 0.15)
    mirror = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    room = (1 - stretch).clamp(min=0)
    rows = torch.stack([mirror, shear, turn, torch.ones(batch_size)], 1).view(batch_size, 2, 2)
    matrix = torch.cat([stretch[:, :, None] * rows, (room * uniform(-1, 1, 2))[:, :, None]], 2)
    bumps = torch.randn(batch_size, 2, 5, 5, generator=generator) * (0.06 * strength * size / height)
    waves = interpolate(bumps, (size, size), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    grid = affine_grid(matrix, [batch_size, 1, size, size], align_corners=False) + waves
    images = grid_sample(images, grid, "bilinear", "reflection", align_corners=False)
    owners = grid_sample(segments[:, None].float(), grid, "nearest", "reflection", align_corners=False)[:, 0].long()

    flat = owners.flatten(1)
    areas = torch.zeros(batch_size, VOID + 1, dtype=torch.int64).scatter_add_(1, flat, torch.ones_like(flat))
    kept = (labels != PADDING_LABEL) & (areas[:, : labels.shape[1]] >= MIN_VISIBLE_PIXELS)
    numbers = torch.full((batch_size, VOID + 1), VOID)
    numbers[:, : labels.shape[1]] = torch.where(kept, kept.cumsum(1) - 1, VOID)
    tones = torch.exp(strength * uniform(-0.4, 0.4, VOID + 1)).gather(1, flat).view(batch_size, 1, size, size)
    gains = 1 + strength * uniform(-0.2, 0.2, 3, 1, 1)
    images = (images.clamp(min=1e-4) ** tones * gains).clamp(max=1)
    owners = numbers.gather(1, flat).view_as(owners).to(torch.uint8)
    remaining = [of_scene[keep] for of_scene, keep in zip(labels, kept, strict=True)]
    return images, Targets.from_segments(owners, remaining, void=VOID)
