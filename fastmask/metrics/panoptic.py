"""Panoptic quality."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from fastmask.metrics.base import Metrics, checked_classes, mean, share
from fastmask.metrics.truth import bands_of_rows, truths
from fastmask.modules.final_predictions import FinalPredictions
from fastmask.targets import Targets


class PanopticMetrics(Metrics):
    """PQ = sum of IoU over matches / (TP + FP / 2 + FN / 2) = SQ * RQ, for each class, by things and by stuff.

    Panoptic Segmentation (Kirillov et al. 2019, arXiv:1801.00868), equations 1 and 2, with the rules of the COCO
    panoptic API: a segment matches one of its class at an IoU above 1/2; pixels that are void in the truth do not count
    in the union. A missed crowd region is not an error, nor is a predicted segment that lies more than half in void or
    in crowd regions of its class. Means are over the classes that occur in truth or prediction.

    Args:
        num_classes: K.
        stuff_classes: the classes that are stuff; all others are things.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(self, num_classes: int, stuff_classes: Collection[int] = ()):
        self.num_classes, self.stuff_classes = checked_classes(num_classes, stuff_classes)
        # Columns: sum of IoU over matches, TP, FP, FN.
        self._counts = np.zeros((num_classes, 4))

    def update(
        self,
        prediction: tuple[Tensor, Sequence[Mapping[str, Any]]],
        segments: Tensor,
        labels: Tensor,
        crowd: Tensor | None = None,
    ) -> None:
        """Adds an image.

        Args:
            prediction: ``(H, W)`` integer ids, and for each id {"id", "category_id"} with a class in 0..K-1, as
                ``MaskFormer.predict`` returns. Pixels whose id is not listed belong to no segment.
            segments: ``(H, W)`` integers, the index ``0..M-1`` of each pixel's segment; other values are void.
            labels: ``(M,)`` classes in 0..K-1; the first -1 begins the padding.
            crowd: ``(M,)`` bool, which segments are crowd regions.

        Raises:
            ValueError: shapes that differ, a class out of range, or an id that is listed twice.
        """
        ids, infos = prediction
        if ids.shape != segments.shape or ids.dim() != 2:
            raise ValueError(
                f"prediction has shape {tuple(ids.shape)}, segments {tuple(segments.shape)}; expected (H, W)"
            )
        true_labels = labels.cpu().numpy()
        found_labels = np.array([info["category_id"] for info in infos], np.int64)
        self._check("labels", true_labels[true_labels >= 0])
        self._check("prediction", found_labels)
        found_ids = np.array([info["id"] for info in infos], np.int64)
        if len(np.unique(found_ids)) < len(found_ids):
            raise ValueError(f"prediction lists an id twice: {sorted(found_ids.tolist())}")
        num_found, num_true = len(found_ids), len(true_labels)
        # shared[m, s]: pixels of segment m (the last is void) and found segment s (the last is none).
        counts = np.zeros((num_true + 1) * (num_found + 1), np.int64)
        truth_map, found_map = segments.cpu().numpy(), ids.cpu().numpy()
        for band in bands_of_rows(segments):
            truth = truth_map[band].astype(np.int64)
            truth = np.where((truth >= 0) & (truth < num_true), truth, num_true)
            found = _index_of(found_map[band].astype(np.int64), found_ids)
            counts += np.bincount((truth * (num_found + 1) + found).ravel(), minlength=len(counts))
        shared = counts.reshape(num_true + 1, num_found + 1)
        true_areas, found_areas = shared.sum(1)[:-1], shared.sum(0)[:-1]
        in_void, inside = shared[-1, :-1], shared[:-1, :-1]
        is_crowd = np.zeros(num_true, bool) if crowd is None else crowd.cpu().numpy().astype(bool)

        same_class = true_labels[:, None] == found_labels
        iou = share(inside, true_areas[:, None] + found_areas - inside - in_void)
        matches = same_class & ~is_crowd[:, None] & (iou > 0.5)
        rows, columns = matches.nonzero()
        np.add.at(self._counts, (true_labels[rows], 0), iou[rows, columns])
        np.add.at(self._counts, (true_labels[rows], 1), 1)
        missed = ~matches.any(1) & ~is_crowd & (true_areas > 0) & (true_labels >= 0)
        np.add.at(self._counts, (true_labels[missed], 3), 1)
        excused = in_void + (inside * (same_class & is_crowd[:, None])).sum(0)
        wrong = ~matches.any(0) & (found_areas > 0) & ~(share(excused, found_areas) > 0.5)
        np.add.at(self._counts, (found_labels[wrong], 2), 1)

    def update_from_logits(
        self,
        outputs: Any,
        targets: Targets | Sequence[Any],
        sizes: Sequence[tuple[int, int]] | None = None,
        *,
        rule: str | None = None,
        padded_size: tuple[int, int] | None = None,
        valid_sizes: Sequence[tuple[int, int]] | None = None,
        **options: Any,
    ) -> None:
        """Adds a batch by a model's logits: panoptic inference at the size of the truth, one image at a time.

        No mask exists at that size: the memory is that of a few segment maps.

        Args:
            outputs, sizes, padded_size, valid_sizes: as for :meth:`SemanticMetrics.update_from_logits`.
            targets: :class:`fastmask.Targets`, or for each image a mapping or a :class:`fastmask.data.Sample` with
                "labels" ``(M,)`` and "segments" ``(H, W)`` or "masks" ``(M, H, W)``, and, unless it is None, "crowd"
                ``(M,)``. transformers' names, "class_labels" and "mask_labels", will do.
            rule: "maskformer", "mask2former", "huggingface" (with the corrections of
                :func:`fastmask.panoptic_inference`), "oneformer" or "eomt"; by default that of the outputs' image
                processor in transformers, else "maskformer".
            options: "threshold", "overlap_threshold" and "mask_threshold" of :func:`fastmask.panoptic_inference`.

        Raises:
            TypeError: outputs without class and mask logits, or targets in another form.
            ValueError: numbers of images or sizes that do not fit, a class out of range, or an unknown rule.
        """
        predictions = FinalPredictions.from_outputs(
            outputs, rule=rule, padded_size=padded_size, valid_sizes=valid_sizes
        )
        for b, truth in enumerate(truths(targets, sizes, predictions.num_images)):
            found = predictions.of_image(b).panoptic(truth.size, stuff_classes=self.stuff_classes, **options)
            self.update(found[0], truth.segment_map(f"targets[{b}]"), truth.labels, truth.crowd)

    def _check(self, name: str, labels: np.ndarray) -> None:
        outside = labels[(labels < 0) | (labels >= self.num_classes)]
        if outside.size:
            raise ValueError(f"{name} holds class {outside[0]}; expected 0..{self.num_classes - 1}")

    def compute(self) -> dict[str, float]:
        """ "PQ", "SQ" and "RQ", and each with "_things" and "_stuff"."""
        numbers = {name: np.array(values) for name, values in self.per_class().items()}
        occurs = self._counts[:, 1:].sum(1) > 0
        is_stuff = np.isin(np.arange(self.num_classes), self.stuff_classes)
        groups = {"": occurs, "_things": occurs & ~is_stuff, "_stuff": occurs & is_stuff}
        return {name + suffix: mean(numbers[name], group) for suffix, group in groups.items() for name in numbers}

    def per_class(self) -> dict[str, list[float]]:
        """ "PQ", "SQ" and "RQ"; SQ is 0 for a class that occurs without a match."""
        iou, hits, wrong, missed = self._counts.T
        whole = hits + wrong / 2 + missed / 2
        quality = np.where((hits == 0) & (whole > 0), 0.0, share(iou, hits))
        return {"PQ": share(iou, whole).tolist(), "SQ": quality.tolist(), "RQ": share(hits, whole).tolist()}

    def absent(self) -> list[int]:
        _, hits, _, missed = self._counts.T
        return np.flatnonzero(hits + missed == 0).tolist()

    def _settings(self) -> tuple:
        return self.num_classes, self.stuff_classes

    def _add(self, other: PanopticMetrics) -> None:
        self._counts += other._counts


def _index_of(values: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """The index of each value in ``ids (S,)``; S for values that are not in it."""
    if len(ids) == 0:
        return np.zeros_like(values)
    order = np.argsort(ids)
    places = order[np.searchsorted(ids[order], values).clip(max=len(ids) - 1)]
    return np.where(ids[places] == values, places, len(ids))
