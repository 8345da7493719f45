"""The data set of composed scenes and its batches."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastmask.data.composed.classes import STUFF_CLASSES, THING_CLASSES
from fastmask.data.composed.icon_classes import ICON_CLASSES
from fastmask.data.composed.library import SPLITS, load_library
from fastmask.data.composed.plan import Draws, ScenePlan, plan_scene
from fastmask.data.composed.render import VOID, render_scene
from fastmask.targets import Targets

DEFAULT_LENGTHS = {"train": 4096, "val": 512}
MIN_SIZE = 32


class Scene(NamedTuple):
    """One picture and its exact panoptic truth.

    Attributes:
        image: ``(3, H, W)`` float32 in 0..1.
        segments: ``(H, W)`` uint8, the index ``0..M-1`` of the segment that owns the pixel; 255 is void.
        labels: ``(M,)`` int64, the class of each segment: 0..9 are garments, 10..12 textures; or, with K icons, 0..K-1
            are icons. Each thing is one segment, from back to front; the textures follow, one segment each.
    """

    image: Tensor
    segments: Tensor
    labels: Tensor


class ComposedScenes(Dataset[Scene]):
    """Garments of Fashion-MNIST, or icons, over brick, grass and gravel, composed from real pixels.

    Scene ``i`` depends only on ``split``, ``seed``, ``size``, ``icons`` and ``i``: not on the length, the order in
    which scenes are read, or the process that reads them. The two splits share no garment and no part of a texture; the
    icons of one are by other artists than those of the other. A scene has at most six things, which may hide each other
    and cross the border.

    Args:
        split: ``"train"`` or ``"val"``.
        length: the number of scenes; by default 4096 for train and 512 for val.
        size: (H, W) in pixels, at least 32 each.
        seed: 0..2**64-1; another seed gives other scenes.
        icons: 0 for garments; else 1..150, the number of classes of icons to show in their place, the first of
            ``ICON_CLASSES``.

    Attributes:
        class_names: of things, then of textures.
        stuff_labels: the labels of the textures.

    Raises:
        TypeError: a length, seed or number of icons that is not an integer.
        ValueError: an unknown split, a negative length, a size below 32 pixels, or a seed or a number of icons out of
            range.
        FileNotFoundError: the package was installed without its pictures.
    """

    def __init__(
        self,
        split: str,
        length: int | None = None,
        size: tuple[int, int] = (128, 128),
        seed: int = 0,
        *,
        icons: int = 0,
    ):
        if split not in SPLITS:
            raise ValueError(f'split={split!r} is unknown; expected "train" or "val"')
        length = DEFAULT_LENGTHS[split] if length is None else _integer("length", length)
        if length < 0:
            raise ValueError(f"length must not be negative, got {length}")
        if not 0 <= _integer("seed", seed) < 2**64:
            raise ValueError(f"seed must be in 0..2**64-1, got {seed}")
        if not 0 <= _integer("icons", icons) <= len(ICON_CLASSES):
            raise ValueError(f"icons must be in 0..{len(ICON_CLASSES)}, got {icons}")
        self.split = split
        self.length = length
        self.size = _checked_size(size)
        self.seed = operator.index(seed)
        self.icons = operator.index(icons)
        self.class_names = (ICON_CLASSES[:icons] or THING_CLASSES) + STUFF_CLASSES
        self.stuff_labels = tuple(range(len(self.class_names) - len(STUFF_CLASSES), len(self.class_names)))
        self._library = load_library(split, self.icons)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Scene:
        """Scene ``index``.

        Raises:
            IndexError: ``index`` is not in ``0..length-1``.
            TypeError: ``index`` is not an integer.
        """
        image, segments, labels = render_scene(self._library, self.plan(index))
        # NumPy, because waking PyTorch's thread pool would cost more time than making the scene.
        planes = np.ascontiguousarray(image.transpose(2, 0, 1))
        return Scene(
            torch.from_numpy(np.divide(planes, 255, dtype=np.float32)),
            torch.from_numpy(segments),
            torch.tensor(labels, dtype=torch.int64),
        )

    def plan(self, index: int) -> ScenePlan:
        """The plan of scene ``index``."""
        index = _integer("index", index)
        if not 0 <= index < self.length:
            raise IndexError(f"index {index} is out of range for the {self.length} scenes of split {self.split!r}")
        return plan_scene(self._library, Draws(self.seed, SPLITS.index(self.split), index), self.size)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != "_library"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _library=load_library(state["split"], state["icons"]))


def collate_scenes(scenes: Sequence[Scene]) -> tuple[Tensor, Targets]:
    """Batches scenes of one size: the ``collate_fn`` of a ``DataLoader``.

    Returns:
        images: ``(B, 3, H, W)`` float32.
        targets: segment maps and labels, padded to the largest number of segments.

    Raises:
        ValueError: no scenes, or scenes of different sizes.
    """
    if len(scenes) == 0:
        raise ValueError("scenes is empty; expected at least one")
    sizes = {tuple(scene.segments.shape) for scene in scenes}
    if len(sizes) > 1:
        raise ValueError(f"scenes have different sizes {sorted(sizes)}; expected one size")
    images = torch.stack([scene.image for scene in scenes])
    segments = torch.stack([scene.segments for scene in scenes])
    return images, Targets.from_segments(segments, [scene.labels for scene in scenes], void=VOID)


def _integer(name: str, value: int) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None


def _checked_size(size: tuple[int, int]) -> tuple[int, int]:
    try:
        height, width = map(operator.index, size)
    except (TypeError, ValueError):
        raise ValueError(f"size must be (height, width) in pixels, got {size!r}") from None
    if min(height, width) < MIN_SIZE:
        raise ValueError(f"size must be at least {MIN_SIZE} x {MIN_SIZE} pixels, got {height} x {width}")
    return height, width
