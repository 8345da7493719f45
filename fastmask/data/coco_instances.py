"""COCO instances: a JSON file with polygons or run lengths."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmask.data.coco_files import FLAG, ID, INTEGER, entry_name, image_folder, read_coco
from fastmask.data.image_files import Entry, FileDataset, Size, file_of
from fastmask.data.json_rules import Rule, field_faults, is_integer, is_number, shown
from fastmask.data.palette import distinct_colors
from fastmask.data.sample import DatasetInfo
from fastmask.extras import extra

GREATEST_AREA = 2.0**63
MAX_COORDINATE = 10**6  # of a polygon, in pixels; drawing takes memory in proportion to it
ANNOTATION = {
    "id": ID,
    "image_id": ID,
    "category_id": INTEGER,
    "iscrowd": FLAG._replace(optional=True),
    "area": Rule(lambda value: is_number(value, 0, GREATEST_AREA), "a number, 0 or more", optional=True),
}


def annotation_files(root: Path, split: str) -> list[Path]:
    """The places where the JSON file may be."""
    names = (
        f"annotations/instances_{split}2017.json",
        f"annotations/instances_{split}.json",
        f"annotations/{split}.json",
    )
    return [root / name for name in names]


def matches(root: Path) -> bool:
    """Whether the folder has this layout."""
    if next(root.glob("annotations/instances_*.json"), None):
        return True
    return any(path.is_file() for split in ("train", "val", "test") for path in annotation_files(root, split))


class CocoInstances(FileDataset):
    """Instance segmentation from COCO's JSON: polygons, run lengths, and run lengths compressed to a string.

    The file is ``annotations/instances_SPLIT2017.json``, ``annotations/instances_SPLIT.json`` or
    ``annotations/SPLIT.json``; images are in ``SPLIT2017`` or ``SPLIT``, in one of these folders inside ``images``, or
    directly in ``images``. hotcoco draws the polygons as pycocotools does.

    Args:
        root: the folder that holds ``annotations``.
        split: the split, SPLIT in these names.
        task: "instance".
        skip_invalid: leave out invalid polygons (fewer than three points, or numbers that are not finite), and
            annotations without valid ones. A warning counts them. Otherwise they are faults.

    Raises:
        FileNotFoundError: no JSON file, or no folder of images.
        ImportError: hotcoco is missing.
        ValueError: the JSON is invalid.
    """

    truth_is_picture = False

    def __init__(self, root: Path, split: str, task: str | None = None, skip_invalid: bool = False):
        if task not in (None, "instance"):
            raise ValueError(f"task={task!r}: COCO's instances have truth for the task instance only")
        _mask_coder()
        coco = read_coco(file_of(split, annotation_files(root, split)))
        folder = image_folder(root, split)
        self._class_of = coco.class_of
        self.info = DatasetInfo(
            tuple(category["name"] for category in coco.categories.values()),
            "instance",
            palette=distinct_colors(len(coco.categories)),
            category_ids=tuple(coco.categories),
        )
        self._sizes = [(image["height"], image["width"]) for image in coco.images.values()]
        entries = [
            Entry(name, folder / image["file_name"], coco.path)
            for name, image in zip(coco.image_names(), coco.images.values(), strict=True)
        ]
        super().__init__(split, entries, coco.faults)
        places = {image_id: index for index, image_id in enumerate(coco.images)}
        # For each image: its annotations, each with its position in the file.
        self._annotations: list[list[tuple[int, dict[str, Any]]]] = [[] for _ in entries]
        skipped = _skip_invalid(coco.annotations, coco.path) if skip_invalid else set()
        for place, annotation in enumerate(coco.annotations):
            if place in skipped:
                continue
            image_id = annotation.get("image_id") if isinstance(annotation, dict) else None
            if ID.holds(image_id) and image_id in places:
                self._annotations[places[image_id]].append((place, annotation))
                continue
            name = f"{coco.path}: {entry_name('annotations', place, annotation)}"
            self._set_faults += [f"{name}: {fault}" for fault in field_faults(annotation, ANNOTATION)]
            if ID.holds(image_id) and image_id not in coco.rejected:
                self._set_faults.append(f"{name} belongs to image {image_id}, which is not listed")

    def read_truth(self, index: int) -> dict[str, Tensor]:
        size, annotations = self._sizes[index], [annotation for _, annotation in self._annotations[index]]
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

    def annotation_faults(self, index: int) -> list[str]:
        entry, faults = self.entries[index], []
        for place, annotation in self._annotations[index]:
            wrong = field_faults(annotation, ANNOTATION)
            category = annotation.get("category_id")
            if is_integer(category) and category not in self._class_of:
                wrong.append(f"unknown category {category}")
            if fault := segmentation_fault(annotation.get("segmentation"), self._sizes[index]):
                wrong.append(fault)
            name = entry_name("annotations", place, annotation)
            faults += [f"{entry.truth}: {name} of {entry.image.name}: {fault}" for fault in wrong]
        return faults

    def truth_header(self, index: int) -> Size:
        return self._sizes[index]


def _skip_invalid(annotations: list[Any], path: Path) -> set[int]:
    """Removes invalid polygons from annotations; returns the positions of annotations without valid polygons."""
    polygons, places = 0, set()
    for place, annotation in enumerate(annotations):
        segmentation = annotation.get("segmentation") if isinstance(annotation, dict) else None
        if not isinstance(segmentation, list):
            continue
        valid = [polygon for polygon in segmentation if polygon_fault(polygon) is None]
        polygons += len(segmentation) - len(valid)
        annotation["segmentation"] = valid
        if not valid:
            places.add(place)
    if polygons or places:
        warnings.warn(
            f"{path}: invalid polygons that are skipped: {polygons}; "
            f"annotations that have no other and are left out: {len(places)}",
            stacklevel=4,
        )
    return places


def segmentation_fault(segmentation: Any, size: Size) -> str | None:
    """The fault of a mask's description, found without drawing it; None if it is valid.

    Args:
        segmentation: a list of polygons, or {"size", "counts"}.
        size: (H, W) of the image.
    """
    if isinstance(segmentation, list):
        if not segmentation:
            return "no polygon"
        return next(filter(None, map(polygon_fault, segmentation)), None)
    if not isinstance(segmentation, dict) or "counts" not in segmentation or "size" not in segmentation:
        return f"no segmentation; expected polygons, or an object of size and counts; got {shown(segmentation)}"
    if segmentation["size"] != list(size):
        return f"run lengths of size {shown(segmentation['size'])}; the image has {list(size)}"
    counts = segmentation["counts"]
    if not isinstance(counts, list | str):
        return f"counts are of type {type(counts).__name__}; expected a list or a string"
    lengths = run_lengths(counts)
    if not all(is_integer(length) and length >= 0 for length in lengths) or sum(lengths) != size[0] * size[1]:
        return f"run lengths that do not add up to {size[0]} x {size[1]} pixels"
    return None


def polygon_fault(polygon: Any) -> str | None:
    """The fault of a polygon ``[x0, y0, x1, y1, ...]``; None if it is valid."""
    if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
        return "a polygon must be a list of x, y of at least three points"
    if not all(is_number(value, -MAX_COORDINATE, MAX_COORDINATE) for value in polygon):
        return f"a polygon holds something other than finite numbers up to {MAX_COORDINATE}"
    return None


def draw(segmentation: Any, size: Size) -> np.ndarray:
    """``(H, W)`` bool mask of a valid description."""
    height, width = size
    if isinstance(segmentation, list):
        coder = _mask_coder()
        return coder.decode(coder.merge(coder.frPyObjects(segmentation, height, width))).astype(bool)
    lengths = run_lengths(segmentation["counts"])
    # Alternating runs of 0 and 1, column by column.
    values = np.arange(len(lengths)) % 2 == 1
    return np.repeat(values, lengths).reshape(width, height).T


def run_lengths(counts: list[int] | str) -> list[int]:
    """Run lengths as a list; COCO also writes them as a string.

    A character's code minus 48 holds five bits of a number, lowest first; bit 32 says that more follow, and bit 16 of
    the last character is the sign. From the fourth on, a number is the difference from the length two before. A string
    that ends within a number, or has other characters, gives the impossible length -1.
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
    with extra("coco"):
        from hotcoco import mask
    return mask
