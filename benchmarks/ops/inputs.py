"""What the benchmarks run on: scenes of coherent segments, and predictions that resemble them, all from one seed.

Segment maps of noise would be unfair either way: real segments are blobs, a row of pixels crosses a few of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmask import Targets

VOID = 255

# A training step on a CPU and on a GPU, and one small enough to try the benchmarks themselves.
TRAINING = {
    "images": 2,
    "layers": 7,
    "queries": 100,
    "grid": (128, 128),
    "size": (512, 512),
    "least_targets": 15,
    "most_targets": 20,
}
GPU_TRAINING = TRAINING | {"images": 16, "layers": 6, "least_targets": 20}
QUICK = TRAINING | {"layers": 2, "queries": 20, "grid": (32, 32), "size": (128, 128), "least_targets": 5}


@dataclass(frozen=True)
class Inputs:
    """The predictions of L decoder layers and the targets of the B images that they belong to.

    Args:
        class_logits: ``(L, B, N, K+1)``.
        mask_logits: ``(L, B, N, h, w)``.
        targets: of the B images.
        assignment: ``(L, B, M)`` int64, a plausible matching; -1 for padding.
    """

    class_logits: Tensor
    mask_logits: Tensor
    targets: Targets
    assignment: Tensor

    @property
    def num_classes(self) -> int:
        return self.class_logits.shape[-1] - 1

    @property
    def num_masks(self) -> Tensor:
        """What the mask losses are divided by."""
        return self.targets.counts.sum().clamp(min=1)


def make_inputs(sizes: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> Inputs:
    """``build_inputs`` as the registry calls it, with the case's sizes."""
    return build_inputs(dtype, device, **sizes)


def build_inputs(
    dtype: torch.dtype,
    device: torch.device,
    *,
    layers: int,
    images: int,
    queries: int,
    grid: tuple[int, int],
    size: tuple[int, int],
    least_targets: int,
    most_targets: int,
    classes: int = 150,
    form: str = "segments",
    seed: int = 0,
) -> Inputs:
    """Inputs of the given sizes, the same on every device.

    Args:
        dtype: of the logits.
        grid: (h, w) of the mask logits.
        size: (H, W) of the targets.
        least_targets, most_targets: bounds of the number of targets of an image; the first image has the most.
        form: of the targets, "segments" or "masks".
    """
    if form not in ("segments", "masks"):
        raise ValueError(f"form must be 'segments' or 'masks', got {form!r}")
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(least_targets, most_targets + 1, (images,), generator=generator)
    counts[0] = most_targets
    segments = torch.stack([make_scene(int(count), size, generator) for count in counts])
    labels = [torch.randint(classes, (int(count),), generator=generator) for count in counts]
    targets = Targets.from_segments(segments, labels, void=VOID)

    # Query n sees target n % count of its image, the better the later its layer, through smooth and pixel noise.
    seen = torch.arange(queries) % counts[:, None]  # [B, N]
    soft = F.adaptive_avg_pool2d(targets.dense_masks().float(), grid)  # [B, M, h, w]
    soft = soft[torch.arange(images)[:, None], seen]  # [B, N, h, w]
    confidence = torch.linspace(2, 8, layers)[:, None, None] * torch.rand(layers, images, queries, generator=generator)
    mask_logits = confidence[..., None, None] * (2 * soft - 1)
    coarse = torch.randn(layers * images, queries, 9, 9, generator=generator)
    mask_logits += F.interpolate(coarse, grid, mode="bicubic").view_as(mask_logits)
    mask_logits += 0.2 * torch.randn(mask_logits.shape, generator=generator)
    class_logits = torch.randn(layers, images, queries, classes + 1, generator=generator)
    classes_seen = targets.labels.gather(1, seen).expand(layers, -1, -1)[..., None]
    class_logits.scatter_add_(-1, classes_seen, confidence[..., None])

    orders = torch.rand(layers, images, queries, generator=generator).argsort(-1)[..., : targets.num_targets]
    assignment = orders.masked_fill(targets.labels < 0, -1)
    if form == "masks":
        targets = Targets(targets.labels, targets.counts, masks=targets.dense_masks().to(torch.uint8))
    return Inputs(
        class_logits.to(device, dtype), mask_logits.to(device, dtype), targets.to(device), assignment.to(device)
    )


def make_scene(count: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """``(H, W)`` uint8: ``count`` segments, a few regions that fill the plane and wavy blobs upon them; some void.

    Every segment has at least one pixel, if there are as many pixels.
    """
    height, width = size
    regions = min(3, count)
    field = F.interpolate(torch.randn(1, regions, 5, 5, generator=generator), size, mode="bicubic")
    scene = field[0].argmax(0)
    rows = (torch.arange(height) + 0.5)[:, None] / height
    columns = (torch.arange(width) + 0.5)[None, :] / width
    things = count - regions
    radii = (0.05 + 0.2 * torch.rand(things, generator=generator)).sort(descending=True).values
    for index, radius in enumerate(radii, start=regions):
        scene[_blob(rows, columns, float(radius), generator)] = index
    scene[_blob(rows, columns, 0.06, generator)] = VOID
    # A covered segment gets a small square of its own, each at another place.
    for index in range(count):
        if not (scene == index).any():
            row, column = index * height // (count + 1), (7 * index) % count * width // count
            scene[row : row + max(1, height // 32), column : column + max(1, width // 32)] = index
    return scene.to(torch.uint8)


def _blob(rows: Tensor, columns: Tensor, radius: float, generator: torch.Generator) -> Tensor:
    """``(H, W)`` bool: a disc whose radius waves with the angle, stretched, anywhere in the unit square."""
    y, x, stretch = torch.rand(3, generator=generator).tolist()
    dy, dx = (rows - y) * (0.6 + stretch), (columns - x) * (1.4 - stretch)
    angle = torch.atan2(dy, dx)
    edge = torch.ones_like(angle)
    for wave in range(2, 6):
        amplitude, phase = torch.rand(2, generator=generator).tolist()
        edge += 0.3 / wave * amplitude * torch.cos(wave * angle + 2 * math.pi * phase)
    return torch.hypot(dy, dx) < radius * edge


def as_lists(inputs: Inputs) -> tuple[list[Tensor], list[Tensor]]:
    """(masks ``(M_b, H, W)`` float32, labels ``(M_b,)``) of each image: the form that transformers' losses take."""
    targets = inputs.targets.to_list()
    return [target["masks"].float() for target in targets], [target["labels"] for target in targets]


def judged_layers(inputs: Inputs) -> list[int]:
    """The first and the last layer: what is judged where a float64 reference of all layers would take minutes."""
    return sorted({0, inputs.mask_logits.shape[0] - 1})


def judged(inputs: Inputs) -> Inputs:
    """The judged layers alone."""
    at = judged_layers(inputs)
    return replace(
        inputs,
        class_logits=inputs.class_logits[at],
        mask_logits=inputs.mask_logits[at],
        assignment=inputs.assignment[at],
    )


def single_images(inputs: Inputs) -> Iterator[tuple[int, int, Inputs]]:
    """(layer, image, their inputs with L = B = 1): pieces small enough for a float64 reference."""
    targets = inputs.targets
    for b in range(targets.batch_size):
        image = slice(b, b + 1)
        one = Targets(
            targets.labels[image],
            targets.counts[image],
            masks=None if targets.masks is None else targets.masks[image],
            segments=None if targets.segments is None else targets.segments[image],
            void=targets.void,
        )
        for layer in range(inputs.mask_logits.shape[0]):
            at = (slice(layer, layer + 1), image)
            yield layer, b, Inputs(inputs.class_logits[at], inputs.mask_logits[at], one, inputs.assignment[at])


@dataclass(frozen=True)
class InferenceInputs:
    """The output of a network, and the size of the results that are made of it.

    Args:
        class_logits: ``(B, N, K+1)``.
        mask_logits: ``(B, N, h, w)``.
        size: (H, W) of the images.
    """

    class_logits: Tensor
    mask_logits: Tensor
    size: tuple[int, int]

    @property
    def kept(self) -> Tensor:
        """``(B, N)`` bool: queries of a class other than no-object, with a probability above 0.8."""
        scores, classes = self.class_logits.float().softmax(-1).max(-1)
        return (scores > 0.8) & (classes < self.class_logits.shape[-1] - 1)

    def to(self, dtype: torch.dtype) -> InferenceInputs:
        return replace(self, class_logits=self.class_logits.to(dtype), mask_logits=self.mask_logits.to(dtype))


def make_predictions(sizes: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> InferenceInputs:
    """``build_predictions`` as the registry calls it, with the case's sizes."""
    return build_predictions(dtype, device, **sizes)


def build_predictions(
    dtype: torch.dtype,
    device: torch.device,
    *,
    images: int,
    queries: int,
    classes: int,
    grid: tuple[int, int],
    size: tuple[int, int],
    objects: int,
    confident: int,
    masks: str = "trained",
    seed: int = 0,
) -> InferenceInputs:
    """Predictions like those of a trained network, the same on every device.

    Args:
        objects: of an image; query n sees object n % objects.
        confident: how many queries an image has that are sure of their class; the others are sure of no-object.
        masks: "trained", far from 0 but for the outlines of the query's object, or "noise", where all queries compete.
    """
    if masks not in ("trained", "noise"):
        raise ValueError(f"masks must be 'trained' or 'noise', got {masks!r}")
    generator = torch.Generator().manual_seed(seed)
    seen = torch.arange(queries) % objects
    class_logits = torch.randn(images, queries, classes + 1, generator=generator)
    mask_logits = torch.randn(images, queries, *grid, generator=generator)
    for image_classes, image_masks in zip(class_logits, mask_logits, strict=True):
        found = torch.randint(classes, (objects,), generator=generator)[seen]
        found[confident:] = classes
        image_classes.scatter_add_(1, found[:, None], torch.full((queries, 1), 11.0))
        if masks == "noise":
            image_masks *= 4
            continue
        scene = make_scene(objects, size, generator)
        soft = F.adaptive_avg_pool2d((scene == torch.arange(objects)[:, None, None]).float(), grid)
        confidence = 6 + 6 * torch.rand(queries, 1, 1, generator=generator)
        coarse = F.interpolate(torch.randn(1, queries, 9, 9, generator=generator), grid, mode="bicubic")[0]
        image_masks *= 0.2
        image_masks += confidence * (2 * soft[seen] - 1) - 1 + coarse
    order = torch.rand(images, queries, generator=generator).argsort(1)
    class_logits = class_logits.gather(1, order[..., None].expand_as(class_logits))
    mask_logits = mask_logits.gather(1, order[..., None, None].expand_as(mask_logits))
    return InferenceInputs(class_logits.to(device, dtype), mask_logits.to(device, dtype), size)
