"""Finds broken files before training starts, all at once."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from torch import Tensor

from fastmask.data.sample import SegmentationDataset


def check_dataset(dataset: SegmentationDataset, *, full: bool = True, workers: int | None = None) -> list[str]:
    """Raises one error that names every broken file of a data set, and tells what its truth holds.

    Found are: an image without its label map or the other way round, files that are missing, empty or cut off, an image
    and a truth of different sizes, labels out of range, fields of an annotation that do not hold what they should, and
    ids that the annotation does not explain.

    Args:
        dataset: from ``open_dataset``.
        full: decode every image and its truth. Otherwise read only the files' headers and the annotation, which finds
            missing files and wrong sizes in a hundredth of the time.
        workers: threads; one for each processor by default.

    Returns:
        What is no fault but good to know before training, a line for a split: the share of void pixels, classes without
        a pixel, with the likely cause if there is one, and how many annotations draw no pixel and are left out. Nothing
        without ``full``, or where the truth has no files.

    Raises:
        ValueError: something is broken; a line for each fault.
    """
    return check_datasets([dataset], full=full, workers=workers)


def check_datasets(
    datasets: Iterable[SegmentationDataset], *, full: bool = True, workers: int | None = None
) -> list[str]:
    """Raises one error that names every broken file of several splits; otherwise as :func:`check_dataset`."""
    problems: list[str] = []
    notes: list[str] = []
    for dataset in datasets:
        faults, pixels, empty = list(dataset.set_faults()), None, 0
        with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
            for found in pool.map(partial(dataset.inspect, full=full), range(len(dataset))):
                faults += found.faults
                empty += found.empty
                if found.pixels is not None:
                    pixels = found.pixels if pixels is None else pixels + found.pixels
        if faults:
            noun = "fault" if len(faults) == 1 else "faults"
            problems += [f"{len(faults)} {noun} in split {dataset.split!r}:", *(f"  {fault}" for fault in faults)]
        elif pixels is not None:
            notes.append(_note(dataset, pixels, empty))
    if problems:
        raise ValueError("\n".join(problems))
    return notes


def _note(dataset: SegmentationDataset, pixels: Tensor, empty: int) -> str:
    """What a split's truth holds.

    Args:
        pixels: ``(K+1,)`` of each class and of void.
        empty: annotations that draw no pixel.
    """
    info = dataset.info
    absent = [name for name, count in zip(info.class_names, pixels.tolist(), strict=False) if count == 0]
    parts = []
    if info.task != "instance":
        parts.append(f"{100 * float(pixels[-1]) / float(pixels.sum()):.1f} % of the pixels are void")
    if absent:
        parts.append(f"no pixel of {len(absent)} of {info.num_classes} classes: {', '.join(absent)}")
    else:
        parts.append("every class has pixels")
    if cause := dataset.likely_cause(pixels):
        parts.append(cause)
    if empty:
        parts.append(f"annotations that draw no pixel and are left out: {empty}")
    return f"split {dataset.split!r}: {'; '.join(parts)}"
