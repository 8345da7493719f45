"""Event-based F1 of sound event detection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fastmask.metrics.base import Metrics, checked_classes, mean, share


class SoundEventMetrics(Metrics):
    """F1 = 2 TP / (found + true) over events.

    Metrics for Polyphonic Sound Event Detection (Mesaros et al. 2016, doi:10.3390/app6060162), section 3.2, with
    DESED's collars: an event is found if a predicted one of its class begins within 200 ms of its onset and ends within
    200 ms of its offset, or within a fifth of its length if that is more. Each event has at most one match, and the
    number of matches is maximal.

    Args:
        num_classes: K.
        onset_collar: the largest difference between onsets, in seconds.
        offset_collar: the largest difference between offsets, in seconds.
        offset_share: the same as a share of the true event's length; the larger of both applies.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        onset_collar: float = 0.2,
        offset_collar: float = 0.2,
        offset_share: float = 0.2,
    ):
        self.num_classes, _ = checked_classes(num_classes)
        collars = {"onset_collar": onset_collar, "offset_collar": offset_collar, "offset_share": offset_share}
        for name, value in collars.items():
            if not value >= 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        self.onset_collar = onset_collar
        self.offset_collar = offset_collar
        self.offset_share = offset_share
        # Columns: matches, found events, true events.
        self._counts = np.zeros((num_classes, 3), np.int64)

    def update(self, prediction: Any, target: Any) -> None:
        """Adds a clip.

        Args:
            prediction: the predicted events, a list of {"label", "onset", "offset"} as ``SoundEventDetector.predict``
                returns under "events", or a dict of "labels", "onsets" and "offsets" ``(E,)``; labels in 0..K-1, times
                in seconds.
            target: the true events in either form.

        Raises:
            ValueError: a class out of range, or an event that ends before it begins.
        """
        from scipy.sparse import csr_array
        from scipy.sparse.csgraph import maximum_bipartite_matching

        found, true = self._table("prediction", prediction), self._table("target", target)
        for label in np.union1d(found[0], true[0]).astype(int):
            (begins, ends), (true_begins, true_ends) = (table[1:, table[0] == label] for table in (found, true))
            slack = np.maximum(self.offset_collar, self.offset_share * (true_ends - true_begins))[:, None]
            fits = np.abs(true_begins[:, None] - begins) <= self.onset_collar
            fits &= np.abs(true_ends[:, None] - ends) <= slack
            matches = int((maximum_bipartite_matching(csr_array(fits)) >= 0).sum()) if fits.any() else 0
            self._counts[label] += (matches, len(begins), len(true_begins))

    def _table(self, name: str, events: Any) -> np.ndarray:
        """The events as ``(3, E)`` float64: label, onset, offset."""
        if isinstance(events, Mapping):
            columns: list[Any] = [
                torch.as_tensor(events[key]).double().cpu().numpy() for key in ("labels", "onsets", "offsets")
            ]
        elif isinstance(events, Sequence):
            columns = [[event[key] for event in events] for key in ("label", "onset", "offset")]
        else:
            raise TypeError(f"{name} must be a list of events or a dict of tensors, got {type(events).__name__}")
        table = np.array(columns, np.float64).reshape(3, -1)
        wrong = table[0][(table[0] < 0) | (table[0] >= self.num_classes)]
        if wrong.size:
            raise ValueError(f"{name} holds class {wrong[0]:g}; expected 0..{self.num_classes - 1}")
        if not (table[2] >= table[1]).all():
            raise ValueError(f"{name} holds an event that ends before it begins, or whose times are not numbers")
        return table

    def compute(self) -> dict[str, float]:
        """ "F1", "precision" and "recall" over all events, and "F1_macro", the mean of F1 over the classes that have
        true events; a class without matches has F1 0, as in sed_eval with "zero_score".
        """
        hits, found, true = self._counts.sum(0)
        has_events = self._counts[:, 2] > 0
        return {
            "F1": float(share(2 * hits, found + true)),
            "precision": float(share(hits, found)),
            "recall": float(share(hits, true)),
            "F1_macro": mean(np.array(self.per_class()["F1"]), has_events),
        }

    def per_class(self) -> dict[str, list[float]]:
        """ "F1", "precision" and "recall"."""
        hits, found, true = self._counts.T
        numbers = {"F1": share(2 * hits, found + true), "precision": share(hits, found), "recall": share(hits, true)}
        return {name: values.tolist() for name, values in numbers.items()}

    def absent(self) -> list[int]:
        return np.flatnonzero(self._counts[:, 2] == 0).tolist()

    def _settings(self) -> tuple:
        return self.num_classes, self.onset_collar, self.offset_collar, self.offset_share

    def _add(self, other: SoundEventMetrics) -> None:
        self._counts += other._counts
