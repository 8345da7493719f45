"""Finds all broken files before training starts."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from torch import Tensor

from fastmask.data.sample import SegmentationDataset
from fastmask.progress import with_bar


def check_dataset(dataset: SegmentationDataset, *, full: bool = True, workers: int | None = None) -> list[str]:
    """Raises one error that names every broken file of a data set; without faults, describes its truth.

    It finds images without label maps and label maps without images; missing, empty and truncated files; images and
    truth of different sizes; labels out of range; invalid fields of annotations; and ids that the annotation lacks.

    Args:
        dataset: from ``open_dataset``.
        full: decode every image and its truth. Otherwise read only headers and annotations, which finds missing files
            and wrong sizes in a hundredth of the time.
        workers: the number of threads; by default one for each processor.

    Returns:
        For each split a line of facts to know before training: the share of void pixels, the classes without a pixel
        and the likely cause, and the number of annotations that draw no pixel and are left out. No lines without
        ``full``, or for truth that is not in files.

    Raises:
        ValueError: there are faults; the message has a line for each.
    """
    return check_datasets([dataset], full=full, workers=workers)


def check_datasets(
    datasets: Iterable[SegmentationDataset], *, full: bool = True, workers: int | None = None
) -> list[str]:
    """Raises one error that names every broken file of several splits; otherwise as :func:`check_dataset`.

    On a terminal, a bar shows the progress if tqdm is installed.
    """
    problems: list[str] = []
    notes: list[str] = []
    for dataset in datasets:
        faults, pixels, empty = list(dataset.set_faults()), None, 0
        with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
            inspected = pool.map(partial(dataset.inspect, full=full), range(len(dataset)))
            for found in with_bar(inspected, len(dataset), f"checking {dataset.split}"):
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
    """The line that describes a split's truth.

    Args:
        dataset: the split.
        pixels: ``(K+1,)``, the number of pixels of each class and, last, of void.
        empty: the number of annotations that draw no pixel.
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
