"""Converts panoptic truth to that of semantic and instance segmentation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from fastmask.data.sample import VOID, DatasetInfo, Sample

T = TypeVar("T")


def segment_dtype(num_segments: int) -> torch.dtype:
    """The dtype of a sample's segment map."""
    return torch.int16 if num_segments <= 2**15 - 1 else torch.int32


def semantic_segments(class_map: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Segments and labels of a sample from the class of each pixel.

    Args:
        class_map: ``(H, W)`` integers; values outside ``0..num_classes-1`` are void.
        num_classes: K.

    Returns:
        segments ``(H, W)``, one for each class that occurs, in order of class; labels ``(M,)``.
    """
    classes = class_map.long()
    classes = torch.where((classes >= 0) & (classes < num_classes), classes, num_classes)
    occurs = torch.bincount(classes.flatten(), minlength=num_classes + 1)[:num_classes] > 0
    index = torch.where(occurs, occurs.cumsum(0) - 1, VOID)
    lookup = torch.cat([index, index.new_tensor([VOID])]).to(segment_dtype(num_classes))
    return lookup[classes], occurs.nonzero().flatten()


def task_view(info: DatasetInfo, task: str | None) -> tuple[DatasetInfo, Callable[[Sample], Sample]]:
    """The classes of a data set with panoptic truth when opened for ``task``, and the conversion of its samples.

    Args:
        info: the classes, for the task "panoptic".
        task: "semantic", "instance" or "panoptic", the default.

    Returns:
        The classes, and a function that converts a sample and can be pickled.

    Raises:
        ValueError: the task is "instance" and no class is a thing.
    """
    if task in (None, "panoptic"):
        return info, _panoptic
    if task == "semantic":
        return replace(info, task=task), partial(_semantic, num_classes=info.num_classes)
    things = info.thing_classes
    if not things:
        raise ValueError(
            f"task={task!r}: the data set has no things, as all of its {info.num_classes} classes are stuff; "
            "expected the task 'semantic' or 'panoptic'"
        )

    def of_things(values: tuple[T, ...]) -> tuple[T, ...]:
        return tuple(values[label] for label in things)

    instance_info = replace(
        info,
        task=task,
        class_names=of_things(info.class_names),
        stuff_classes=(),
        palette=None if info.palette is None else of_things(info.palette),
        category_ids=None if info.category_ids is None else of_things(info.category_ids),
    )
    new_labels = torch.full((info.num_classes,), -1)
    new_labels[list(things)] = torch.arange(len(things))
    return instance_info, partial(_instances, new_labels=new_labels)


def _panoptic(sample: Sample) -> Sample:
    return sample


def _semantic(sample: Sample, num_classes: int) -> Sample:
    segments, labels = semantic_segments(sample.class_map(num_classes), num_classes)
    return sample._replace(segments=segments, labels=labels, crowd=None, areas=None)


def _instances(sample: Sample, new_labels: Tensor) -> Sample:
    if sample.segments is None:
        raise ValueError(f"{sample.name}: expected a segment map")
    indices = (new_labels[sample.labels] >= 0).nonzero().flatten()
    return sample._replace(
        segments=None,
        masks=sample.segments.eq(indices[:, None, None]),
        labels=new_labels[sample.labels[indices]],
        crowd=None if sample.crowd is None else sample.crowd[indices],
        areas=None if sample.areas is None else sample.areas[indices],
    )
