"""mIoU and PQ of a model on scenes whose panoptic truth is known."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fastmask.metrics import PanopticMetrics, SemanticMetrics
from fastmask.models import MaskFormer
from fastmask.targets import Targets


def evaluate(model: MaskFormer, batches: Iterable[tuple[Tensor, Targets]], *, threshold: float) -> dict[str, float]:
    """ "mIoU" of a model's semantic results, and "PQ", "SQ" and "RQ" of its panoptic ones, as shares of 1.

    Args:
        model: to evaluate.
        batches: of images ``(B, C, H, W)`` and their targets, which must be segment maps.
        threshold: the class probability that a query must exceed to be a segment.
    """
    config = model.config
    semantic = SemanticMetrics(config.num_classes, boundary_share=None)
    panoptic = PanopticMetrics(config.num_classes, config.stuff_classes)
    for images, targets in batches:
        semantic.update(torch.stack(model.predict(images)), targets.class_map())
        results = model.predict(images, "panoptic", threshold=threshold)
        for result, segments, labels in zip(results, targets.segments, targets.labels, strict=True):
            panoptic.update(result, segments, labels)
    numbers = {**semantic.compute(), **panoptic.compute()}
    return {name: numbers[name] for name in ("mIoU", "PQ", "SQ", "RQ")}
