"""Samples of data sets, the description of their classes, and batches for the models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from fastmask.targets import PADDING_LABEL, Targets

TASKS = ("semantic", "panoptic", "instance")
VOID = -1  # the void value of a sample's segment map


class Sample(NamedTuple):
    """One image and its truth, either as a segment map or as masks that may overlap.

    Attributes:
        image: ``(3, H, W)`` uint8, RGB.
        labels: ``(M,)`` int64, the class of each segment, an index into the data set's ``info.class_names``.
        segments: ``(H, W)`` int16 (int32 beyond 32767 segments), the index ``0..M-1`` of the segment that owns the
            pixel; -1 is void. None if ``masks`` is given.
        masks: ``(M, H, W)`` bool, for instances, which may overlap; pixels without a mask are background.
        crowd: ``(M,)`` bool, True for a region of several things that the annotation does not separate. It is not a
            training target (its pixels become void), and predictions inside it are not errors. None if there is none.
        areas: ``(M,)`` float32, the areas in pixels that the annotation states, by which COCO's AP sorts objects into
            small, medium and large. None if it states none, or if the image was resized or cropped.
        name: the unique name of the image in its data set: its path in the folder of images, without the suffix unless
            two images would then share a name.
    """

    image: Tensor
    labels: Tensor
    segments: Tensor | None = None
    masks: Tensor | None = None
    crowd: Tensor | None = None
    areas: Tensor | None = None
    name: str = ""

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return self.image.shape[-2], self.image.shape[-1]

    def class_map(self, ignore_index: int = 255) -> Tensor:
        """``(H, W)`` int64, the class of each pixel; ``ignore_index`` for void.

        Raises:
            ValueError: the sample has masks instead of a segment map.
        """
        if self.segments is None:
            raise ValueError(f"{self.name}: instances have no class map; open the data set for another task")
        # Void pixels, -1, read the last entry.
        return torch.cat([self.labels, self.labels.new_tensor([ignore_index])])[self.segments.long()]

    def pixels_of_segments(self) -> Tensor:
        """``(M,)`` int64, the number of pixels of each segment or mask."""
        if self.segments is None:
            return self._own_masks().flatten(1).sum(1)
        return torch.bincount(self.segments.flatten() - VOID, minlength=len(self.labels) + 1)[1:]

    def pixels_of_classes(self, num_classes: int) -> Tensor:
        """``(K+1,)`` int64, the number of pixels of each class and, last, of void (0 if ``masks`` is given)."""
        pixels = self.labels.new_zeros(num_classes + 1).index_add_(0, self.labels, self.pixels_of_segments())
        if self.segments is not None:
            pixels[num_classes] = self.segments.numel() - pixels.sum()
        return pixels

    def without_empty(self) -> Sample:
        """The sample without those segments or masks that have no pixel."""
        kept = self.pixels_of_segments() > 0
        if kept.all():
            return self
        crowd, areas = (None if values is None else values[kept] for values in (self.crowd, self.areas))
        sample = self._replace(labels=self.labels[kept], crowd=crowd, areas=areas)
        if self.segments is None:
            return sample._replace(masks=self._own_masks()[kept])
        index = torch.where(kept, kept.cumsum(0) - 1, VOID)
        index = torch.cat([index, index.new_tensor([VOID])]).to(self.segments.dtype)
        return sample._replace(segments=index[self.segments.long()])

    def _own_masks(self) -> Tensor:
        if self.masks is None:
            raise ValueError(f"{self.name}: expected segments or masks")
        return self.masks


class Findings(NamedTuple):
    """The result of inspecting the files of a sample.

    Attributes:
        faults: the faults found, each with the file's name.
        pixels: ``(K+1,)`` int64, the number of pixels of each class and, last, of void; None if not counted.
        empty: the number of annotations that draw no pixel and are left out.
    """

    faults: tuple[str, ...] = ()
    pixels: Tensor | None = None
    empty: int = 0


@dataclass(frozen=True)
class DatasetInfo:
    """The classes of a data set, and the task for which it is opened.

    Args:
        class_names: the names of the classes 0..K-1.
        task: "semantic" (a segment for each class in an image), "panoptic" (a segment for each thing, and one for each
            stuff class) or "instance" (a mask for each thing; all classes are things).
        stuff_classes: the indices of stuff classes; the others are things.
        palette: an RGB color, 0..255, for each class, or None.
        ignore_index: the value of void pixels in class maps, outside 0..K-1.
        category_ids: the id of each class in the data set's own files and tools, or None.
    """

    class_names: tuple[str, ...]
    task: str = "semantic"
    stuff_classes: tuple[int, ...] = ()
    palette: tuple[tuple[int, int, int], ...] | None = None
    ignore_index: int = 255
    category_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task={self.task!r} is unknown; expected one of {', '.join(TASKS)}")
        for name in ("palette", "category_ids"):
            value = getattr(self, name)
            if value is not None and len(value) != self.num_classes:
                raise ValueError(f"{name} has {len(value)} entries; expected {self.num_classes}, one for each class")
        if 0 <= self.ignore_index < self.num_classes:
            raise ValueError(f"ignore_index={self.ignore_index} is also one of the {self.num_classes} classes")
        for label in self.stuff_classes:
            if not 0 <= label < self.num_classes:
                raise ValueError(f"stuff_classes holds {label}; expected 0..{self.num_classes - 1}")

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.class_names)

    @property
    def thing_classes(self) -> tuple[int, ...]:
        """Indices of the classes that are things."""
        return tuple(label for label in range(self.num_classes) if label not in self.stuff_classes)


class SegmentationDataset(Dataset[Sample]):
    """A data set of :class:`Sample`, described by ``info``.

    Attributes:
        info: its classes and its task.
        split: the split's name, such as "train" or "val".
    """

    info: DatasetInfo
    split: str

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Sample:
        raise NotImplementedError

    def inspect(self, index: int, full: bool) -> Findings:
        """Inspects the files of sample ``index``; see ``check_dataset``.

        Args:
            index: 0..len-1.
            full: decode image and truth, rather than read only their headers.
        """
        return Findings()

    def set_faults(self) -> list[str]:
        """The faults of the set as a whole, such as files without a partner."""
        return []

    def likely_cause(self, pixels: Tensor) -> str:
        """A sentence that says why classes may have no pixel, or "".

        Args:
            pixels: ``(K+1,)``, pixels of the whole set, as in :class:`Findings`.
        """
        return ""


def collate(samples: Sequence[Sample]) -> tuple[Tensor | list[Tensor], Targets]:
    """Batches samples for the models: the ``collate_fn`` of a ``DataLoader``.

    Crowd regions are not targets; their pixels become void unless a target also owns them.

    Returns:
        images: ``(B, 3, H, W)`` float32 in 0..1, or a list of ``(3, H_b, W_b)`` if sizes differ.
        targets: the targets, of the images' largest height and width; pixels beyond a smaller image are void.

    Raises:
        ValueError: there are no samples, or some have segment maps and others masks.
    """
    if len(samples) == 0:
        raise ValueError("samples is empty; expected at least one")
    pictures = [sample.image.float().div_(255) for sample in samples]
    sizes = [sample.size for sample in samples]
    images: Tensor | list[Tensor] = torch.stack(pictures) if len(set(sizes)) == 1 else pictures
    kept = [torch.ones_like(s.labels, dtype=torch.bool) if s.crowd is None else ~s.crowd for s in samples]
    labels = pad_sequence(
        [sample.labels[keep] for sample, keep in zip(samples, kept, strict=True)],
        batch_first=True,
        padding_value=PADDING_LABEL,
    )
    counts = (labels >= 0).sum(1)
    size = max(height for height, _ in sizes), max(width for _, width in sizes)
    if all(sample.segments is not None for sample in samples):
        dtype, void = (torch.uint8, 255) if labels.shape[1] <= 254 else (torch.int32, VOID)
        planes = [
            _target_map(sample.segments, keep, dtype, void)
            for sample, keep in zip(samples, kept, strict=True)
            if sample.segments is not None
        ]
        segments = torch.stack([_padded(plane, size, void) for plane in planes])
        return images, Targets(labels, counts, segments=segments, void=void)
    masks = torch.zeros((len(samples), labels.shape[1], *size), dtype=torch.uint8)
    valid = torch.zeros((len(samples), *size), dtype=torch.bool)
    for b, (sample, keep) in enumerate(zip(samples, kept, strict=True)):
        height, width = sample.size
        if sample.masks is None:
            raise ValueError("samples holds segment maps beside masks; expected one form")
        own = sample.masks[keep]
        masks[b, : len(own), :height, :width] = own
        valid[b, :height, :width] = own.any(0) | ~sample.masks[~keep].any(0)
    return images, Targets(labels, counts, masks=masks, valid=None if valid.all() else valid)


def _target_map(segments: Tensor, keep: Tensor, dtype: torch.dtype, void: int) -> Tensor:
    """``(H, W)``, the index of each pixel's segment among the kept segments; ``void`` elsewhere."""
    lookup = torch.where(keep, keep.cumsum(0) - 1, void)
    return torch.cat([lookup, lookup.new_tensor([void])]).to(dtype)[segments.long()]


def _padded(plane: Tensor, size: tuple[int, int], value: int) -> Tensor:
    return pad(plane, (0, size[1] - plane.shape[1], 0, size[0] - plane.shape[0]), value=value)
