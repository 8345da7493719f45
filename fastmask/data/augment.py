"""Augmentation with explicit seeds."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from fastmask.data.sample import Findings, Sample, SegmentationDataset
from fastmask.data.transforms import Transform


class Augmented(SegmentationDataset):
    """A data set whose samples are augmented.

    Sample i in epoch e depends only on ``(seed, e, i)``: not on the order, the process or earlier samples. The epoch is
    part of the index, so that long-lived workers and resumed runs use the right one.

    Args:
        dataset: the data set to augment.
        transform: a function of a sample and a ``numpy.random.Generator``.
        seed: an integer, not negative.

    Raises:
        ValueError: a negative seed.
    """

    def __init__(self, dataset: SegmentationDataset, transform: Transform, seed: int = 0):
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self.dataset, self.info, self.split = dataset, dataset.info, dataset.split
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int | tuple[int, int]) -> Sample:
        """A sample.

        Args:
            index: ``(epoch, i)`` as a sampler gives it, or i for epoch 0.
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
