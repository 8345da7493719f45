"""Data sets of images and their truth in files."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastmask.data.pictures import decode_picture
from fastmask.data.sample import Sample, SegmentationDataset
from fastmask.data.tasks import segment_dtype

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
LABEL_MODES = ("L", "P", "1", "I", "I;16", "I;16L", "I;16B")
MAX_LABEL = 2**16 - 1  # pictures of 32 bits may hold more, for which no table has room
INVALID = -2  # in a table of classes: values that a label map must not hold
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
Size = tuple[int, int]
T = TypeVar("T")


class Entry(NamedTuple):
    """One image and the file of its truth."""

    name: str
    image: Path
    truth: Path


class FileDataset(SegmentationDataset):
    """A data set that reads an image and its truth from files; what layouts have in common.

    Attributes:
        entries: its files.
    """

    entries: Sequence[Entry]

    def __init__(self, split: str, entries: Sequence[Entry], set_faults: Sequence[str] = ()):
        self.split = split
        self.entries = entries
        self._set_faults = list(set_faults)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Sample:
        """Sample ``index``.

        Raises:
            IndexError: no such sample.
            ValueError: its files are broken; the message names them.
        """
        image, truth = self.read_image(index), self.read_truth(index)
        fault = self._size_fault(index, _size(image), truth_size(truth))
        if fault:
            raise ValueError(fault)
        return Sample(image, name=self.entries[index].name, **truth)

    def read_image(self, index: int) -> Tensor:
        """``(3, H, W)`` uint8. Not turned by an EXIF orientation, because truths are drawn on the stored pixels."""
        return reading(self.entries[index].image, decode_picture)

    def read_truth(self, index: int) -> dict[str, Tensor]:
        """The fields of a sample that hold its truth."""
        raise NotImplementedError

    def truth_header(self, index: int) -> Size:
        """(H, W) of the truth, without decoding it; raises ValueError where the annotation is wrong in itself."""
        return reading(self.entries[index].truth, _header_size)

    def faults(self, index: int, full: bool) -> list[str]:
        def truth() -> Size:
            size = self.truth_header(index)
            return truth_size(self.read_truth(index)) if full else size

        def image() -> Size:
            return _size(self.read_image(index)) if full else reading(self.entries[index].image, _header_size)

        sizes, faults = zip(*map(_attempt, (image, truth)), strict=True)
        found = [fault for fault in faults if fault]
        if None not in sizes and (fault := self._size_fault(index, *sizes)):
            found.append(fault)
        return found

    def set_faults(self) -> list[str]:
        return self._set_faults

    def _size_fault(self, index: int, image: Size, truth: Size) -> str | None:
        if image == truth:
            return None
        entry = self.entries[index]
        return f"{entry.image}: {image[0]} x {image[1]} pixels, but {entry.truth} has {truth[0]} x {truth[1]}"


class LabelMapDataset(FileDataset):
    """Semantic segmentation from label maps.

    Args:
        split, entries, set_faults: as for :class:`FileDataset`.
        classes: the class of each value of a label map, -1 for void, ``INVALID`` for values that must not occur, as all
            beyond the table.
    """

    def __init__(self, split: str, entries: Sequence[Entry], set_faults: Sequence[str], classes: np.ndarray):
        super().__init__(split, entries, set_faults)
        self._classes = classes

    def read_truth(self, index: int) -> dict[str, Tensor]:
        path = self.entries[index].truth
        values = read_labels(path)
        histogram = np.bincount(values.ravel(), minlength=len(self._classes))
        classes = np.full(len(histogram), INVALID, np.int64)
        classes[: len(self._classes)] = self._classes
        wrong = ((histogram > 0) & (classes == INVALID)).nonzero()[0]
        if wrong.size:
            shown = ", ".join(map(str, wrong[:5])) + (", ..." if wrong.size > 5 else "")
            raise ValueError(f"{path}: label {shown} at {histogram[wrong].sum()} pixels; {self._expected()}")
        labels = np.unique(classes[(histogram > 0) & (classes >= 0)])
        segments = np.where(classes >= 0, np.searchsorted(labels, classes), -1)
        dtype = np.int16 if segment_dtype(len(labels)) == torch.int16 else np.int32
        return {"labels": torch.from_numpy(labels), "segments": torch.from_numpy(segments.astype(dtype)[values])}

    def _expected(self) -> str:
        known = (self._classes != INVALID).nonzero()[0]
        runs = np.split(known, (np.diff(known) > 1).nonzero()[0] + 1)
        return "expected " + ", ".join(f"{run[0]}..{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _attempt(read: Callable[[], Size]) -> tuple[Size | None, str | None]:
    """What ``read`` returns, or what it complains about."""
    try:
        return read(), None
    except ValueError as error:
        return None, str(error)


def reading(path: Path, read: Callable[[Path], T]) -> T:
    """``read(path)``, whose errors become a ValueError that names the file."""
    try:
        return read(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: missing") from None
    except UNREADABLE as error:
        message = str(error).replace(f" {str(path)!r}", "")
        raise ValueError(f"{path}: {message}") from error


def read_labels(path: Path) -> np.ndarray:
    """``(H, W)`` non-negative integers of a label map of one channel, as stored: a palette is not applied."""
    return reading(path, _decode_labels)


def _decode_labels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        if image.mode not in LABEL_MODES:
            raise ValueError(f"a label map of mode {image.mode}; expected one channel of integers")
        values = np.array(image)
    if values.dtype == bool:
        return values.astype(np.uint8)
    outside = values[(values < 0) | (values > MAX_LABEL)] if values.dtype.kind == "i" else values[:0]
    if outside.size:
        raise ValueError(f"label {outside.flat[0]} at {outside.size} pixels; expected 0..{MAX_LABEL}")
    return values


def _header_size(path: Path) -> Size:
    with Image.open(path) as image:
        return image.height, image.width


def _size(tensor: Tensor) -> Size:
    return tensor.shape[-2], tensor.shape[-1]


def truth_size(truth: Mapping[str, Any]) -> Size:
    """(H, W) of a truth's segment map or masks."""
    return _size(truth["segments"] if "segments" in truth else truth["masks"])


def list_files(folder: Path, suffixes: Iterable[str], ending: str = "") -> dict[str, Path]:
    """The files below a folder, by their path within it less suffix and ``ending``; others are left out.

    Raises:
        ValueError: two files have one name.
    """
    suffixes = tuple(suffixes)
    found: dict[str, Path] = {}
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if not name.endswith(ending):
            continue
        other = found.setdefault(name.removesuffix(ending), path)
        if other is not path:
            raise ValueError(f"{other} and {path} have the same name; expected one file for each")
    return found


def paired(images: Mapping[str, Path], truths: Mapping[str, Path]) -> tuple[list[Entry], list[str]]:
    """Images and truths of the same name, and a fault for each that has no partner."""
    entries = [Entry(name, image, truths[name]) for name, image in images.items() if name in truths]
    faults = [f"{path}: no label map for this image" for name, path in images.items() if name not in truths]
    faults += [f"{path}: no image for this label map" for name, path in truths.items() if name not in images]
    return entries, faults


def folder_of(split: str, candidates: Iterable[Path]) -> Path:
    """The first folder that is there."""
    candidates = list(candidates)
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"split {split!r} has no folder {' or '.join(map(str, candidates))}")


def only_semantic(task: str | None, kind: str) -> None:
    if task not in (None, "semantic"):
        raise ValueError(f"task={task!r}: {kind} has truth for semantic segmentation only")
