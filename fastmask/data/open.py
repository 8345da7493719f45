"""Opens data sets of all kinds; recognizes the layout of a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fastmask.data import ade20k, cityscapes, coco_instances, coco_panoptic, coco_stuff, folder
from fastmask.data.composed.dataset import SceneDataset
from fastmask.data.composed.icon_classes import ICON_CLASSES
from fastmask.data.sample import TASKS, SegmentationDataset
from fastmask.data.shards import ShardDataset, is_pattern

COMPOSED = "composed:"
COMPOSED_SCENES = f"{COMPOSED}scenes"
COMPOSED_ICONS = f"{COMPOSED}icons-"  # followed by the number of classes


class Layout(NamedTuple):
    """A layout of folders.

    Attributes:
        matches: whether a folder has it.
        evidence: the files or folders by which it is recognized.
        open: opens a split of a folder for a task.
        tasks: the tasks for which it has truth.
        has_polygons: whether ``open`` takes ``skip_invalid``.
    """

    matches: Callable[[Path], bool]
    evidence: str
    open: Callable[..., SegmentationDataset]
    tasks: tuple[str, ...] = ("semantic",)
    has_polygons: bool = False


LAYOUTS = {
    "folder": Layout(folder.matches, "classes.json", folder.open_folder),
    "cityscapes": Layout(cityscapes.matches, "leftImg8bit and gtFine", cityscapes.open_cityscapes, TASKS),
    "ade20k": Layout(ade20k.matches, "annotations/training or annotations/validation", ade20k.open_ade20k),
    "ade20k-panoptic": Layout(
        ade20k.matches_panoptic, "ade20k_panoptic_SPLIT.json", ade20k.open_ade20k_panoptic, TASKS
    ),
    "coco-panoptic": Layout(
        coco_panoptic.matches,
        "panoptic_SPLIT2017.json or panoptic_SPLIT.json, in annotations or beside it",
        coco_panoptic.open_coco_panoptic,
        TASKS,
    ),
    "coco-instances": Layout(
        coco_instances.matches,
        "annotations/instances_SPLIT2017.json, annotations/instances_SPLIT.json or annotations/SPLIT.json",
        coco_instances.CocoInstances,
        ("instance",),
        has_polygons=True,
    ),
    "coco-stuff": Layout(
        coco_stuff.matches,
        "label maps in stuffthingmaps, annotations/SPLIT2017, annotations/SPLIT2014 or annotations_detectron2",
        coco_stuff.open_coco_stuff,
    ),
}


def open_dataset(
    path: str | Path, split: str, kind: str = "auto", task: str | None = None, *, skip_invalid: bool = False
) -> SegmentationDataset:
    """Opens the data set at a path.

    Files and folders whose names begin with a dot are ignored. Images are rotated as their EXIF orientation says; label
    maps have no orientation.

    Args:
        path: the data set's folder; or a pattern of shards, as for :class:`fastmask.data.ShardDataset`; or
            "composed:scenes" for the scenes that come with the package; or "composed:icons-K" for those with icons of K
            classes, 1..150, in place of garments.
        split: "train", "val", or another split of the data set.
        kind: the layout of the folder, one of "folder", "cityscapes", "ade20k", "ade20k-panoptic", "coco-panoptic",
            "coco-instances" and "coco-stuff"; "auto" recognizes it. If a folder of ADE20K or COCO has several layouts,
            "auto" takes one made for the task or, without a task, the first in this list.
        task: "semantic", "panoptic" or "instance"; by default the data set's own. Panoptic truth serves all three.
        skip_invalid: for "coco-instances": leave out invalid polygons, with a warning that counts them, instead of
            reporting them as faults.

    Raises:
        FileNotFoundError: the folder, shard or split does not exist, or the split is empty.
        ImportError: the layout needs a package that is missing; the message names the extra that installs it.
        ValueError: an unknown kind, layout or task, a task for which the data set has no truth, ``skip_invalid`` for a
            layout without polygons, or a JSON file that cannot be read.
    """
    if task not in (None, *TASKS):
        raise ValueError(f"task={task!r} is unknown; expected one of {', '.join(TASKS)}")
    if is_composed(path):
        if skip_invalid:
            raise ValueError(f"skip_invalid: {path} has no polygons")
        return SceneDataset(split, task=task, icons=number_of_icons(str(path)))
    if is_pattern(path):
        if skip_invalid:
            raise ValueError(f"skip_invalid: shards ({path}) have no polygons")
        return ShardDataset(path, split, task)
    root = Path(path)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder")
    if kind == "auto":
        kind = _layout_of(root, task)
    if kind not in LAYOUTS:
        raise ValueError(f"kind={kind!r} is unknown; expected auto or one of {', '.join(LAYOUTS)}")
    if skip_invalid and not LAYOUTS[kind].has_polygons:
        raise ValueError(f"skip_invalid: the layout {kind} of {root} has no polygons")
    options = {"skip_invalid": True} if skip_invalid else {}
    dataset = LAYOUTS[kind].open(root, split, task, **options)
    if len(dataset) == 0 and not dataset.set_faults():
        raise FileNotFoundError(f"{root}: nothing in split {split!r} of layout {kind}")
    return dataset


def is_composed(path: str | Path) -> bool:
    """Whether it names scenes that come with the package, not a folder."""
    return str(path).startswith(COMPOSED)


def number_of_icons(name: str) -> int:
    """The number of classes of icons in the scenes of this name, 0 for garments."""
    if name == COMPOSED_SCENES:
        return 0
    number = name.removeprefix(COMPOSED_ICONS)
    if not number.isdecimal() or not 1 <= int(number) <= len(ICON_CLASSES):
        raise ValueError(
            f"{name} is unknown; expected {COMPOSED_SCENES}, or {COMPOSED_ICONS}K with K in 1..{len(ICON_CLASSES)}"
        )
    return int(number)


def _layout_of(root: Path, task: str | None) -> str:
    found = [kind for kind, layout in LAYOUTS.items() if layout.matches(root)]
    if not found:
        tried = "; ".join(f"{kind} ({layout.evidence})" for kind, layout in LAYOUTS.items())
        raise ValueError(f"{root} has no known layout; expected one of {tried}")
    serving = [kind for kind in found if task in LAYOUTS[kind].tasks]
    return min(serving, key=lambda kind: len(LAYOUTS[kind].tasks)) if serving else found[0]
