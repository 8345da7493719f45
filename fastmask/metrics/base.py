"""The base class of all metrics, which count image by image and can be summed over processes."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, TypeVar

import numpy as np
import torch.distributed as dist

MetricsT = TypeVar("MetricsT", bound="Metrics")


class Metrics:
    """Counts over images (or clips), which ``merge`` adds up.

    Each process updates its own metrics with its own images, however many; ``synced`` then gives every process the
    metrics over all images. No two processes may count the same image, so a sampler for evaluation must not repeat
    images to make all parts equally long.
    """

    def compute(self) -> dict[str, float]:
        """The scores by name, each in 0..1; NaN if the truth holds nothing to find."""
        raise NotImplementedError

    def per_class(self) -> dict[str, list[float]]:
        """For each score, by name, a list over the classes; NaN for classes without any pixel, segment or event."""
        raise NotImplementedError

    def absent(self) -> list[int]:
        """The classes without a pixel, segment or event in the truth; crowd regions do not count."""
        raise NotImplementedError

    def merge(self: MetricsT, other: MetricsT) -> MetricsT:
        """Adds the counts of other metrics with the same settings, and returns these metrics."""
        if type(other) is not type(self) or other._settings() != self._settings():
            raise ValueError(f"cannot merge {self!r} with {other!r}")
        self._add(other)
        return self

    def synced(self: MetricsT, group: Any = None) -> MetricsT:
        """The metrics over all processes of a group, equal in each process; ``self`` does not change.

        Args:
            group: a group of ``torch.distributed``; None for the default one. Without distributed training, returns a
                copy.
        """
        every: list[Any] = [self]
        if dist.is_available() and dist.is_initialized():
            every = [None] * dist.get_world_size(group)
            dist.all_gather_object(every, self, group=group)
        total = copy.deepcopy(every[0])
        for other in every[1:]:
            total.merge(other)
        return total

    def _settings(self) -> tuple:
        """The settings that metrics must share to be merged."""
        raise NotImplementedError

    def _add(self: MetricsT, other: MetricsT) -> None:
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}{self._settings()}"


def share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """``part / whole`` in float64, NaN where the whole is 0."""
    part, whole = np.broadcast_arrays(np.asarray(part, np.float64), np.asarray(whole, np.float64))
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole != 0)


def mean(values: np.ndarray, among: np.ndarray | None = None) -> float:
    """The mean of the values that are not NaN, or of those that ``among`` selects; NaN if there are none."""
    values = values[~np.isnan(values)] if among is None else values[among]
    return float(values.mean()) if values.size else float("nan")


def checked_classes(num_classes: int, stuff_classes: Iterable[int] = ()) -> tuple[int, tuple[int, ...]]:
    """Checks the arguments; returns the number of classes and the sorted stuff classes without repetition."""
    stuff = tuple(sorted(set(stuff_classes)))
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    if stuff and not 0 <= stuff[0] <= stuff[-1] < num_classes:
        raise ValueError(f"stuff_classes holds {stuff}; expected 0..{num_classes - 1}")
    return num_classes, stuff
