"""Data sets whose images and truth are files."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastmask.data.derived_truth import segment_dtype
from fastmask.data.pictures import decode_picture, picture_size
from fastmask.data.sample import Findings, Sample, SegmentationDataset

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
LABEL_MODES = ("L", "P", "1", "I", "I;16", "I;16L", "I;16B")
MAX_LABEL = 2**16 - 1  # the greatest label in a table of classes; pictures of 32 bits may hold greater values
WHITE = 255  # the foreground of a mask stored as a black and white picture
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
    """Base class of data sets that read each image and its truth from files.

    Samples leave out annotations that draw no pixel, as the papers' data mappers do.

    Attributes:
        entries: the files.
        truth_is_picture: a picture holds the truth; otherwise an annotation states its size, which may be wrong.
    """

    entries: Sequence[Entry]
    truth_is_picture = True

    def __init__(self, split: str, entries: Sequence[Entry], set_faults: Sequence[str] = ()):
        self.split = split
        self.entries = entries
        self._set_faults = list(set_faults)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Sample:
        """Sample ``index``.

        Raises:
            IndexError: there is no such sample.
            ValueError: its files are broken; the message names them.
        """
        image = self.read_image(index)
        faults = self.annotation_faults(index)
        if faults:
            raise ValueError("\n".join(faults))
        truth = self.read_truth(index)
        if _size(image) != truth_size(truth):
            raise ValueError(self._size_fault(index, _size(image), truth_size(truth)))
        return self.as_task(self._sample(index, image, truth).without_empty())

    def read_image(self, index: int) -> Tensor:
        """The image, ``(3, H, W)`` uint8, upright."""
        return reading(self.entries[index].image, decode_picture)

    def read_truth(self, index: int) -> dict[str, Tensor]:
        """The fields of a sample that hold its truth; called only if ``annotation_faults`` finds nothing."""
        raise NotImplementedError

    def as_task(self, sample: Sample) -> Sample:
        """Converts the sample to the task for which the data set was opened."""
        return sample

    def annotation_faults(self, index: int) -> list[str]:
        """The faults of the annotation itself, without its picture."""
        return []

    def truth_header(self, index: int) -> Size:
        """(H, W) of the truth, without decoding it."""
        return reading(self.entries[index].truth, _header_size)

    def inspect(self, index: int, full: bool) -> Findings:
        picture = self.entries[index].image
        faults = self.annotation_faults(index)
        readable = not faults
        image: Tensor | None = None
        if full:
            image = _attempt(lambda: self.read_image(index), faults)
            size = None if image is None else _size(image)
        else:
            size = _attempt(lambda: reading(picture, picture_size), faults)
        header = _attempt(lambda: self.truth_header(index), faults)
        if not full and size is not None and header is not None and size != header:
            # The header may lack the picture's orientation.
            size = _attempt(lambda: _size(self.read_image(index)), faults)
        if size is not None and header is not None and size != header:
            faults.append(self._size_fault(index, size, header))
        if not full or not readable or header is None or not (size == header or self.truth_is_picture):
            return Findings(tuple(faults))
        truth = _attempt(lambda: self.read_truth(index), faults)
        if faults or image is None or truth is None:
            return Findings(tuple(faults))
        sample = self._sample(index, image, truth)
        kept = sample.without_empty()
        pixels = self.as_task(kept).pixels_of_classes(self.info.num_classes)
        return Findings(pixels=pixels, empty=len(sample.labels) - len(kept.labels))

    def set_faults(self) -> list[str]:
        return self._set_faults

    def _sample(self, index: int, image: Tensor, truth: Mapping[str, Tensor]) -> Sample:
        return Sample(image, name=self.entries[index].name, **truth)

    def _size_fault(self, index: int, image: Size, truth: Size) -> str:
        entry = self.entries[index]
        fault = f"{entry.image}: {image[0]} x {image[1]} pixels, but {entry.truth} has {truth[0]} x {truth[1]}"
        if image == truth[::-1] and reading(entry.image, _header_size) != reading(entry.image, picture_size):
            fault += "; EXIF turns this image, and its truth must be drawn on the upright image"
        return fault


class LabelMapDataset(FileDataset):
    """Semantic segmentation from label maps.

    Args:
        split, entries, set_faults: as for :class:`FileDataset`.
        classes: as for :func:`label_truth`.
    """

    def __init__(self, split: str, entries: Sequence[Entry], set_faults: Sequence[str], classes: np.ndarray):
        super().__init__(split, entries, set_faults)
        self._classes = classes

    def read_truth(self, index: int) -> dict[str, Tensor]:
        return reading(self.entries[index].truth, lambda path: label_truth(decode_labels(path), self._classes))

    def likely_cause(self, pixels: Tensor) -> str:
        white = self._classes[WHITE] if len(self._classes) > WHITE else INVALID
        found = pixels > 0
        if (self._classes[0], white) != (0, -1) or not found[0] or not found[-1] or found[1:-1].any():
            return ""
        return (
            f"only 0 ({self.info.class_names[0]}) and void occur, as in masks of 0 and {WHITE}; here {WHITE} is void, "
            "and the second class is 1"
        )


def label_truth(values: np.ndarray, classes: np.ndarray) -> dict[str, Tensor]:
    """The labels and segments of a sample from a label map.

    Args:
        values: ``(H, W)`` non-negative integers.
        classes: the class of each value, -1 for void, ``INVALID`` for values that must not occur; values beyond the
            end of the table must not occur, either.

    Raises:
        ValueError: a value that must not occur.
    """
    histogram = np.bincount(values.ravel(), minlength=len(classes))
    table = np.full(len(histogram), INVALID, np.int64)
    table[: len(classes)] = classes
    wrong = ((histogram > 0) & (table == INVALID)).nonzero()[0]
    if wrong.size:
        shown = ", ".join(map(str, wrong[:5])) + (", ..." if wrong.size > 5 else "")
        known = (classes != INVALID).nonzero()[0]
        runs = np.split(known, (np.diff(known) > 1).nonzero()[0] + 1)
        expected = ", ".join(f"{run[0]}..{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
        raise ValueError(f"label {shown} at {histogram[wrong].sum()} pixels; expected {expected}")
    labels = np.unique(table[(histogram > 0) & (table >= 0)])
    segments = np.where(table >= 0, np.searchsorted(labels, table), -1)
    dtype = np.int16 if segment_dtype(len(labels)) == torch.int16 else np.int32
    return {"labels": torch.from_numpy(labels), "segments": torch.from_numpy(segments.astype(dtype)[values])}


def _attempt(read: Callable[[], T], faults: list[str]) -> T | None:
    """The result of ``read``; if it raises a ValueError, appends its message to ``faults`` and returns None."""
    try:
        return read()
    except ValueError as error:
        faults.append(str(error))
        return None


def reading(path: Path, read: Callable[[Path], T]) -> T:
    """``read(path)``; turns its errors into a ValueError that names the file."""
    try:
        return read(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: missing") from None
    except UNREADABLE as error:
        message = str(error).replace(f" {str(path)!r}", "")
        raise ValueError(f"{path}: {message}") from error


def read_labels(path: Path) -> np.ndarray:
    """The values ``(H, W)`` of a label map with one channel, non-negative integers; a palette is not applied."""
    return reading(path, decode_labels)


def decode_labels(file: Path | BinaryIO) -> np.ndarray:
    """Like :func:`read_labels`, with errors that do not name the file."""
    with Image.open(file) as image:
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


def files_below(folder: Path, suffixes: Collection[str], excluded: Collection[Path] = ()) -> Iterator[Path]:
    """The files of a folder at any depth, unordered. Hidden files and folders, which begin with a dot, are left out.

    Args:
        folder: the folder to search.
        suffixes: the suffixes to find, in lower case.
        excluded: resolved paths of folders to leave out.
    """
    for parent, folders, names in os.walk(folder):
        place = Path(parent)
        folders[:] = [name for name in folders if not name.startswith(".")]
        if excluded:
            folders[:] = [name for name in folders if (place / name).resolve() not in excluded]
        for name in names:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in suffixes:
                yield place / name


def list_files(folder: Path, suffixes: Collection[str], ending: str = "") -> dict[str, Path]:
    """The :func:`files_below` a folder whose names end with ``ending`` and a suffix. The keys are their paths in the
    folder without both.

    Raises:
        ValueError: two files have the same name.
    """
    found: dict[str, Path] = {}
    for path in sorted(files_below(folder, suffixes)):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if not name.endswith(ending):
            continue
        other = found.setdefault(name.removesuffix(ending), path)
        if other is not path:
            raise ValueError(f"{other} and {path} have the same name; expected one file for each")
    return found


def paired(images: Mapping[str, Path], truths: Mapping[str, Path]) -> tuple[list[Entry], list[str]]:
    """Pairs images and truths by name; returns the pairs, and a fault for each file without a partner."""
    entries = [Entry(name, image, truths[name]) for name, image in images.items() if name in truths]
    faults = [f"{path}: no label map for this image" for name, path in images.items() if name not in truths]
    faults += [f"{path}: no image for this label map" for name, path in truths.items() if name not in images]
    return entries, faults


def folder_of(split: str, candidates: Iterable[Path]) -> Path:
    """The first of the folders that exists."""
    return _first(split, "folder", candidates, Path.is_dir)


def file_of(split: str, candidates: Iterable[Path]) -> Path:
    """The first of the files that exists."""
    return _first(split, "file", candidates, Path.is_file)


def _first(split: str, kind: str, candidates: Iterable[Path], exists: Callable[[Path], bool]) -> Path:
    tried = list(candidates)
    found = next(filter(exists, tried), None)
    if found is None:
        raise FileNotFoundError(f"split {split!r} has no {kind} {' or '.join(map(str, tried))}")
    return found


def only_semantic(task: str | None, kind: str) -> None:
    """Raises a ValueError for a task other than "semantic"."""
    if task not in (None, "semantic"):
        raise ValueError(f"task={task!r}: {kind} has truth for semantic segmentation only")
