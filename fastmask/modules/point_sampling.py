"""Random points at which masks are compared instead of at all pixels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastmask.functional import uncertain_points
from fastmask.ops._checks import check_point_sampling


@dataclass(frozen=True)
class PointSampling:
    """Masks are compared at random points (Mask2Former, arXiv:2112.01527, section 3.3).

    The matcher uses one set of points for each image, shared by all its layers, queries and targets. (The original
    repository and Hugging Face draw one for each layer.) For the losses each matched pair has points of its own, most
    of them where the predicted mask is uncertain; see ``fastmask.uncertain_points``. The paper's weights of cost and
    losses are 2 for the class term, 5 for the cross-entropy of masks and 5 for dice.

    Args:
        num_points: P, 112 x 112 in the paper.
        oversample_ratio: candidates for each point of the losses, at least 1.
        importance_sample_ratio: share of the losses' points that are chosen where the mask is uncertain, 0..1.

    Raises:
        ValueError: a number out of range.
    """

    num_points: int = 12544
    oversample_ratio: float = 3.0
    importance_sample_ratio: float = 0.75

    def __post_init__(self) -> None:
        check_point_sampling(self.num_points, self.oversample_ratio, self.importance_sample_ratio)

    def shared(self, batch_size: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
        """``(B, P, 2)`` float32 in [0, 1): the matcher's points of each image."""
        return torch.rand(batch_size, self.num_points, 2, device=device, generator=generator)

    def uncertain(
        self,
        mask_logits: Tensor,
        assignment: Tensor,
        *,
        generator: torch.Generator | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """``(..., B, M, P, 2)``: the losses' points of each matched pair."""
        return uncertain_points(
            mask_logits,
            assignment,
            self.num_points,
            oversample_ratio=self.oversample_ratio,
            importance_sample_ratio=self.importance_sample_ratio,
            generator=generator,
            backend=backend,
        )
