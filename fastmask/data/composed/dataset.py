"""The composed scenes as a data set of samples."""

from __future__ import annotations

import torch

from fastmask.data.composed.classes import CLASS_NAMES, PALETTE
from fastmask.data.composed.render import VOID as SCENE_VOID
from fastmask.data.composed.scenes import ComposedScenes
from fastmask.data.derived_truth import task_view
from fastmask.data.palette import distinct_colors
from fastmask.data.sample import VOID, DatasetInfo, Sample, SegmentationDataset


class SceneDataset(SegmentationDataset):
    """:class:`ComposedScenes` as samples.

    ``open_dataset("composed:scenes", split)`` opens those with garments, ``open_dataset("composed:icons-50", split)``
    those with 50 classes of icons.

    Args:
        split, length, size, seed, icons: as for :class:`ComposedScenes`.
        task: "panoptic" by default, "semantic" or "instance" (things only).
    """

    def __init__(
        self,
        split: str,
        length: int | None = None,
        size: tuple[int, int] = (128, 128),
        seed: int = 0,
        task: str | None = None,
        *,
        icons: int = 0,
    ):
        self.split = split
        self.scenes = ComposedScenes(split, length, size, seed, icons=icons)
        names = self.scenes.class_names
        palette = PALETTE if names == CLASS_NAMES else distinct_colors(len(names))
        self.info, self._as_task = task_view(DatasetInfo(names, "panoptic", self.scenes.stuff_labels, palette), task)

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> Sample:
        image, segments, labels = self.scenes[index]
        segments = torch.where(segments == SCENE_VOID, VOID, segments.to(torch.int16))
        pixels = (image * 255).round_().to(torch.uint8)
        return self._as_task(Sample(pixels, labels, segments, name=f"{self.split}-{int(index):06d}"))
