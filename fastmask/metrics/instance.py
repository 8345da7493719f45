"""COCO's average precision of instance masks."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from fastmask.metrics.base import Metrics, checked_classes, mean
from fastmask.targets import foreground

SUMMARY = (
    "AP",
    "AP50",
    "AP75",
    "AP_small",
    "AP_medium",
    "AP_large",
    "AR_1",
    "AR_10",
    "AR_100",
    "AR_small",
    "AR_medium",
    "AR_large",
)


class InstanceMetrics(Metrics):
    """COCO mask AP and AR, computed by pycocotools.

    Masks are kept run-length encoded until ``compute``. An image that is given twice, here or in metrics that are
    merged, counts once; two images of one name are an error, if their truths differ.

    Args:
        num_classes: K.

    Raises:
        ValueError: an argument out of range.
        ImportError: pycocotools is missing.
    """

    def __init__(self, num_classes: int):
        self.num_classes, _ = checked_classes(num_classes)
        _pycocotools()
        self._images: dict[str, dict[str, Any]] = {}

    def update(
        self,
        name: str,
        prediction: Mapping[str, Tensor],
        masks: Tensor,
        labels: Tensor,
        crowd: Tensor | None = None,
        areas: Tensor | None = None,
    ) -> None:
        """Adds an image.

        Args:
            name: of the image; an image is known by it.
            prediction: {"scores" ``(R,)``, "labels" ``(R,)``, "masks" ``(R, H, W)`` bool}, as ``MaskFormer.predict``
                gives them; the 100 best of each class count.
            masks: ``(M, H, W)`` bool, the true ones. Here and in the prediction, of integers any but 0 is foreground,
                and floating point must be 0 or 1.
            labels: ``(M,)`` classes in 0..K-1.
            crowd: ``(M,)`` bool, which masks are crowd regions.
            areas: ``(M,)`` by which objects are small, medium or large; those of the masks by default.

        Raises:
            ValueError: shapes that do not fit, a class out of range, masks that are not binary, or a name that another
                image has.
        """
        found_masks, found_labels, scores = (prediction[key].cpu() for key in ("masks", "labels", "scores"))
        for what, these, those in (("masks", masks, labels), ("prediction", found_masks, found_labels)):
            if these.dim() != 3 or those.shape != these.shape[:1]:
                raise ValueError(
                    f"{name}: {what} has {tuple(these.shape)} masks and {tuple(those.shape)} labels; "
                    "expected (M, H, W) and (M,)"
                )
            if those.numel() and not 0 <= int(those.min()) <= int(those.max()) < self.num_classes:
                raise ValueError(f"{name}: {what} has labels outside 0..{self.num_classes - 1}")
        if masks.shape[-2:] != found_masks.shape[-2:]:
            raise ValueError(
                f"{name}: prediction is {tuple(found_masks.shape[-2:])} pixels, masks {tuple(masks.shape[-2:])}"
            )
        truth = _records(f"{name}: masks", masks, labels)
        for record, is_crowd in zip(truth, [0] * len(truth) if crowd is None else crowd.tolist(), strict=True):
            record["iscrowd"] = int(is_crowd)
        if areas is not None:
            for record, area in zip(truth, areas.tolist(), strict=True):
                record["area"] = area
        found = _records(f"{name}: prediction", found_masks, found_labels)
        for record, score in zip(found, scores.tolist(), strict=True):
            record.update(score=score, iscrowd=0)
        self._keep(name, {"truth": truth, "found": found, "size": tuple(masks.shape[-2:])})

    def compute(self) -> dict[str, float]:
        """COCO's twelve numbers: "AP" (mean over IoU 0.50:0.05:0.95), "AP50", "AP75", AP by size, AR by detections (1,
        10, 100) and by size.
        """
        if not self._images:
            return dict.fromkeys(SUMMARY, float("nan"))
        stats = self._evaluate().stats
        return {name: float(value) if value >= 0 else float("nan") for name, value in zip(SUMMARY, stats, strict=True)}

    def per_class(self) -> dict[str, list[float]]:
        """ "AP"."""
        if not self._images:
            return {"AP": [float("nan")] * self.num_classes}
        precision = self._evaluate().eval["precision"][..., 0, -1]  # [IoU, recall, K], all sizes, most detections
        return {"AP": [mean(of_class, of_class >= 0) for of_class in np.moveaxis(precision, 2, 0)]}

    def absent(self) -> list[int]:
        records = (record for image in self._images.values() for record in image["truth"])
        present = {record["category_id"] for record in records if not record["iscrowd"]}
        return [label for label in range(self.num_classes) if label not in present]

    def _evaluate(self) -> Any:
        coco = _pycocotools()
        names = sorted(self._images)
        sizes = [self._images[name]["size"] for name in names]
        sides = {}
        for kind in ("truth", "found"):
            records = [(i, record) for i, name in enumerate(names) for record in self._images[name][kind]]
            sides[kind] = coco.COCO()
            # Ids count from 1: pycocotools takes a match with 0 for none.
            sides[kind].dataset = {
                "images": [{"id": i, "height": h, "width": w} for i, (h, w) in enumerate(sizes)],
                "categories": [{"id": label} for label in range(self.num_classes)],
                "annotations": [{**record, "id": k, "image_id": i} for k, (i, record) in enumerate(records, 1)],
            }
        with contextlib.redirect_stdout(io.StringIO()):
            for side in sides.values():
                side.createIndex()
            evaluation = coco.COCOeval(sides["truth"], sides["found"], "segm")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return evaluation

    def _settings(self) -> tuple:
        return (self.num_classes,)

    def _add(self, other: InstanceMetrics) -> None:
        for name, image in other._images.items():
            self._keep(name, image)

    def _keep(self, name: str, image: dict[str, Any]) -> None:
        known = self._images.get(name, image)
        if (known["size"], known["truth"]) != (image["size"], image["truth"]):
            raise ValueError(f"{name}: two images have this name; expected one name for each, such as its path")
        self._images[name] = image


def _records(name: str, masks: Tensor, labels: Tensor) -> list[dict[str, Any]]:
    """An annotation for each of the ``masks``, which errors call ``name``."""
    from pycocotools import mask as coder

    planes = np.asfortranarray(foreground(name, masks.cpu()).numpy().view(np.uint8).transpose(1, 2, 0))
    encoded = coder.encode(planes)
    return [
        {"segmentation": rle, "area": float(area), "category_id": label}
        for rle, area, label in zip(encoded, coder.area(encoded), labels.tolist(), strict=True)
    ]


def _pycocotools() -> Any:
    from types import SimpleNamespace

    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise ImportError("COCO's AP needs pycocotools: pip install 'fastmask-kernels[coco]'") from error
    return SimpleNamespace(COCO=COCO, COCOeval=COCOeval)
