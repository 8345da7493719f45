"""Chooses the samples of each training step, which depend on seed and step, not on the number of processes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


class StepSampler(Sampler[list[tuple[int, int]]]):
    """The micro-batches of one process, for the steps ``start..stop-1``: the ``batch_sampler`` of a ``DataLoader``.

    The epochs, each in an order that depends only on ``(seed, epoch)``, form one endless sequence. Step s takes
    ``batch_size`` samples from position ``s * batch_size`` on, for any number of processes and micro-batches, so a step
    may cross the end of an epoch. Micro-batch a of all processes takes the a-th part of these samples.

    Args:
        length: the number of samples in the data set.
        batch_size: the number of samples in a step, over all processes and micro-batches.
        seed: the seed of the order; not negative.
        start: the first step.
        stop: the step after the last.
        rank: the rank of this process.
        world_size: the number of processes.
        accumulate: the number of micro-batches in a step.

    Raises:
        ValueError: no samples, or a batch that cannot be divided evenly among processes and micro-batches.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        start: int,
        stop: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
    ):
        if length < 1:
            raise ValueError("the data set has no samples")
        if batch_size % (world_size * accumulate):
            raise ValueError(
                f"batch_size is {batch_size}; expected a multiple of {world_size * accumulate}: "
                f"{world_size} processes with {accumulate} micro-batches each (accumulate)"
            )
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.steps = range(start, stop)
        self.rank = rank
        self.world_size = world_size
        self.accumulate = accumulate

    def __len__(self) -> int:
        return len(self.steps) * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Each micro-batch as a list of ``(epoch, index)``."""
        size = self.batch_size // (self.world_size * self.accumulate)
        current, order = -1, np.empty(0, np.int64)
        for step in self.steps:
            for micro in range(self.accumulate):
                first = step * self.batch_size + (micro * self.world_size + self.rank) * size
                batch = []
                for position in range(first, first + size):
                    epoch, place = divmod(position, self.length)
                    if epoch != current:
                        current, order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.length)
                    batch.append((epoch, int(order[place])))
                yield batch
