"""One door to every data set: finds out which layout a folder has."""

from __future__ import annotations

from pathlib import Path

from fastmask.data import ade20k, cityscapes, coco_instances, coco_panoptic, coco_stuff, folder
from fastmask.data.composed.dataset import SceneDataset
from fastmask.data.sample import TASKS, SegmentationDataset

COMPOSED_SCENES = "composed:scenes"
# How each layout is recognised and opened, and the tasks that it serves.
LAYOUTS = {
    "folder": (folder.matches, folder.open_folder, ("semantic",)),
    "cityscapes": (cityscapes.matches, cityscapes.open_cityscapes, TASKS),
    "ade20k": (ade20k.matches, ade20k.open_ade20k, ("semantic",)),
    "coco-panoptic": (coco_panoptic.matches, coco_panoptic.CocoPanoptic, TASKS),
    "coco-instances": (coco_instances.matches, coco_instances.CocoInstances, ("instance",)),
    "coco-stuff": (coco_stuff.matches, coco_stuff.open_coco_stuff, ("semantic",)),
}


def open_dataset(path: str | Path, split: str, kind: str = "auto", task: str | None = None) -> SegmentationDataset:
    """The data set at a path.

    Args:
        path: its folder, or "composed:scenes" for the scenes that come with the package.
        split: "train", "val", or another that the data set has.
        kind: its layout, one of "folder", "cityscapes", "ade20k", "coco-panoptic", "coco-instances" and "coco-stuff";
            "auto" finds it out. Where a folder of COCO has several at once, a layout made for the task comes first, and
            without a task the first of this list.
        task: "semantic", "panoptic" or "instance"; the data set's own by default. Panoptic truth serves all three.

    Raises:
        FileNotFoundError: no such folder, no such split in it, or nothing in the split.
        ValueError: an unknown kind, layout or task, a task that the data set has no truth for, or a JSON file that
            cannot be read.
    """
    if task not in (None, *TASKS):
        raise ValueError(f"task={task!r} is unknown; expected one of {', '.join(TASKS)}")
    if str(path) == COMPOSED_SCENES:
        return SceneDataset(split, task=task)
    root = Path(path)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is no folder")
    if kind == "auto":
        kind = _layout_of(root, task)
    if kind not in LAYOUTS:
        raise ValueError(f"kind={kind!r} is unknown; expected auto or one of {', '.join(LAYOUTS)}")
    dataset = LAYOUTS[kind][1](root, split, task)
    if len(dataset) == 0 and not dataset.set_faults():
        raise FileNotFoundError(f"{root}: nothing in split {split!r} of layout {kind}")
    return dataset


def _layout_of(root: Path, task: str | None) -> str:
    found = [kind for kind, (matches, _, _) in LAYOUTS.items() if matches(root)]
    if not found:
        raise ValueError(f"{root} has no layout that is known; expected one of {', '.join(LAYOUTS)}")
    serving = [kind for kind in found if task in LAYOUTS[kind][2]]
    return min(serving, key=lambda kind: len(LAYOUTS[kind][2])) if serving else found[0]
