"""Whether a network misses things or misnames them: two ways in which a label map loses its score."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

FOUND, NAMED = "found", "named"  # the names of both metrics


class ThingNames:
    """Counts over label maps. All pixels of one class of things in an image count as one thing.

    Args:
        num_classes: K.
        stuff: the classes that are no things.
    """

    def __init__(self, num_classes: int, stuff: Iterable[int]) -> None:
        self.things = torch.tensor(sorted({*range(num_classes)} - {*stuff}), dtype=torch.int64)
        self.pixels = self.found_pixels = self.found_things = self.named_things = 0

    def update(self, found: Tensor, truth: Tensor) -> None:
        """Counts the things of an image.

        Args:
            found, truth: ``(H, W)`` label maps of integers; labels outside of 0..K-1 are void.
        """
        for thing in truth[torch.isin(truth, self.things)].unique():
            labels = found[truth == thing].long()
            names = labels[torch.isin(labels, self.things)]
            self.pixels += labels.numel()
            self.found_pixels += names.numel()
            if names.numel():
                self.found_things += 1
                self.named_things += int(names.mode().values == thing)

    def compute(self) -> dict[str, float]:
        """Both shares, in 0..1; empty without things.

        "found" is the share of the things' pixels that are of any class of things in the label maps. "named" is the
        share of things, of those with such pixels, whose own class is the most frequent one among them.
        """
        if not self.pixels:
            return {}
        return {FOUND: self.found_pixels / self.pixels, NAMED: self.named_things / max(self.found_things, 1)}
