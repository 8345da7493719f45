"""Augmentation whose randomness comes from explicit seeds."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from fastmask.data.sample import DatasetInfo, Findings, Sample, SegmentationDataset
from fastmask.data.transforms import Transform


class Augmented(SegmentationDataset):
    """A data set whose samples are augmented.

    Sample i in epoch e depends on ``(seed, e, i)`` alone: not on the order, on the process or on what was read before.
    The epoch is a part of the index, so that workers that live through several epochs, and a resumed run, see the
    right one.

    Args:
        dataset: what to augment.
        transform: takes a sample and a ``numpy.random.Generator``.
        seed: an integer, not negative.

    Raises:
        ValueError: a negative seed.
    """

    def __init__(self, dataset: SegmentationDataset, transform: Transform, seed: int = 0):
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self.dataset = dataset
        self.transform = transform
        self.seed = seed

    @property
    def info(self) -> DatasetInfo:
        return self.dataset.info

    @property
    def split(self) -> str:
        return self.dataset.split

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int | tuple[int, int]) -> Sample:
        """A sample.

        Args:
            index: ``(epoch, i)``, as a sampler gives it; i alone is of epoch 0.
        """
        epoch, i = index if isinstance(index, tuple) else (0, index)
        i = range(len(self))[i]
        return self.transform(self.dataset[i], np.random.default_rng([self.seed, epoch, i]))

    def inspect(self, index: int, full: bool) -> Findings:
        return self.dataset.inspect(index, full)

    def set_faults(self) -> list[str]:
        return self.dataset.set_faults()

    def likely_cause(self, pixels: Tensor) -> str:
        return self.dataset.likely_cause(pixels)
