"""The classes that each query predicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

THRESHOLD = 0.3  # from the paper's appendix D, which filters out low-confidence masks


class QueryClasses:
    """Counts the images in which each query was kept with each class.

    MaskFormer's section 4.4 (arXiv:2107.06278) counts the unique classes that each query predicts on the validation
    set, which shows that queries are not bound to classes. A query is kept in an image if its most likely class is not
    "no object" and has a probability above the threshold.

    Args:
        num_queries: N.
        num_classes: K.
        threshold: 0..1.
    """

    def __init__(self, num_queries: int, num_classes: int, threshold: float = THRESHOLD):
        self.threshold = threshold
        self.counts = np.zeros((num_queries, num_classes), np.int64)
        self.images = 0

    def update(self, class_logits: Tensor) -> None:
        """Adds images, by their class logits ``(B, N, K+1)``."""
        scores, classes = class_logits.float().softmax(-1).max(-1)
        num_queries, num_classes = self.counts.shape
        kept = (classes < num_classes) & (scores > self.threshold)
        queries = torch.arange(num_queries, device=classes.device).expand_as(classes)
        flat = (queries * num_classes + classes)[kept]
        self.counts += torch.bincount(flat, minlength=self.counts.size).view(num_queries, num_classes).cpu().numpy()
        self.images += len(class_logits)


@dataclass(frozen=True)
class SharedPair:
    """Two classes that queries share.

    Args:
        classes: their indices, ascending.
        queries: the number of queries that predicted both.
        images: the smaller of the two classes' counts, summed over these queries, as a measure of real sharing.
    """

    classes: tuple[int, int]
    queries: int
    images: int


def classes_per_query(counts: Sequence[Sequence[int]]) -> list[int]:
    """The number of distinct classes of each query, the largest first: the paper's figure. ``counts`` is (N, K)."""
    return sorted((np.asarray(counts) > 0).sum(1).tolist(), reverse=True)


def histogram(counts: Sequence[Sequence[int]]) -> list[int]:
    """Entry i is the number of queries that predict i classes; K + 1 entries. ``counts`` is (N, K)."""
    counts = np.asarray(counts)
    return np.bincount((counts > 0).sum(1), minlength=counts.shape[1] + 1).tolist()


def shared_pairs(counts: Sequence[Sequence[int]]) -> list[SharedPair]:
    """The pairs of classes that at least one query predicts, the most often shared first. ``counts`` is (N, K)."""
    counts = np.asarray(counts)
    pairs = []
    for first, second in combinations(range(counts.shape[1]), 2):
        both = np.minimum(counts[:, first], counts[:, second])
        if both.any():
            pairs.append(SharedPair((first, second), int((both > 0).sum()), int(both.sum())))
    return sorted(pairs, key=lambda pair: (-pair.images, -pair.queries, pair.classes))
