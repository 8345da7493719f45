"""What a decoder predicts, in the forms in which models hand it to the criterion."""

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

    Masks are either mask logits, or the mask and pixel embeddings whose products they are. From embeddings, the logits
    of all queries are made without gradient, for the matching alone, and those of the matched queries once more with
    gradient: backward then carries matched rows only, where the dense gradient of the logits is zero for every query
    without a target (85 % of it with 15 targets and 100 queries).

    Args:
        class_logits: ``(L, B, N, K+1)``.
        mask_logits: ``(L, B, N, h, w)``, unless there are embeddings.
        mask_embed: ``(L, B, N, C)``.
        pixel_embed: ``(B, C, h, w)``.
    """

    class_logits: Tensor
    mask_logits: Tensor | None = None
    mask_embed: Tensor | None = None
    pixel_embed: Tensor | None = None

    @staticmethod
    def from_outputs(outputs: Mapping[str, Any]) -> list[Predictions]:
        """The groups of stacked layers in a model's outputs, the last layer last; see ``SetCriterion`` for the keys."""
        if "class_logits" in outputs:
            stacked = {name: outputs[name] for name in ("mask_embed", "pixel_embed") if name in outputs}
            if len(stacked) != 2:
                stacked = {"mask_logits": outputs["mask_logits"]}
            return [Predictions(outputs["class_logits"], **stacked)]
        layers = (*outputs.get("aux_outputs", ()), outputs)
        return [Predictions(layer["pred_logits"][None], layer["pred_masks"][None]) for layer in layers]

    @property
    def num_layers(self) -> int:
        return self.class_logits.shape[0]

    def detached_mask_logits(self) -> Tensor:
        """``(L, B, N, h, w)`` of all queries, without gradient."""
        if self.mask_logits is not None:
            return self.mask_logits.detach()
        return mask_products(self.mask_embed.detach(), self.pixel_embed.detach())

    def matched(self, targets: Targets, assignment: Tensor) -> tuple[Tensor, Tensor]:
        """Mask logits ``(L, B, R, h, w)`` that hold at least the matched queries, with gradient, and the ``assignment
        (L, B, M)`` in terms of their R rows."""
        if self.mask_logits is not None:
            return self.mask_logits, assignment
        return matched_mask_logits(self.mask_embed, self.pixel_embed, targets, assignment)
