"""Metrics of semantic segmentation: IoU, accuracy and boundary IoU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmask.metrics.base import Metrics, checked_classes, mean, share
from fastmask.metrics.truth import bands_of_rows, class_maps
from fastmask.modules.final_predictions import FinalPredictions
from fastmask.targets import CLASS_DTYPES, Targets, label_dtype


class SemanticMetrics(Metrics):
    """IoU and accuracy from the confusion matrix of all pixels, and boundary IoU.

    IoU_k = TP_k / (TP_k + FP_k + FN_k), as in the scripts of Cityscapes: counted over all images together, without
    void, and averaged over the classes that occur in truth or prediction. fwIoU weights IoU_k by the class's share of
    the true pixels. Accuracy_k = TP_k / (TP_k + FN_k) is averaged over the classes that occur in the truth.

    Boundary IoU (Cheng et al. 2021, arXiv:2103.16562) is the IoU of only those pixels that lie within d of the boundary
    of their class, in chessboard distance, for each class over all images together. The image's border counts as a
    boundary. Void pixels of the truth are also void in the prediction, so that a perfect prediction scores 1.

    Args:
        num_classes: K.
        ignore_index: the class of void pixels in the truth.
        boundary_share: d as a share of the image's diagonal; None leaves out boundary IoU, which takes two thirds of
            the time.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(self, num_classes: int, *, ignore_index: int = 255, boundary_share: float | None = 0.02):
        self.num_classes, _ = checked_classes(num_classes)
        if 0 <= ignore_index < num_classes:
            raise ValueError(f"ignore_index={ignore_index} is also one of the {num_classes} classes")
        if boundary_share is not None and not 0 < boundary_share < 1:
            raise ValueError(f"boundary_share must lie between 0 and 1, got {boundary_share}")
        self.ignore_index = ignore_index
        self.boundary_share = boundary_share
        # Column K counts pixels whose prediction is not a class.
        self._confusion = np.zeros((num_classes, num_classes + 1), np.int64)
        # Rows: pixels near the boundary in both truth and prediction of a class, in the truth, in the prediction.
        self._boundary = np.zeros((3, num_classes), np.int64)

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Adds an image, or images of one size.

        Args:
            prediction: ``(..., H, W)`` integers, the class of each pixel; values outside 0..K-1 are not a class and
                count as wrong where the truth has one.
            target: ``(..., H, W)`` integers in 0..K-1, or ``ignore_index``.

        Raises:
            TypeError: a dtype that is not an integer type.
            ValueError: shapes that differ, or a class out of range in the target.
        """
        for name, tensor in (("prediction", prediction), ("target", target)):
            if tensor.dtype not in CLASS_DTYPES:
                raise TypeError(f"{name} must hold integers, got {tensor.dtype}")
        if prediction.shape != target.shape or target.dim() < 2:
            raise ValueError(
                f"prediction has shape {tuple(prediction.shape)}, target {tuple(target.shape)}; expected (..., H, W)"
            )
        classes = self.num_classes
        pair = (target, prediction.to(target.device))
        images = [image.flatten(0, -3) if image.dim() > 2 else image[None] for image in pair]
        for truth, found in zip(*images, strict=True):
            # Void is an extra class in both; pixels of no class are another, in the prediction only.
            maps = [torch.empty_like(truth, dtype=label_dtype(classes + 2)) for _ in pair]
            for band in bands_of_rows(truth):
                self._add_band(truth[band].long(), found[band].long(), *(one[band] for one in maps))
            if self.boundary_share is not None and truth.numel() > 0:
                truth_map, found_map = (one.cpu().numpy() for one in maps)
                self._add_boundary(found_map, truth_map, self.boundary_share)

    def _add_band(self, truth: Tensor, found: Tensor, truth_map: Tensor, found_map: Tensor) -> None:
        """Counts some rows, and writes them to the maps for boundaries."""
        classes = self.num_classes
        void = truth == self.ignore_index
        wrong = ((truth < 0) | (truth >= classes)) & ~void
        if wrong.any():
            value = int(truth[wrong][0])
            raise ValueError(f"target holds class {value}; expected 0..{classes - 1} or {self.ignore_index}")
        found = found.masked_fill((found < 0) | (found >= classes), classes)
        pairs = torch.bincount(
            (truth.masked_fill(void, classes) * (classes + 1) + found).flatten(), minlength=(classes + 1) ** 2
        )
        self._confusion += pairs.view(classes + 1, classes + 1)[:classes].cpu().numpy()
        truth_map.copy_(truth.masked_fill(void, classes + 1))
        found_map.copy_(found.masked_fill(void, classes + 1))

    def update_from_logits(
        self,
        outputs: Any,
        targets: Targets | Tensor | Sequence[Any],
        sizes: Sequence[tuple[int, int]] | None = None,
        *,
        rule: str | None = None,
        padded_size: tuple[int, int] | None = None,
        valid_sizes: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        """Adds a batch by a model's logits: semantic inference at the size of the truth, one image at a time.

        No mask and no score exists at that size: the memory is that of a few label maps.

        Args:
            outputs: a model's outputs, as in :meth:`fastmask.modules.FinalPredictions.from_outputs`.
            targets: the truth at its own size: class maps ``(B, H, W)``, or a list of ``(H_b, W_b)``, as for
                :meth:`update`; or the forms with labels and segments or masks that
                :meth:`PanopticMetrics.update_from_logits` takes.
            sizes: (height, width) of each image within padded targets; None if nothing is padded.
            rule: "maskformer", "mask2former", "huggingface", "oneformer" or "eomt": the code base whose way of resizing
                counts; by default that of the outputs' image processor in transformers, else "maskformer".
            padded_size: (height, width) of the padded network input, if images were padded to a batch.
            valid_sizes: (height, width) of each image within it.

        Raises:
            TypeError: outputs without class and mask logits, or targets in another form.
            ValueError: numbers of images or sizes that do not fit, a class out of range, or an unknown rule.
        """
        predictions = FinalPredictions.from_outputs(
            outputs, rule=rule, padded_size=padded_size, valid_sizes=valid_sizes
        )
        for b, target in enumerate(class_maps(targets, sizes, predictions.num_images, self.ignore_index)):
            self.update(predictions.of_image(b).semantic((target.shape[0], target.shape[1]))[0], target)

    def _add_boundary(self, found: np.ndarray, truth: np.ndarray, share_of_diagonal: float) -> None:
        distance = max(1, round(share_of_diagonal * math.hypot(*truth.shape)))
        near_found, near_truth = near_boundary(found, distance), near_boundary(truth, distance)
        for band in bands_of_rows(truth):
            found_rows, truth_rows, by_found, by_truth = (x[band] for x in (found, truth, near_found, near_truth))
            both = by_found & by_truth & (found_rows == truth_rows)
            counted = truth_rows[both], truth_rows[by_truth], found_rows[by_found]
            for row, values in zip(self._boundary, counted, strict=True):
                row += np.bincount(values, minlength=self.num_classes)[: self.num_classes]

    def compute(self) -> dict[str, float]:
        """ "mIoU", "fwIoU", "pixel_accuracy", "mean_accuracy" and, unless left out, "boundary_IoU"."""
        numbers = {name: np.array(values) for name, values in self.per_class().items()}
        pixels = self._confusion.sum(1)
        labeled = pixels > 0
        result = {
            "mIoU": mean(numbers["IoU"]),
            "fwIoU": float(share((pixels * numbers["IoU"])[labeled].sum(), pixels.sum())),
            "pixel_accuracy": float(share(self._true_positives().sum(), pixels.sum())),
            "mean_accuracy": mean(numbers["accuracy"]),
        }
        if self.boundary_share is not None:
            result["boundary_IoU"] = mean(numbers["boundary_IoU"])
        return result

    def per_class(self) -> dict[str, list[float]]:
        """ "IoU", "accuracy" and, unless left out, "boundary_IoU"."""
        hits, pixels = self._true_positives(), self._confusion.sum(1)
        union = pixels + self._confusion[:, :-1].sum(0) - hits
        result = {"IoU": share(hits, union).tolist(), "accuracy": share(hits, pixels).tolist()}
        if self.boundary_share is not None:
            both, truth, found = self._boundary
            result["boundary_IoU"] = share(both, truth + found - both).tolist()
        return result

    def absent(self) -> list[int]:
        return np.flatnonzero(self._confusion.sum(1) == 0).tolist()

    @property
    def confusion(self) -> np.ndarray:
        """``(K, K+1)`` int64, pixels by true class (row) and predicted class (column); column K means no class."""
        return self._confusion.copy()

    def _true_positives(self) -> np.ndarray:
        return self._confusion.diagonal()

    def _settings(self) -> tuple:
        return self.num_classes, self.ignore_index, self.boundary_share

    def _add(self, other: SemanticMetrics) -> None:
        self._confusion += other._confusion
        self._boundary += other._boundary


def near_boundary(classes: np.ndarray, distance: int) -> np.ndarray:
    """``(H, W)`` bool: pixels with another class, or the image's border, at most ``distance`` away (chessboard).

    All classes are handled at once: a pixel is far from any boundary if no two neighbors in its surroundings differ.
    """
    rows, columns = classes.shape
    near = np.ones((rows, columns), bool)
    if min(rows, columns) > 2 * distance:
        inside = slice(distance, rows - distance), slice(distance, columns - distance)
        near[inside] = _any_in_windows(classes[:, 1:] != classes[:, :-1], 2 * distance + 1, 2 * distance)
        near[inside] |= _any_in_windows(classes[1:] != classes[:-1], 2 * distance, 2 * distance + 1)
    return near


def _any_in_windows(values: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Whether any value is True in each window of ``rows`` x ``columns`` that lies within ``values (H, W)`` bool."""
    for length in (rows, columns):
        covered = 1
        while covered < length:
            step = min(covered, length - covered)
            values = values[step:] | values[:-step]
            covered += step
        values = values.T
    return values
