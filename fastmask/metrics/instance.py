"""COCO's average precision of instance masks."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import count
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fastmask.extras import extra
from fastmask.functional import run_lengths
from fastmask.metrics.base import Metrics, checked_classes, mean
from fastmask.metrics.coco_evaluation import evaluate
from fastmask.metrics.truth import truths
from fastmask.modules.final_predictions import FinalPredictions
from fastmask.targets import Targets, foreground

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

# The most bytes of binary masks that are encoded at a time.
MASK_BYTES = 16 << 20

_unnamed = count()  # numbers of the images without a name


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
        prediction: Mapping[str, Any],
        masks: Tensor,
        labels: Tensor,
        crowd: Tensor | None = None,
        areas: Tensor | None = None,
    ) -> None:
        """Adds an image.

        Args:
            name: identifies the image.
            prediction: {"scores" ``(R,)``, "labels" ``(R,)``, "masks" ``(R, H, W)`` bool}, as ``MaskFormer.predict``
                returns; or "rle", a list of R run lengths, in place of "masks". Only the 100 best of each class count.
            masks: ``(M, H, W)`` bool, the true masks. In integer masks, here and in the prediction, every value but 0
                is foreground; floating-point masks must hold 0 and 1 only.
            labels: ``(M,)`` classes in 0..K-1.
            crowd: ``(M,)`` bool, which masks are crowd regions.
            areas: ``(M,)`` the areas that sort objects into small, medium and large; by default those of the masks.

        Raises:
            ValueError: shapes that do not match, a class out of range, masks that are not binary, or the name of
                another image.
        """
        size = masks.shape[-2], masks.shape[-1]
        true = (_run_lengths(f"{name}: masks", masks), labels, crowd, areas)
        if "rle" in prediction:
            runs = prediction["rle"]
            found_sizes = {tuple(rle["size"]) for rle in runs} or {size}
        else:
            runs = _run_lengths(f"{name}: prediction", prediction["masks"])
            found_sizes = {tuple(prediction["masks"].shape[-2:])}
        if found_sizes != {size}:
            raise ValueError(f"{name}: prediction is {', '.join(map(str, found_sizes))} pixels, masks {size}")
        pixels = _mask_coder().area(runs)
        self._add_image(name, size, true, (runs, prediction["labels"], prediction["scores"], pixels))

    def update_from_logits(
        self,
        outputs: Any,
        targets: Targets | Sequence[Any],
        sizes: Sequence[tuple[int, int]] | None = None,
        *,
        rule: str | None = None,
        names: Sequence[str] | None = None,
        stuff_classes: Collection[int] = (),
        top_k: int = 100,
        padded_size: tuple[int, int] | None = None,
        valid_sizes: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        """Adds a batch by a model's logits: instance inference at the size of the truth, one image at a time.

        A few binary masks exist at that size at a time; run lengths are kept.

        Args:
            outputs, sizes, padded_size, valid_sizes: as for :meth:`SemanticMetrics.update_from_logits`.
            targets: as for :meth:`PanopticMetrics.update_from_logits`; a mapping or sample may also have "areas"
                ``(M,)``.
            rule: "mask2former", "maskformer", "huggingface", "oneformer", "eomt" or "rf_detr"; by default that of the
                outputs' image processor in transformers, else "maskformer". OneFormer's and EoMT's processors make
                label maps rather than instances; their rules here are Mask2Former's. With "rf_detr", predictions of
                classes beyond K are left out.
            names: of the images, as for :meth:`update`; by default each image gets a new one.
            stuff_classes: the classes that have no instances, in truth and predictions.
            top_k: the largest number of predictions for an image.

        Raises:
            TypeError: outputs without class and mask logits, or targets in another form.
            ValueError: numbers of images, names or sizes that do not fit, a class out of range, or an unknown rule.
        """
        predictions = FinalPredictions.from_outputs(
            outputs, rule=rule, padded_size=padded_size, valid_sizes=valid_sizes
        )
        every = truths(targets, sizes, predictions.num_images)
        if names is not None and len(names) != len(every):
            raise ValueError(f"names has {len(names)} entries for {len(every)} images")
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        for b, truth in enumerate(every):
            name = f"{rank:06d}-{next(_unnamed):09d}" if names is None else names[b]
            (found,) = predictions.of_image(b).instances(
                truth.size, top_k=top_k, stuff_classes=stuff_classes, output="rle", details=True
            )
            kept = found["labels"] < self.num_classes
            runs = [rle for rle, keep in zip(found["rle"], kept.tolist(), strict=True) if keep]
            objects = [m for m, k in enumerate(truth.labels.tolist()) if k >= 0 and k not in stuff_classes]
            index = torch.tensor(objects, dtype=torch.long, device=truth.labels.device)
            crowd, areas = (None if one is None else one[index.to(one.device)] for one in (truth.crowd, truth.areas))
            true_runs = _run_lengths(f"targets[{b}]", *truth.planes(index))
            self._add_image(
                name,
                truth.size,
                (true_runs, truth.labels[index], crowd, areas),
                (runs, found["labels"][kept], found["scores"][kept], found["areas"][kept].tolist()),
            )

    def _add_image(self, name: str, size: tuple[int, int], true: tuple[Any, ...], predicted: tuple[Any, ...]) -> None:
        """Adds the run lengths of an image, with labels, crowd flags and areas, or with labels, scores and pixels."""
        runs, labels, crowd, areas = true
        truth = self._records(f"{name}: masks", runs, labels, _mask_coder().area(runs))
        for record, is_crowd in zip(truth, [0] * len(truth) if crowd is None else crowd.tolist(), strict=True):
            record["iscrowd"] = int(is_crowd)
        if areas is not None:
            for record, area in zip(truth, areas.tolist(), strict=True):
                record["area"] = area
        runs, labels, scores, pixels = predicted
        found = self._records(f"{name}: prediction", runs, labels, pixels)
        for record, score in zip(found, scores.tolist(), strict=True):
            record.update(score=score, iscrowd=0)
        self._keep(name, {"truth": truth, "found": found, "size": size})

    def _records(
        self, name: str, runs: list[dict[str, Any]], labels: Tensor, areas: Iterable[int]
    ) -> list[dict[str, Any]]:
        """An annotation for each of the masks; errors call them ``name``."""
        if labels.shape != (len(runs),):
            raise ValueError(
                f"{name} has {len(runs)} masks and labels {tuple(labels.shape)}; expected (M, H, W) and (M,)"
            )
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            raise ValueError(f"{name} has labels outside 0..{self.num_classes - 1}")
        return [
            {"segmentation": rle, "area": float(area), "category_id": label}
            for rle, area, label in zip(runs, areas, labels.tolist(), strict=True)
        ]

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


def _run_lengths(name: str, masks: Tensor, number: Tensor | None = None) -> list[dict[str, Any]]:
    """The run lengths of masks ``(M, H, W)``, or of the segments of a map ``(H, W)`` with these numbers; errors call
    the masks ``name``. A few masks at a time are in memory."""
    if masks.dim() != (3 if number is None else 2):
        raise ValueError(f"{name} has shape {tuple(masks.shape)}; expected (M, H, W)")
    height, width = masks.shape[-2:]
    step = max(1, MASK_BYTES // max(1, height * width))
    chunks = masks.split(step) if number is None else (masks == some[:, None, None] for some in number.split(step))
    return [rle for chunk in chunks for rle in run_lengths(foreground(name, chunk.cpu()))]


def _mask_coder() -> Any:
    with extra("coco"):
        from hotcoco import mask
    return mask
