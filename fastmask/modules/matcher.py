"""The Hungarian matcher, with the original repository's signature and with a batched form for the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fastmask.functional import assign, mask_cost
from fastmask.targets import Targets


class HungarianMatcher(nn.Module):
    """Matches queries and targets one to one so that the total cost is least (MaskFormer, arXiv:2107.06278, 3.2).

    Args:
        cost_class: weight of the class term, -softmax(class_logits)[label].
        cost_mask: weight of the mask term, focal loss or cross-entropy.
        cost_dice: weight of the dice term.
        mask_term: "focal" (MaskFormer) or "bce" (Mask2Former).
        alpha, gamma: of the focal loss.
        ignore_void: leave void pixels out of the cost; otherwise they are background.
        backend: "auto", "reference" or "native", of the cost and of the assignment alike. On a GPU the one is Triton's
            and the other CUDA's, so that only "auto" takes both.

    Raises:
        ValueError: all three costs are 0.
    """

    def __init__(
        self,
        cost_class: float = 1.0,
        cost_mask: float = 1.0,
        cost_dice: float = 1.0,
        *,
        mask_term: str = "focal",
        alpha: float = 0.25,
        gamma: float = 2.0,
        ignore_void: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if cost_class == 0 and cost_mask == 0 and cost_dice == 0:
            raise ValueError("cost_class, cost_mask and cost_dice are all 0; nothing is left to match by")
        self.cost_class = cost_class
        self.cost_mask = cost_mask
        self.cost_dice = cost_dice
        self.mask_term = mask_term
        self.alpha = alpha
        self.gamma = gamma
        self.ignore_void = ignore_void
        self.backend = backend

    @torch.no_grad()
    def cost(self, class_logits: Tensor, mask_logits: Tensor, targets: Targets) -> Tensor:
        """``(..., B, N, M)``: the cost of every pair; see ``fastmask.mask_cost`` for the shapes."""
        return mask_cost(
            class_logits,
            mask_logits,
            targets,
            cost_class=self.cost_class,
            cost_mask=self.cost_mask,
            cost_dice=self.cost_dice,
            mask_term=self.mask_term,
            alpha=self.alpha,
            gamma=self.gamma,
            ignore_void=self.ignore_void,
            backend=self.backend,
        )

    def solve(self, cost: Tensor, targets: Targets) -> Tensor:
        """``(..., B, M)`` int64 on the device: the query of each target, from costs ``(..., B, N, M)``."""
        return assign(cost, targets.counts, backend=self.backend)

    def assign(self, class_logits: Tensor, mask_logits: Tensor, targets: Targets) -> Tensor:
        """``(..., B, M)`` int64 on the device: the query of each target, -1 for padding and unmatched targets.

        Args:
            class_logits: ``(..., B, N, K+1)``; any leading dimensions, usually L decoder layers.
            mask_logits: ``(..., B, N, h, w)``.
            targets: of the B images.
        """
        return self.solve(self.cost(class_logits, mask_logits, targets), targets)

    @torch.no_grad()
    def forward(
        self, outputs: Mapping[str, Tensor], targets: Sequence[Mapping[str, Tensor]] | Targets
    ) -> list[tuple[Tensor, Tensor]]:
        """The matching as index pairs on the host.

        Args:
            outputs: "pred_logits" ``(B, N, K+1)`` and "pred_masks" ``(B, N, h, w)``.
            targets: a list of {"labels": ``(M_b,)``, "masks": ``(M_b, H, W)``}, one for each image; or Targets.

        Returns:
            For each image (queries, targets), int64 on the CPU, min(N, M_b) of each, by ascending query.
        """
        class_logits, mask_logits = outputs["pred_logits"], outputs["pred_masks"]
        if not isinstance(targets, Targets):
            num_classes = class_logits.shape[-1] - 1
            targets = Targets.from_list(targets, num_classes=num_classes, device=mask_logits.device)
        return index_pairs(self.assign(class_logits, mask_logits, targets))

    def extra_repr(self) -> str:
        return f"cost_class={self.cost_class}, cost_mask={self.cost_mask}, cost_dice={self.cost_dice}"


def index_pairs(assignment: Tensor) -> list[tuple[Tensor, Tensor]]:
    """``(B, M)`` queries of targets to (queries, targets) of each image, int64 on the CPU, by ascending query."""
    pairs = []
    for queries in assignment.cpu():
        matched = (queries >= 0).nonzero().squeeze(1)
        order = queries[matched].argsort()
        pairs.append((queries[matched][order], matched[order]))
    return pairs
