"""One door to every data set: finds out which layout a folder has."""

from __future__ import annotations

from pathlib import Path

from fastmask.data.composed.dataset import SceneDataset
from fastmask.data.sample import SegmentationDataset

COMPOSED_SCENES = "composed:scenes"


def open_dataset(path: str | Path, split: str, kind: str = "auto", task: str | None = None) -> SegmentationDataset:
    """The data set at a path.

    Args:
        path: its folder, or "composed:scenes" for the scenes that come with the package.
        split: "train", "val", or another that the data set has.
        kind: its layout; "auto" finds it out.
        task: "semantic", "panoptic" or "instance"; the data set's own by default. Panoptic truth serves all three.

    Raises:
        FileNotFoundError: no such folder, or no such split in it.
        ValueError: an unknown kind or layout, or a task that the data set has no truth for.
    """
    if str(path) == COMPOSED_SCENES:
        return SceneDataset(split, task=task)
    raise ValueError(f"{path} has no known layout")
