"""COCO panoptic segmentation: a JSON file, and PNG files whose colors are segment ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastmask.data.coco_files import CATEGORY, FILE, FLAG, ID, INTEGER, image_folder, read_coco
from fastmask.data.derived_truth import segment_dtype, task_view
from fastmask.data.image_files import Entry, FileDataset, Size, file_of, folder_of, reading
from fastmask.data.json_rules import Rule, field_faults, is_integer
from fastmask.data.palette import distinct_colors
from fastmask.data.sample import DatasetInfo, Sample

VOID_ID = 0
GREATEST_ID = 2**24 - 1
ANNOTATION = {
    "image_id": ID,
    "file_name": FILE,
    "segments_info": Rule(lambda value: isinstance(value, list), "a list"),
}
SEGMENT = {
    "id": Rule(lambda value: is_integer(value) and VOID_ID < value <= GREATEST_ID, f"1..{GREATEST_ID}"),
    "category_id": INTEGER,
    "iscrowd": FLAG._replace(optional=True),
}


def annotation_files(root: Path, split: str) -> list[Path]:
    """The places where the JSON file may be."""
    names = (f"panoptic_{split}2017.json", f"panoptic_{split}.json")
    return [folder / name for folder in (root / "annotations", root) for name in names]


def matches(root: Path) -> bool:
    """Whether the folder has this layout."""
    return any(next(folder.glob("panoptic_*.json"), None) for folder in (root / "annotations", root))


def open_coco_panoptic(root: Path, split: str, task: str | None = None) -> PanopticDataset:
    """COCO panoptic segmentation in its published layout.

    The layout has ``annotations/panoptic_SPLIT2017.json`` or ``annotations/panoptic_SPLIT.json``, and a folder of the
    same name; both may also be in the root. Images are in ``SPLIT2017`` or ``SPLIT``, in one of these folders inside
    ``images``, or directly in ``images``.

    Args:
        root: the folder that holds ``annotations``.
        split: the split, SPLIT in these names.
        task: "panoptic" by default, "semantic" or "instance".

    Raises:
        FileNotFoundError, ValueError: as for :class:`PanopticDataset`.
    """
    path = file_of(split, annotation_files(root, split))
    maps = folder_of(split, [path.with_suffix(""), root / path.stem])
    return PanopticDataset(split, path, image_folder(root, split), maps, task)


class PanopticDataset(FileDataset):
    """Panoptic truth in COCO's format.

    A JSON file lists {"id", "category_id", "iscrowd"} for each segment. For each image there is a PNG, in which the id
    of a pixel is R + 256 G + 65536 B, and 0 is void.

    Args:
        split: the name of the split.
        path: the JSON file.
        images: the folder of images.
        maps: the folder of PNG files with ids.
        task: "panoptic" by default, "semantic" or "instance".

    Raises:
        FileNotFoundError: no JSON file, or no folder of images or ids.
        ValueError: the JSON is invalid.
    """

    def __init__(self, split: str, path: Path, images: Path, maps: Path, task: str | None = None):
        coco = read_coco(path, {**CATEGORY, "isthing": FLAG})
        categories = coco.categories.values()
        self._class_of = coco.class_of
        info = DatasetInfo(
            tuple(category["name"] for category in categories),
            "panoptic",
            tuple(label for label, category in enumerate(categories) if not category["isthing"]),
            distinct_colors(len(categories)),
            category_ids=tuple(coco.categories),
        )
        self.info, self._view = task_view(info, task)
        self._path = path
        faults = list(coco.faults)
        of_image: dict[Any, list[dict[str, Any]]] = {}
        rejected = set()
        for place, annotation in enumerate(coco.annotations):
            image_id = annotation.get("image_id") if isinstance(annotation, dict) else None
            wrong = field_faults(annotation, ANNOTATION)
            name = f"annotation of image {image_id}" if ID.holds(image_id) else f'"annotations"[{place}]'
            faults += [f"{path}: {name}: {fault}" for fault in wrong]
            if not ID.holds(image_id):
                continue
            if wrong:
                rejected.add(image_id)
            elif image_id in coco.images:
                of_image.setdefault(image_id, []).append(annotation)
            elif image_id not in coco.rejected:
                faults.append(f"{path}: an annotation belongs to image {image_id}, which is not listed")
        entries: list[Entry] = []
        self._segments: list[list[Any]] = []
        self._sizes: list[Size] = []
        for name, (image_id, image) in zip(coco.image_names(), coco.images.items(), strict=True):
            annotations = of_image.get(image_id, [])
            if len(annotations) == 1 and image_id not in rejected:
                (annotation,) = annotations
                entries.append(Entry(name, images / image["file_name"], maps / annotation["file_name"]))
                self._segments.append(annotation["segments_info"])
                self._sizes.append((image["height"], image["width"]))
            elif image_id not in rejected:
                count = f"{len(annotations)} annotations; expected one" if annotations else "no annotation"
                faults.append(f'{path}: image {image_id} ("{image["file_name"]}") has {count}')
        super().__init__(split, entries, faults)

    def as_task(self, sample: Sample) -> Sample:
        return self._view(sample)

    def read_truth(self, index: int) -> dict[str, Tensor]:
        segments = self._segments[index]
        return reading(
            self.entries[index].truth, lambda path: panoptic_truth(decode_ids(path), segments, self._class_of)
        )

    def annotation_faults(self, index: int) -> list[str]:
        name = self.entries[index].truth.name
        return [
            f"{self._path}: {fault}" for fault in segment_faults(self._segments[index], self._class_of, f" of {name}")
        ]

    def truth_header(self, index: int) -> Size:
        size, listed = super().truth_header(index), self._sizes[index]
        if size != listed:
            path = self.entries[index].truth
            raise ValueError(f"{path}: {size[0]} x {size[1]} pixels, but the JSON says {listed[0]} x {listed[1]}")
        return size


def segment_faults(segments: Sequence[Any], class_of: Mapping[int, int], of_image: str = "") -> list[str]:
    """The faults of a list of segments, in words.

    Args:
        segments: a list as in ``segments_info``.
        class_of: the class of each category.
        of_image: text that follows the name of a segment in messages.
    """
    faults, seen = [], set()
    for place, segment in enumerate(segments):
        wrong = field_faults(segment, SEGMENT)
        segment = segment if isinstance(segment, dict) else {}
        segment_id, category = segment.get("id"), segment.get("category_id")
        if is_integer(category) and category not in class_of:
            wrong.append(f"unknown category {category}")
        if ID.holds(segment_id):
            name = f"segment {segment_id}"
            if segment_id in seen:
                wrong.append("the id is listed twice")
            seen.add(segment_id)
        else:
            name = f'"segments_info"[{place}]'
        faults += [f"{name}{of_image}: {fault}" for fault in wrong]
    return faults


def panoptic_truth(
    values: np.ndarray, segments: Sequence[Mapping[str, Any]], class_of: Mapping[int, int]
) -> dict[str, Tensor]:
    """The labels, segments and crowd of a sample.

    Args:
        values: ``(H, W)`` int32 segment ids; 0 is void.
        segments: a list of segments without :func:`segment_faults`.
        class_of: the class of each category.

    Raises:
        ValueError: ``values`` holds an id that ``segments`` does not list.
    """
    listed = sorted(segments, key=lambda segment: segment["id"])
    ids = np.array([VOID_ID, *(segment["id"] for segment in listed)], np.int32)
    places = np.searchsorted(ids, values).clip(max=len(ids) - 1)
    unknown = values[ids[places] != values]
    if unknown.size:
        shown = ", ".join(map(str, np.unique(unknown)[:5]))
        raise ValueError(f"id {shown} at {unknown.size} pixels is not in segments_info")
    truth = {
        "labels": torch.tensor([class_of[segment["category_id"]] for segment in listed], dtype=torch.int64),
        "segments": torch.from_numpy(places - 1).to(segment_dtype(len(listed))),
    }
    if any(segment.get("iscrowd") for segment in listed):
        truth["crowd"] = torch.tensor([bool(segment.get("iscrowd")) for segment in listed])
    return truth


def decode_ids(file: Path | BinaryIO) -> np.ndarray:
    """``(H, W)`` int32 segment ids, R + 256 G + 65536 B."""
    with Image.open(file) as image:
        if image.mode not in ("RGB", "RGBA"):
            raise ValueError(f"ids in a picture of mode {image.mode}; expected RGB")
        colors = np.array(image)[..., :3].astype(np.int32)
    return colors[..., 0] + 256 * colors[..., 1] + 65536 * colors[..., 2]
