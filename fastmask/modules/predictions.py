"""The form in which models of every origin pass their decoder's predictions to matchers and criteria."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from fastmask.functional import mask_products, matched_mask_logits
from fastmask.targets import Targets


@dataclass(frozen=True)
class Predictions:
    """Classes and masks of L decoder layers, stacked in memory.

    With ``embeddings``, the losses recompute the mask logits of the matched queries from them, and backward computes
    only these rows: all other mask logits have zero gradient (85% of them with 15 targets and 100 queries). The matcher
    needs the mask logits of all queries, without gradient: ``mask_logits``, or the products of the embeddings.

    Args:
        class_logits: ``(L, B, N, K+1)``.
        mask_logits: ``(L, B, N, h, w)``; may be None if there are embeddings.
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

    @staticmethod
    def joined(layers: Sequence[Predictions]) -> Iterator[Predictions]:
        """The same layers in the same order, neighbors with the same pixel embeddings stacked, for which backward then
        computes one gradient. Without the mask logits where there are embeddings."""
        for key, group in groupby(layers, lambda layer: None if layer.embeddings is None else id(layer.embeddings[1])):
            members = list(group)
            if key is None:
                yield from members
                continue
            mask_embeds, pixel_embeds = zip(*(layer.embeddings for layer in members if layer.embeddings), strict=True)
            class_logits = torch.cat([layer.class_logits for layer in members])
            yield Predictions(class_logits, None, (torch.cat(mask_embeds), pixel_embeds[0]))

    @property
    def num_layers(self) -> int:
        """L."""
        return self.class_logits.shape[0]

    def detached_mask_logits(self) -> Tensor:
        """The mask logits ``(L, B, N, h, w)`` of all queries, without gradient."""
        if self.mask_logits is not None:
            return self.mask_logits.detach()
        assert self.embeddings is not None
        mask_embed, pixel_embed = self.embeddings
        return mask_products(mask_embed.detach(), pixel_embed.detach())

    def matched(self, targets: Targets, assignment: Tensor) -> tuple[Tensor, Tensor]:
        """Differentiable mask logits ``(L, B, R, h, w)`` of at least the matched queries, and ``assignment (L, B, M)``
        as indices of their R rows."""
        if self.embeddings is not None:
            return matched_mask_logits(*self.embeddings, targets, assignment)
        assert self.mask_logits is not None
        return self.mask_logits, assignment
