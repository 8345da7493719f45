"""Cityscapes: ``leftImg8bit/SPLIT/CITY`` and ``gtFine/SPLIT/CITY``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastmask.data.derived_truth import segment_dtype, task_view
from fastmask.data.image_files import (
    INVALID,
    Entry,
    FileDataset,
    LabelMapDataset,
    folder_of,
    list_files,
    paired,
    read_labels,
)
from fastmask.data.sample import VOID, DatasetInfo, Sample

# (name, label id, color) by train id.
CLASSES = (
    ("road", 7, (128, 64, 128)),
    ("sidewalk", 8, (244, 35, 232)),
    ("building", 11, (70, 70, 70)),
    ("wall", 12, (102, 102, 156)),
    ("fence", 13, (190, 153, 153)),
    ("pole", 17, (153, 153, 153)),
    ("traffic light", 19, (250, 170, 30)),
    ("traffic sign", 20, (220, 220, 0)),
    ("vegetation", 21, (107, 142, 35)),
    ("terrain", 22, (152, 251, 152)),
    ("sky", 23, (70, 130, 180)),
    ("person", 24, (220, 20, 60)),
    ("rider", 25, (255, 0, 0)),
    ("car", 26, (0, 0, 142)),
    ("truck", 27, (0, 0, 70)),
    ("bus", 28, (0, 60, 100)),
    ("train", 31, (0, 80, 100)),
    ("motorcycle", 32, (0, 0, 230)),
    ("bicycle", 33, (119, 11, 32)),
)
NUM_STUFF = 11
NUM_LABEL_IDS = 34
LICENSE_PLATE = 255  # label id -1 as a byte
IDS_PER_CLASS = 1000  # an instance id is 1000 times its label id plus a number; a group's is its label id
INFO = DatasetInfo(
    tuple(name for name, _, _ in CLASSES),
    "panoptic",
    tuple(range(NUM_STUFF)),
    tuple(color for _, _, color in CLASSES),
    category_ids=tuple(label_id for _, label_id, _ in CLASSES),
)


def matches(root: Path) -> bool:
    """Whether the folder has this layout."""
    return (root / "leftImg8bit").is_dir() and (root / "gtFine").is_dir()


def open_cityscapes(root: Path, split: str, task: str | None = None) -> FileDataset:
    """Cityscapes with fine annotations.

    Args:
        root: the folder that holds ``leftImg8bit`` and ``gtFine``.
        split: "train", "val" or "test".
        task: "semantic" by default, from the label ids; "panoptic" or "instance" from the instance ids.
    """
    images = list_files(folder_of(split, [root / "leftImg8bit" / split]), (".png",), "_leftImg8bit")
    kind = "labelIds" if task in (None, "semantic") else "instanceIds"
    truths = list_files(folder_of(split, [root / "gtFine" / split]), (".png",), f"_gtFine_{kind}")
    entries, faults = paired(images, truths)
    if kind == "instanceIds":
        return _CityscapesPanoptic(split, entries, faults, task)
    dataset = LabelMapDataset(split, entries, faults, _class_of_label_id())
    dataset.info, _ = task_view(INFO, "semantic")
    return dataset


class _CityscapesPanoptic(FileDataset):
    """Segments from instance ids, as in createPanopticImgs.py of cityscapesscripts: groups are crowd."""

    def __init__(self, split: str, entries: list[Entry], faults: list[str], task: str | None):
        super().__init__(split, entries, faults)
        self.info, self._view = task_view(INFO, task)

    def as_task(self, sample: Sample) -> Sample:
        return self._view(sample)

    def read_truth(self, index: int) -> dict[str, Tensor]:
        path = self.entries[index].truth
        values = read_labels(path)
        ids = np.bincount(values.ravel()).nonzero()[0]
        classes = _class_of_label_id()
        label_ids = np.where(ids < IDS_PER_CLASS, ids, ids // IDS_PER_CLASS)
        wrong = ids[(label_ids >= len(classes)) | (classes[np.minimum(label_ids, len(classes) - 1)] == INVALID)]
        if wrong.size:
            raise ValueError(f"{path}: instance id {wrong[0]} is of no class")
        labels = classes[label_ids]
        kept = labels >= 0
        dtype = segment_dtype(int(kept.sum()))
        lookup = torch.full((int(ids.max()) + 1,), VOID, dtype=dtype)
        lookup[torch.from_numpy(ids[kept])] = torch.arange(int(kept.sum()), dtype=dtype)
        crowd = (ids < IDS_PER_CLASS) & (labels >= NUM_STUFF)
        return {
            "labels": torch.from_numpy(labels[kept]),
            "segments": lookup[torch.from_numpy(values.astype(np.int64))],
            "crowd": torch.from_numpy(crowd[kept]),
        }


def _class_of_label_id() -> np.ndarray:
    table = np.full(LICENSE_PLATE + 1, INVALID, np.int64)
    table[:NUM_LABEL_IDS] = table[LICENSE_PLATE] = -1
    for train_id, (_, label_id, _) in enumerate(CLASSES):
        table[label_id] = train_id
    return table
