"""Random points, which replace all pixels when masks are compared."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastmask.functional import uncertain_points
from fastmask.ops._checks import check_point_sampling


@dataclass(frozen=True)
class PointSampling:
    """How to sample the random points at which masks are compared (Mask2Former, arXiv:2112.01527, section 3.3).

    The matcher uses one set of points per image, shared by all its layers, queries and targets. (The original
    repository and Hugging Face draw one set per layer.) For the losses, each matched pair gets its own points, most of
    them where the predicted mask is uncertain; see ``fastmask.uncertain_points``. The paper weights both the cost and
    the losses by 2 for the class term, 5 for the cross-entropy of masks and 5 for dice.

    Args:
        num_points: P, the number of points; 112 x 112 in the paper.
        oversample_ratio: candidates per point of the losses, at least 1.
        importance_sample_ratio: the share of the losses' points, 0..1, that are chosen where the mask is uncertain.

    Raises:
        ValueError: a number out of range.
    """

    num_points: int = 12544
    oversample_ratio: float = 3.0
    importance_sample_ratio: float = 0.75

    def __post_init__(self) -> None:
        check_point_sampling(self.num_points, self.oversample_ratio, self.importance_sample_ratio)

    def shared(self, batch_size: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
        """The matcher's points of each image, ``(B, P, 2)`` float32 in [0, 1)."""
        return torch.rand(batch_size, self.num_points, 2, device=device, generator=generator)

    def uncertain(
        self,
        mask_logits: Tensor,
        assignment: Tensor,
        *,
        generator: torch.Generator | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """The losses' points of each matched pair, ``(..., B, M, P, 2)``."""
        return uncertain_points(
            mask_logits,
            assignment,
            self.num_points,
            oversample_ratio=self.oversample_ratio,
            importance_sample_ratio=self.importance_sample_ratio,
            generator=generator,
            backend=backend,
        )
