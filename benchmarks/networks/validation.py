"""Validation of one image: from logits to the counts of a metric, the dense way and by ``update_from_logits``.

``python -m benchmarks.networks.validation`` prints a table of times and peaks of extra memory, for 100 queries, 133
classes and an image of 800 x 1216 pixels. The dense way upsamples the masks of all queries and infers from them as the
original code does; both ways end in the same metrics.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.ops import instance, panoptic, semantic
from benchmarks.ops.inputs import make_scene
from fastmask import Targets
from fastmask.measure import Clock, take_turns
from fastmask.metrics import InstanceMetrics, PanopticMetrics, SemanticMetrics

CLASSES, STRIDE, TOP_K = 133, 4, 100
CPU = torch.device("cpu")
THRESHOLDS = {**panoptic.THRESHOLDS, "overlap_threshold": panoptic.OVERLAP}


def make_inputs(size: tuple[int, int], kind: str) -> tuple[dict[str, torch.Tensor], Targets]:
    """A model's outputs, of noise or as of a trained network, and the segments of a scene."""
    grid = size[0] // STRIDE, size[1] // STRIDE
    sizes = {"images": 1, "classes": CLASSES, "grid": grid, "size": size, "kind": kind}
    inputs = semantic.make_inputs(sizes, torch.float32, CPU)
    generator = torch.Generator().manual_seed(0)
    objects = semantic.OBJECTS
    segments = make_scene(objects, size, generator)[None]
    labels = torch.randint(CLASSES, (1, objects), generator=generator)
    outputs = {"pred_logits": inputs.class_logits, "pred_masks": inputs.mask_logits}
    return outputs, Targets(labels, torch.tensor([objects]), segments=segments)


def dense_semantic(outputs: dict[str, torch.Tensor], targets: Targets) -> SemanticMetrics:
    metrics = SemanticMetrics(CLASSES, boundary_share=None)
    metrics.update(semantic.original(*outputs.values(), targets.size, "masks"), targets.class_map())
    return metrics


def dense_panoptic(outputs: dict[str, torch.Tensor], targets: Targets) -> PanopticMetrics:
    metrics = PanopticMetrics(CLASSES)
    ids, categories = panoptic.eager_image(outputs["pred_logits"][0], outputs["pred_masks"][0], targets.size)
    infos = [{"id": number, "category_id": category} for number, category in enumerate(categories, 1)]
    metrics.update((ids, infos), targets.segment_map[0], targets.labels[0])
    return metrics


def dense_instance(outputs: dict[str, torch.Tensor], targets: Targets) -> InstanceMetrics:
    metrics = InstanceMetrics(CLASSES)
    found = instance.eager_image(outputs["pred_logits"][0], outputs["pred_masks"][0], targets.size, TOP_K)
    prediction = dict(zip(("scores", "labels", "masks"), found, strict=True))
    metrics.update("image", prediction, targets.dense_masks()[0], targets.labels[0])
    return metrics


def from_logits(metrics: Any, options: dict[str, float]) -> Callable[..., Any]:
    def update(outputs: dict[str, torch.Tensor], targets: Targets) -> Any:
        fresh = metrics()
        fresh.update_from_logits(outputs, targets, **options)
        return fresh

    return update


TASKS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "semantic": (dense_semantic, from_logits(lambda: SemanticMetrics(CLASSES, boundary_share=None), {})),
    "panoptic": (dense_panoptic, from_logits(lambda: PanopticMetrics(CLASSES), THRESHOLDS)),
    "instance": (dense_instance, from_logits(lambda: InstanceMetrics(CLASSES), {})),
}


def disagreement(one: dict[str, float], other: dict[str, float]) -> float:
    """The largest difference of two scores by the same name."""
    differences = [abs(value - other[name]) for name, value in one.items() if not np.isnan(value)]
    return max(differences, default=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1216), metavar=("H", "W"), help="of the image")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each row of the table")
    options = parser.parse_args()
    print(
        "| task | logits | dense, ms | from logits, ms | ratio | dense, MB | from logits, MB | difference of scores |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for task, ways in TASKS.items():
        for kind in ("trained no-object", "noise"):
            outputs, targets = make_inputs(tuple(options.size), kind)

            def call(way: Callable[..., Any], clock: Clock, outputs: Any = outputs, targets: Any = targets) -> Any:
                metrics = way(outputs, targets)
                clock.mark("all")
                return metrics

            calls = {name: lambda clock, way=way: call(way, clock) for name, way in zip("ab", ways, strict=True)}
            dense, ours = take_turns(calls, CPU, options.seconds).values()
            times = [1e3 * float(np.median(one.seconds)) for one in (dense, ours)]
            memory = [max(size or 0 for size in one.memory.values()) / 1e6 for one in (dense, ours)]
            difference = disagreement(dense.result.compute(), ours.result.compute())
            print(
                f"| {task} | {kind} | {times[0]:.1f} | {times[1]:.1f} | {ours.ratio(dense):.1f} | "
                f"{memory[0]:.0f} | {memory[1]:.0f} | {difference:.1e} |"
            )


if __name__ == "__main__":
    main()
