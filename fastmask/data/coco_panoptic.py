"""COCO panoptic: a JSON file, and PNG files whose colours are segment ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastmask.data.files import Entry, FileDataset, Size, folder_of, reading
from fastmask.data.json_files import read_coco
from fastmask.data.palette import distinct_colours
from fastmask.data.sample import DatasetInfo, Sample
from fastmask.data.tasks import segment_dtype, task_view

NEEDED = {
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("image_id", "file_name", "segments_info"),
    "categories": ("id", "name", "isthing"),
}
VOID_ID = 0


def annotation_files(root: Path, split: str) -> list[Path]:
    """Where the JSON file may be."""
    return [root / "annotations" / f"panoptic_{split}2017.json", root / f"panoptic_{split}2017.json"]


def matches(root: Path) -> bool:
    """The folder has this layout."""
    return any(path.is_file() for split in ("train", "val") for path in annotation_files(root, split))


class CocoPanoptic(FileDataset):
    """COCO panoptic segmentation, in the layout in which it is published.

    ``annotations/panoptic_SPLIT2017.json`` lists {"id", "category_id", "iscrowd"} of each segment; the folder of the
    same name has for each image a PNG in which the id of a pixel is R + 256 G + 65536 B, and 0 is void. Both may lie in
    the root as well. Images are in ``SPLIT2017`` or ``images/SPLIT2017``.

    Args:
        root: of ``annotations``.
        split: "train" or "val".
        task: "panoptic" by default, "semantic" or "instance".

    Raises:
        FileNotFoundError: no JSON file, or no folder of images or ids.
        ValueError: the JSON is not what it should be.
    """

    def __init__(self, root: Path, split: str, task: str | None = None):
        candidates = annotation_files(root, split)
        path = next((path for path in candidates if path.is_file()), None)
        if path is None:
            raise FileNotFoundError(f"split {split!r} has no file {' or '.join(map(str, candidates))}")
        content = read_coco(path, NEEDED)
        images = folder_of(split, [root / f"{split}2017", root / "images" / f"{split}2017"])
        maps = folder_of(split, [path.with_suffix(""), root / path.stem])
        categories = sorted(content["categories"], key=lambda category: category["id"])
        self._class_of = {category["id"]: label for label, category in enumerate(categories)}
        info = DatasetInfo(
            tuple(category["name"] for category in categories),
            "panoptic",
            tuple(label for label, category in enumerate(categories) if not category["isthing"]),
            distinct_colours(len(categories)),
            category_ids=tuple(self._class_of),
        )
        self.info, self._as_task = task_view(info, task)
        files = {image["id"]: image for image in content["images"]}
        annotations = {annotation["image_id"]: annotation for annotation in content["annotations"]}
        shared = [image_id for image_id in files if image_id in annotations]
        faults = [
            f'{path}: image {i} ("{files[i]["file_name"]}") has no annotation' for i in files if i not in annotations
        ]
        faults += [f"{path}: an annotation is of image {i}, which is not listed" for i in annotations if i not in files]
        entries = [
            Entry(Path(files[i]["file_name"]).stem, images / files[i]["file_name"], maps / annotations[i]["file_name"])
            for i in shared
        ]
        super().__init__(split, entries, faults)
        self._segments = [annotations[i]["segments_info"] for i in shared]
        self._sizes = [(files[i]["height"], files[i]["width"]) for i in shared]

    def __getitem__(self, index: int) -> Sample:
        return self._as_task(super().__getitem__(index))

    def read_truth(self, index: int) -> dict[str, Tensor]:
        path = self.entries[index].truth
        listed = sorted(self._checked_segments(index), key=lambda segment: segment["id"])
        ids = np.array([VOID_ID, *(segment["id"] for segment in listed)], np.int32)
        values = reading(path, _decode_ids)
        places = np.searchsorted(ids, values).clip(max=len(ids) - 1)
        unknown = values[ids[places] != values]
        if unknown.size:
            shown = ", ".join(map(str, np.unique(unknown)[:5]))
            raise ValueError(f"{path}: id {shown} at {unknown.size} pixels is not in segments_info")
        absent = ids[np.bincount(places.ravel(), minlength=len(ids)) == 0]
        absent = absent[absent != VOID_ID]
        if absent.size:
            raise ValueError(f"{path}: id {', '.join(map(str, absent[:5]))} of segments_info has no pixel")
        truth = {
            "labels": torch.tensor([self._class_of[segment["category_id"]] for segment in listed], dtype=torch.int64),
            "segments": torch.from_numpy(places - 1).to(segment_dtype(len(listed))),
        }
        if any(segment.get("iscrowd") for segment in listed):
            truth["crowd"] = torch.tensor([bool(segment.get("iscrowd")) for segment in listed])
        return truth

    def truth_header(self, index: int) -> Size:
        self._checked_segments(index)
        size, listed = super().truth_header(index), self._sizes[index]
        if size != listed:
            path = self.entries[index].truth
            raise ValueError(f"{path}: {size[0]} x {size[1]} pixels, but the JSON says {listed[0]} x {listed[1]}")
        return size

    def _checked_segments(self, index: int) -> list[dict[str, Any]]:
        path, segments = self.entries[index].truth, self._segments[index]
        ids = []
        for segment in segments:
            if not isinstance(segment, dict) or not isinstance(segment.get("id"), int) or "category_id" not in segment:
                raise ValueError(f"{path}: segments_info holds {segment}; expected id and category_id")
            if not VOID_ID < segment["id"] < 2**24:
                raise ValueError(f"{path}: segments_info holds id {segment['id']}; expected 1..{2**24 - 1}")
            if segment["category_id"] not in self._class_of:
                raise ValueError(f"{path}: segment {segment['id']} is of the unknown category {segment['category_id']}")
            ids.append(segment["id"])
        if len(set(ids)) < len(ids):
            raise ValueError(f"{path}: segments_info lists an id twice")
        return segments


def _decode_ids(path: Path) -> np.ndarray:
    """``(H, W)`` int32 segment ids, R + 256 G + 65536 B."""
    with Image.open(path) as image:
        if image.mode not in ("RGB", "RGBA"):
            raise ValueError(f"ids in a picture of mode {image.mode}; expected RGB")
        colours = np.array(image)[..., :3].astype(np.int32)
    return colours[..., 0] + 256 * colours[..., 1] + 65536 * colours[..., 2]
