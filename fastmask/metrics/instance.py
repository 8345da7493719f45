"""COCO's average precision of instance masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from fastmask.extras import extra
from fastmask.metrics.base import Metrics, checked_classes, mean
from fastmask.metrics.coco_evaluation import evaluate
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
    """COCO's AP and AR of masks, computed by hotcoco, whose numbers equal those of pycocotools.

    Masks are kept run-length encoded until ``compute``. An image that is added twice, here or by merging, counts once.
    Two images with the same name but different truth are an error.

    Args:
        num_classes: K.

    Raises:
        ValueError: an argument out of range.
        ImportError: hotcoco is missing.
    """

    def __init__(self, num_classes: int):
        self.num_classes, _ = checked_classes(num_classes)
        _mask_coder()
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
            name: identifies the image.
            prediction: {"scores" ``(R,)``, "labels" ``(R,)``, "masks" ``(R, H, W)`` bool}, as ``MaskFormer.predict``
                returns; only the 100 best of each class count.
            masks: ``(M, H, W)`` bool, the true masks. In integer masks, here and in the prediction, every value but 0
                is foreground; floating-point masks must hold 0 and 1 only.
            labels: ``(M,)`` classes in 0..K-1.
            crowd: ``(M,)`` bool, which masks are crowd regions.
            areas: ``(M,)`` the areas that sort objects into small, medium and large; by default those of the masks.

        Raises:
            ValueError: shapes that do not match, a class out of range, masks that are not binary, or the name of
                another image.
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
        stats, _ = self._evaluate()
        return {name: float(value) if value >= 0 else float("nan") for name, value in zip(SUMMARY, stats, strict=True)}

    def per_class(self) -> dict[str, list[float]]:
        """ "AP"."""
        if not self._images:
            return {"AP": [float("nan")] * self.num_classes}
        _, precision = self._evaluate()
        of_all_sizes = precision[..., 0, -1]  # [IoU, recall, K] with the most detections
        return {"AP": [mean(of_class, of_class >= 0) for of_class in np.moveaxis(of_all_sizes, 2, 0)]}

    def absent(self) -> list[int]:
        records = (record for image in self._images.values() for record in image["truth"])
        present = {record["category_id"] for record in records if not record["iscrowd"]}
        return [label for label in range(self.num_classes) if label not in present]

    def _evaluate(self) -> tuple[np.ndarray, np.ndarray]:
        names = sorted(self._images)
        sizes = [self._images[name]["size"] for name in names]
        sides = []
        for kind in ("truth", "found"):
            records = [(i, record) for i, name in enumerate(names) for record in self._images[name][kind]]
            sides.append(
                {
                    "images": [{"id": i, "height": h, "width": w} for i, (h, w) in enumerate(sizes)],
                    "categories": [{"id": label, "name": str(label)} for label in range(self.num_classes)],
                    "annotations": [{**record, "id": k, "image_id": i} for k, (i, record) in enumerate(records, 1)],
                }
            )
        return evaluate(*sides)

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
    """An annotation for each of the ``masks``; errors call them ``name``."""
    coder = _mask_coder()
    encoded = coder.encode(foreground(name, masks.cpu()).numpy().transpose(1, 2, 0))
    return [
        {"segmentation": rle, "area": float(area), "category_id": label}
        for rle, area, label in zip(encoded, coder.area(encoded), labels.tolist(), strict=True)
    ]


def _mask_coder() -> Any:
    with extra("coco"):
        from hotcoco import mask
    return mask
