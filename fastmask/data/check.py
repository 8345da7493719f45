"""Finds broken files before training starts, all at once."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

from fastmask.data.sample import SegmentationDataset


def check_dataset(dataset: SegmentationDataset, *, full: bool = True, workers: int | None = None) -> None:
    """Raises one error that names every broken file of a data set.

    Found are: an image without its label map or the other way round, files that are missing, empty or cut off, an image
    and a truth of different sizes, labels out of range, and ids that the annotation does not explain.

    Args:
        dataset: from ``open_dataset``.
        full: decode every image and its truth. Otherwise read only the files' headers and the annotation, which finds
            missing files and wrong sizes in a hundredth of the time.
        workers: threads; one for each processor by default.

    Raises:
        ValueError: something is broken; a line for each fault.
    """
    check_datasets([dataset], full=full, workers=workers)


def check_datasets(datasets: Iterable[SegmentationDataset], *, full: bool = True, workers: int | None = None) -> None:
    """Raises one error that names every broken file of several splits; otherwise as :func:`check_dataset`."""
    problems = [found for dataset in datasets if (found := _problems(dataset, full, workers))]
    if problems:
        raise ValueError("\n".join(problems))


def _problems(dataset: SegmentationDataset, full: bool, workers: int | None) -> str:
    """A line for each fault of a split, under one that counts them; empty if there is none."""
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        by_sample = pool.map(lambda index: dataset.faults(index, full), range(len(dataset)))
        faults = [*dataset.set_faults(), *chain.from_iterable(by_sample)]
    if not faults:
        return ""
    noun = "fault" if len(faults) == 1 else "faults"
    return "\n".join([f"{len(faults)} {noun} in split {dataset.split!r}:", *(f"  {fault}" for fault in faults)])
