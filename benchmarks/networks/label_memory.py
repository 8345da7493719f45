"""Memory of a batch's labels: the masks of transformers' image processors, or the maps that a patched model takes.

``python -m benchmarks.networks.label_memory`` prints a table. Each way runs in a process of its own: it makes the
labels of 8 scenes of 1024 x 1024 pixels with 60 objects each, and computes Mask2Former's criterion forward and backward
(100 queries, logits of 256 x 256, two layers). Peaks are of resident memory, above what the process held before.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.ops.inputs import make_scene
from fastmask import patch
from fastmask.measure import peak_memory

NUM_QUERIES, NUM_CLASSES, NUM_LAYERS, STRIDE = 100, 133, 2, 4
MEGABYTE, CPU = 1e6, torch.device("cpu")


def masks(scenes: list[np.ndarray], classes: list[dict[int, int]]) -> dict[str, Any]:
    """By transformers' image processor."""
    from transformers import Mask2FormerImageProcessor

    processor = Mask2FormerImageProcessor(do_resize=False, do_rescale=False, do_normalize=False, ignore_index=255)
    images = [np.zeros((3, *one.shape), dtype=np.uint8) for one in scenes]
    batch = processor(images, scenes, instance_id_to_semantic_id=classes, return_tensors="pt")
    return {name: batch[name] for name in ("mask_labels", "class_labels")}


def maps(scenes: list[np.ndarray], classes: list[dict[int, int]]) -> dict[str, Any]:
    """One byte a pixel."""
    from fastmask.integrations.transformers import collate_segmentation, segmentation_targets

    examples = [
        {"pixel_values": torch.zeros(3, *one.shape, dtype=torch.uint8),
         **segmentation_targets(one, ids, ignore_index=255)}
        for one, ids in zip(scenes, classes, strict=True)
    ]  # fmt: skip
    batch = collate_segmentation(examples)
    return {name: batch[name] for name in ("mask_labels", "class_labels")}


WAYS: dict[str, Callable[..., dict[str, Any]]] = {"masks": masks, "maps": maps}


def measure(way: str, num_images: int, size: int, num_objects: int, patched: bool) -> tuple[float, float, float, float]:
    """Megabytes of the labels, the peaks of making them and of the step, and the step's loss."""
    from transformers import Mask2FormerConfig
    from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    scenes = [make_scene(num_objects, (size, size), generator).numpy() for _ in range(num_images)]
    classes = [{int(i): int(i) % NUM_CLASSES for i in np.unique(scene)} for scene in scenes]
    weights = {"loss_cross_entropy": 2.0, "loss_mask": 5.0, "loss_dice": 5.0}
    criterion = Mask2FormerLoss(Mask2FormerConfig(num_labels=NUM_CLASSES), weights)
    if patched:
        patch(criterion)
    grid = size // STRIDE
    layers = [
        {
            "masks_queries_logits": torch.randn(num_images, NUM_QUERIES, grid, grid).requires_grad_(),
            "class_queries_logits": torch.randn(num_images, NUM_QUERIES, NUM_CLASSES + 1).requires_grad_(),
        }
        for _ in range(NUM_LAYERS)
    ]
    WAYS[way](scenes[:1], classes[:1])  # imports what it needs
    labels, making = peak_memory(lambda: WAYS[way](scenes, classes), CPU)
    *earlier, last = layers

    def step() -> float:
        torch.manual_seed(1)
        loss = torch.stack(
            [x.squeeze() for x in criterion(**last, **labels, auxiliary_predictions=earlier).values()]
        ).sum()
        loss.backward()
        return loss.item()

    loss, training = peak_memory(step, CPU)
    held = sum(plane.nbytes for plane in labels["mask_labels"])
    return held / MEGABYTE, (making["resident"] or 0) / MEGABYTE, (training["resident"] or 0) / MEGABYTE, loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--size", type=int, default=1024, help="height and width, in pixels")
    parser.add_argument("--objects", type=int, default=60, help="of each image")
    options = parser.parse_args()
    arguments = (options.images, options.size, options.objects)
    print("| labels | criterion | labels, MB | peak of making them, MB | peak of a step beyond them, MB | loss |")
    print("|---|---|---|---|---|---|")
    context = multiprocessing.get_context("spawn")
    for way, patched in (("masks", False), ("masks", True), ("maps", True)):
        with context.Pool(1) as pool:
            *memory, loss = pool.apply(measure, (way, *arguments, patched))
        cells = " | ".join(f"{megabytes:.0f}" for megabytes in memory)
        print(f"| {way} | {'fastmask' if patched else 'transformers'} | {cells} | {loss:.4f} |")


if __name__ == "__main__":
    main()
