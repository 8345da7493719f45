"""Instances as COCO has them: a JSON file with polygons or run lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmask.data.files import Entry, FileDataset, Size, folder_of
from fastmask.data.json_files import read_coco
from fastmask.data.palette import distinct_colours
from fastmask.data.sample import DatasetInfo

NEEDED = {
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("id", "image_id", "category_id"),
    "categories": ("id", "name"),
}


def annotation_files(root: Path, split: str) -> list[Path]:
    """Where the JSON file may be."""
    names = (
        f"annotations/instances_{split}2017.json",
        f"annotations/instances_{split}.json",
        f"annotations/{split}.json",
    )
    return [root / name for name in names]


def matches(root: Path) -> bool:
    """The folder has this layout."""
    return any(path.is_file() for split in ("train", "val", "test") for path in annotation_files(root, split))


class CocoInstances(FileDataset):
    """Instance segmentation from COCO's JSON: polygons, run lengths, and run lengths compressed to a string.

    The file is ``annotations/instances_SPLIT2017.json``, ``annotations/instances_SPLIT.json`` or
    ``annotations/SPLIT.json``; images are in ``SPLIT2017`` or ``SPLIT``, or in one of these within ``images``, or in
    ``images``. Polygons are drawn by pycocotools.

    Args:
        root: of ``annotations``.
        split: as in the file's name.
        task: "instance".

    Raises:
        FileNotFoundError: no JSON file, or no folder of images.
        ImportError: pycocotools is missing.
        ValueError: the JSON is not what it should be.
    """

    def __init__(self, root: Path, split: str, task: str | None = None):
        if task not in (None, "instance"):
            raise ValueError(f"task={task!r}: COCO's instances have truth for the task instance only")
        _mask_coder()
        candidates = annotation_files(root, split)
        path = next((path for path in candidates if path.is_file()), None)
        if path is None:
            raise FileNotFoundError(f"split {split!r} has no file {' or '.join(map(str, candidates))}")
        content = read_coco(path, NEEDED)
        names = (f"{split}2017", split, f"images/{split}2017", f"images/{split}", "images")
        folder = folder_of(split, [root / name for name in names])
        categories = sorted(content["categories"], key=lambda category: category["id"])
        self._class_of = {category["id"]: label for label, category in enumerate(categories)}
        self.info = DatasetInfo(
            tuple(category["name"] for category in categories),
            "instance",
            palette=distinct_colours(len(categories)),
            category_ids=tuple(self._class_of),
        )
        images = {image["id"]: image for image in content["images"]}
        self._annotations: list[list[dict[str, Any]]] = [[] for _ in images]
        place = {image_id: index for index, image_id in enumerate(images)}
        faults = []
        for annotation in content["annotations"]:
            index = place.get(annotation["image_id"])
            if index is None:
                faults.append(f"{path}: annotation {annotation['id']} is of image {annotation['image_id']}, not listed")
            else:
                self._annotations[index].append(annotation)
        self._sizes = [(image["height"], image["width"]) for image in images.values()]
        entries = [
            Entry(Path(image["file_name"]).with_suffix("").as_posix(), folder / image["file_name"], path)
            for image in images.values()
        ]
        super().__init__(split, entries, faults)

    def read_truth(self, index: int) -> dict[str, Tensor]:
        self.truth_header(index)
        annotations, size = self._annotations[index], self._sizes[index]
        masks = np.zeros((len(annotations), *size), bool)
        for mask, annotation in zip(masks, annotations, strict=True):
            mask[:] = draw(annotation["segmentation"], size)
        crowd = torch.tensor([bool(annotation.get("iscrowd")) for annotation in annotations], dtype=torch.bool)
        truth = {
            "labels": torch.tensor([self._class_of[a["category_id"]] for a in annotations], dtype=torch.int64),
            "masks": torch.from_numpy(masks),
        }
        if crowd.any():
            truth["crowd"] = crowd
        if all("area" in annotation for annotation in annotations):
            truth["areas"] = torch.tensor([annotation["area"] for annotation in annotations], dtype=torch.float32)
        return truth

    def truth_header(self, index: int) -> Size:
        for annotation in self._annotations[index]:
            if annotation["category_id"] not in self._class_of:
                raise ValueError(f"{self._name(index, annotation)}: unknown category {annotation['category_id']}")
            fault = segmentation_fault(annotation.get("segmentation"), self._sizes[index])
            if fault:
                raise ValueError(f"{self._name(index, annotation)}: {fault}")
        return self._sizes[index]

    def _name(self, index: int, annotation: dict[str, Any]) -> str:
        entry = self.entries[index]
        return f"{entry.truth}: annotation {annotation['id']} of {entry.image.name}"


def segmentation_fault(segmentation: Any, size: Size) -> str | None:
    """What is wrong with a mask's description, without drawing it.

    Args:
        segmentation: a list of polygons, or {"size", "counts"}.
        size: (H, W) of the image.
    """
    if isinstance(segmentation, list):
        if not segmentation:
            return "no polygon"
        for polygon in segmentation:
            if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
                return "a polygon must be a list of x, y of at least three points"
            if not all(isinstance(value, int | float) and np.isfinite(value) for value in polygon):
                return "a polygon holds something else than finite numbers"
        return None
    if not isinstance(segmentation, dict) or "counts" not in segmentation or "size" not in segmentation:
        return f"no segmentation; expected polygons, or a dict of size and counts; got {segmentation!r}"[:200]
    if list(segmentation["size"]) != list(size):
        return f"run lengths of size {segmentation['size']}; the image has {list(size)}"
    counts = segmentation["counts"]
    if not isinstance(counts, list | str):
        return f"counts are of type {type(counts).__name__}; expected a list or a string"
    lengths = run_lengths(counts)
    if not all(isinstance(length, int) and length >= 0 for length in lengths) or sum(lengths) != size[0] * size[1]:
        return f"run lengths that do not add up to {size[0]} x {size[1]} pixels"
    return None


def draw(segmentation: Any, size: Size) -> np.ndarray:
    """``(H, W)`` bool mask of a description without fault."""
    height, width = size
    if isinstance(segmentation, list):
        coder = _mask_coder()
        return coder.decode(coder.merge(coder.frPyObjects(segmentation, height, width))).astype(bool)
    lengths = run_lengths(segmentation["counts"])
    # Runs of 0 and 1 in turn, column by column.
    values = np.arange(len(lengths)) % 2 == 1
    return np.repeat(values, lengths).reshape(width, height).T


def run_lengths(counts: list[int] | str) -> list[int]:
    """Run lengths, which COCO also writes as a string.

    A character less 48 has five bits of a number, lowest first; bit 32 says that more follow, and bit 16 of the last is
    the sign. From the third on, a number is the difference to the length two before. A string that ends amid a number,
    or has other characters, gives a length of -1, which nothing can have.
    """
    if isinstance(counts, list):
        return counts
    lengths: list[int] = []
    number = shift = 0
    for character in counts:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            return [-1]
        number |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            number -= 1 << shift
        lengths.append(number + (lengths[-2] if len(lengths) > 2 else 0))
        number = shift = 0
    return lengths if shift == 0 else [-1]


def _mask_coder() -> Any:
    try:
        from pycocotools import mask
    except ImportError as error:
        raise ImportError("COCO's instances need pycocotools: pip install 'fastmask-kernels[coco]'") from error
    return mask
