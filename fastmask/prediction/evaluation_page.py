"""A page of an evaluation: its numbers, a bar for each class, and the images with the worst scores."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from PIL import Image

from fastmask.data import DatasetInfo, Sample
from fastmask.data.palette import distinct_colors
from fastmask.prediction import page
from fastmask.prediction.overlay import SegmentMap

# By the score that images are sorted by, the first of them that was evaluated: the numbers in large type, and the bars.
LARGE = ("mIoU", "boundary_IoU", "general_mIoU", "PQ", "SQ", "RQ", "AP", "AP50")
SORTED_BY = ("PQ", "mIoU", "general_mIoU", "AP")
BARS = ("IoU", "general_IoU", "PQ", "AP")
DRAWN_SCORE = 0.5  # that an instance must exceed to be drawn


class EvaluationPage:
    """Collects the images with the worst scores of an evaluation for a page.

    The score of an image is the metric of its task on this image alone: PQ if panoptic segmentation is evaluated,
    otherwise mIoU, otherwise AP; the next of these decides between equal scores. An image without a score, in which
    there is nothing to find, comes last::

        page = EvaluationPage(dataset.info)
        evaluation = fastmask.training.evaluate(model, dataset, each=page.add)
        page.write("report.html", "My model", evaluation.numbers, evaluation.per_class)

    Args:
        info: the classes of the data set.
        images: the most images to show.
    """

    def __init__(self, info: DatasetInfo, images: int = 50):
        if images < 1:
            raise ValueError(f"images must be at least 1, got {images}")
        self.info, self.images = info, images
        self._palette = info.palette or distinct_colors(info.num_classes)
        # Sorted (scores, name, figure).
        self._worst: list[tuple[tuple[float, ...], str, str]] = []
        self._count = 0

    def add(self, sample: Sample, results: Mapping[str, Any], scores: Mapping[str, float]) -> None:
        """Adds an image; ``evaluate`` of ``fastmask.training`` calls this as its ``each``.

        Args:
            sample: the image and its truth.
            results: by task, what the model's ``predict`` gives for the image.
            scores: the scores of this image.
        """
        self._count += 1
        known = [name for name in SORTED_BY if name in scores]
        rank = tuple(math.inf if math.isnan(scores[name]) else scores[name] for name in known)
        if len(self._worst) == self.images and (rank, sample.name) > self._worst[-1][:2]:
            return
        note = ", ".join(f"{name.replace('_', ' ')} {_percent(scores[name])}" for name in known)
        bisect.insort(self._worst, (rank, sample.name, figure(sample, results, self.info, note)))
        del self._worst[self.images :]

    def write(
        self,
        path: str | Path,
        title: str,
        numbers: Mapping[str, float],
        per_class: Mapping[str, Sequence[float]],
        absent_classes: Sequence[str] = (),
    ) -> None:
        """Writes the page, whole or not at all. In distributed training every process must call this; the first one
        writes the worst images of all.

        Args:
            path: the file to write.
            title: the heading of the page.
            numbers, per_class, absent_classes: of the :class:`fastmask.training.Evaluation`.
        """
        every = [(self._worst, self._count)]
        if dist.is_available() and dist.is_initialized():
            every = [every[0]] * dist.get_world_size()
            dist.all_gather_object(every, (self._worst, self._count))
            if dist.get_rank() != 0:
                return
        worst = sorted((entry for entries, _ in every for entry in entries))[: self.images]
        count = sum(counted for _, counted in every)
        large = {name: value for name, value in numbers.items() if name in LARGE}
        blocks = [
            page.numbers({name.replace("_", " "): _percent(value) for name, value in large.items()}),
            page.heading("Classes"),
            page.bars(
                self.info.class_names,
                {name.replace("_", " "): values for name, values in per_class.items() if name in BARS},
                self._palette,
            ),
        ]
        if absent_classes:
            blocks.append(page.paragraph(f"Not in the truth: {', '.join(absent_classes)}."))
        sorted_by = next(name for name in SORTED_BY if name in numbers)
        which = f"the {len(worst)} worst of {count}" if len(worst) < count else "the worst first"
        blocks += [
            page.heading("Images"),
            page.paragraph(f"Sorted by {sorted_by.replace('_', ' ')} of each image alone, {which}."),
            page.mask_slider(),
            *(figure for _, _, figure in worst),
            page.heading("All numbers"),
            page.table(
                [("score", "value"), *((name.replace("_", " "), _percent(value)) for name, value in numbers.items())]
            ),
        ]
        page.write_page(path, title, f"{count} images, {self.info.num_classes} classes", blocks)


def figure(sample: Sample, results: Mapping[str, Any], info: DatasetInfo, note: str = "") -> str:
    """The figure of an image on a page: the image, its truth, and its results by task.

    Args:
        sample, results: as for :meth:`EvaluationPage.add`.
        info: the classes of the data set.
        note: the text after the name of the image.
    """
    palette = info.palette or distinct_colors(info.num_classes)
    photo = Image.fromarray(sample.image.permute(1, 2, 0).numpy())
    maps = {"truth": _truth(sample)}
    for task, result in results.items():
        if task == "panoptic":
            maps[task] = SegmentMap.of_panoptic(result[0].cpu().numpy(), result[1])
        elif task == "instance":
            scores = result["scores"].tolist()
            drawn = sorted((k for k, score in enumerate(scores) if score > DRAWN_SCORE), key=scores.__getitem__)
            masks, labels = result["masks"].cpu().numpy(), result["labels"].tolist()
            found = ((masks[k].astype(bool), labels[k], scores[k]) for k in drawn)
            maps[task] = SegmentMap.of_masks(sample.size, found)
        else:
            maps[task] = SegmentMap.of_labels(result.cpu().numpy(), info.num_classes)
    return page.segments(photo, maps, info.class_names, palette, sample.name, note)


def _truth(sample: Sample) -> SegmentMap:
    labels = sample.labels.tolist()
    if sample.segments is not None:
        return SegmentMap(sample.segments.numpy(), dict(enumerate(labels)))
    assert sample.masks is not None  # it has either these or segments
    masks = sample.masks.numpy().astype(bool)
    order = np.argsort(-masks.sum((1, 2)), kind="stable").tolist()  # small ones over large ones
    return SegmentMap.of_masks(sample.size, ((masks[m], labels[m], None) for m in order))


def _percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.1f} %"
