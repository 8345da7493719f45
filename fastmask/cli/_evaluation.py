"""mIoU and PQ of a model on scenes whose panoptic truth is known, by torchmetrics."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics.classification import MulticlassJaccardIndex
from torchmetrics.detection import PanopticQuality

from fastmask.models import MaskFormer
from fastmask.targets import Targets

VOID = 255  # class of pixels without truth


class SceneMetrics:
    """Accumulates semantic and panoptic results against their truth.

    Args:
        num_classes: K, at most 255.
        stuff_classes: all others are things.
    """

    def __init__(self, num_classes: int, stuff_classes: Collection[int]) -> None:
        # Pixels that a prediction gives to no segment get a class of their own. As an unknown class they would count
        # as void, and torchmetrics forgives a segment of the truth that is missed there.
        self.unassigned = num_classes
        things = set(range(num_classes)) - set(stuff_classes)
        self._quality = PanopticQuality(
            things, {*stuff_classes, self.unassigned}, return_per_class=True, return_sq_and_rq=True
        )
        self._order = [*sorted(things), *sorted({*stuff_classes, self.unassigned})]
        self._iou = MulticlassJaccardIndex(num_classes, ignore_index=VOID)

    def update(self, semantic: Sequence[Tensor], panoptic: Sequence[tuple[Tensor, Any]], targets: Targets) -> None:
        """Adds the results of one batch, as ``MaskFormer.predict`` returns them, all of the size of ``targets``."""
        truth = torch.stack(
            [
                panoptic_map(segments, labels, VOID)
                for segments, labels in zip(targets.segments, targets.labels, strict=True)
            ]
        )
        found = torch.stack([panoptic_map(ids - 1, segment_classes(infos), self.unassigned) for ids, infos in panoptic])
        self._quality.update(found, truth)
        self._iou.update(torch.stack(list(semantic)).long(), truth[..., 0])

    def compute(self) -> dict[str, float]:
        """ "mIoU" and the means of "PQ", "SQ" and "RQ" over the classes that occur, as shares of 1."""
        quality = self._quality
        occurs = quality.true_positives + quality.false_positives + quality.false_negatives > 0
        occurs[self._order.index(self.unassigned)] = False
        panoptic, segmentation, recognition = quality.compute().reshape(-1, 3)[occurs].mean(0).tolist()
        return {"mIoU": self._iou.compute().item(), "PQ": panoptic, "SQ": segmentation, "RQ": recognition}


def evaluate(model: MaskFormer, batches: Iterable[tuple[Tensor, Targets]], *, threshold: float) -> dict[str, float]:
    """Metrics of a model's semantic and panoptic results.

    Args:
        model: to evaluate.
        batches: of images ``(B, C, H, W)`` and their targets, which must be segment maps.
        threshold: the class probability that a query must exceed to be a segment.
    """
    metrics = SceneMetrics(model.config.num_classes, model.config.stuff_classes)
    for images, targets in batches:
        metrics.update(model.predict(images), model.predict(images, "panoptic", threshold=threshold), targets)
    return metrics.compute()


def segment_classes(infos: Sequence[dict[str, Any]]) -> Tensor:
    """``(S,)`` int64, the class of each segment id less one."""
    classes = torch.full((max((info["id"] for info in infos), default=0),), VOID)
    for info in infos:
        classes[info["id"] - 1] = info["category_id"]
    return classes


def panoptic_map(segments: Tensor, classes: Tensor, no_segment: int) -> Tensor:
    """``(H, W, 2)`` int64 (class, segment) of each pixel, as torchmetrics takes them.

    Args:
        segments: ``(H, W)`` the index of each pixel's segment; any other value is none.
        classes: ``(S,)`` the class of each segment.
        no_segment: the class of pixels without a segment.
    """
    none = len(classes)
    classes = torch.cat([classes, classes.new_tensor([no_segment])])
    index = segments.long()
    index = torch.where((index >= 0) & (index < none), index, none)
    return torch.stack([classes[index], index], -1)
