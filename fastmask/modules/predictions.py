"""The predictions of a decoder, as models of every origin hand them to matchers and criteria."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastmask.functional import mask_products, matched_mask_logits
from fastmask.targets import Targets


@dataclass(frozen=True)
class Predictions:
    """Classes and masks of L decoder layers that are stacked in memory.

    With ``embeddings``, the losses recompute the mask logits of the matched queries from them, and backward carries
    these rows only: the gradient of all other mask logits is zero (85 % of it with 15 targets and 100 queries). The
    matcher needs the mask logits of all queries, without gradient: ``mask_logits``, or the products of the embeddings.

    Args:
        class_logits: ``(L, B, N, K+1)``.
        mask_logits: ``(L, B, N, h, w)``; may be left out where there are embeddings.
        embeddings: mask embeddings ``(L, B, N, C)`` and pixel embeddings ``(B, C, h, w)``.

    Raises:
        ValueError: neither mask logits nor embeddings.
    """

    class_logits: Tensor
    mask_logits: Tensor | None = None
    embeddings: tuple[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        if self.mask_logits is None and self.embeddings is None:
            raise ValueError("predictions have no masks; expected mask_logits, or mask_embed and pixel_embed")

    @staticmethod
    def from_outputs(outputs: Mapping[str, Any]) -> list[Predictions]:
        """The groups of stacked layers in a model's outputs, the last layer last; see ``SetCriterion`` for the keys."""
        if "class_logits" in outputs:
            embeddings = None
            if "mask_embed" in outputs and "pixel_embed" in outputs:
                embeddings = outputs["mask_embed"], outputs["pixel_embed"]
            return [Predictions(outputs["class_logits"], outputs.get("mask_logits"), embeddings)]
        layers = (*outputs.get("aux_outputs", ()), outputs)
        return [Predictions(layer["pred_logits"][None], layer["pred_masks"][None]) for layer in layers]

    @property
    def num_layers(self) -> int:
        """L."""
        return self.class_logits.shape[0]

    def detached_mask_logits(self) -> Tensor:
        """``(L, B, N, h, w)`` of all queries, without gradient."""
        if self.mask_logits is not None:
            return self.mask_logits.detach()
        assert self.embeddings is not None
        mask_embed, pixel_embed = self.embeddings
        return mask_products(mask_embed.detach(), pixel_embed.detach())

    def matched(self, targets: Targets, assignment: Tensor) -> tuple[Tensor, Tensor]:
        """Mask logits ``(L, B, R, h, w)`` that hold at least the matched queries, with gradient, and the ``assignment
        (L, B, M)`` in terms of their R rows."""
        if self.embeddings is not None:
            return matched_mask_logits(*self.embeddings, targets, assignment)
        assert self.mask_logits is not None
        return self.mask_logits, assignment
