"""Which query answers for which target: MaskFormer's Hungarian matcher, and fixed matching."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fastmask.functional import assign, mask_cost
from fastmask.mask_term import FOCAL, MaskTerm
from fastmask.modules.point_sampling import PointSampling
from fastmask.modules.predictions import Predictions
from fastmask.ops._checks import check_mask_term
from fastmask.targets import Targets


class Matcher(nn.Module, ABC):
    """Base of the matchers that the criterion takes."""

    @abstractmethod
    def match(
        self, predictions: Sequence[Predictions], targets: Targets, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """``(L, B, M)`` int64 on the device: the query of each target in each layer, -1 for padding and unmatched
        targets.

        Args:
            predictions: groups of layers, L in all.
            targets: of the B images.
            generator: of the device, for the points, if there are any; its default generator if None.
        """


class HungarianMatcher(Matcher):
    """Matches queries and targets one to one so that the total cost is least (MaskFormer, arXiv:2107.06278, 3.2).

    Args:
        cost_class: weight of the class term, -softmax(class_logits)[label].
        cost_mask: weight of the mask term.
        cost_dice: weight of the dice term.
        term: the mask term.
        points: how to sample the points at which masks are compared (Mask2Former); all pixels if None.
        backend: of the cost and of the assignment: "auto", "reference", or "native" for tensors on the CPU. On a GPU,
            where the cost has Triton kernels and the assignment CUDA ones, only "auto" uses both.

    Raises:
        ValueError: all three costs are 0.
    """

    def __init__(
        self,
        cost_class: float = 1.0,
        cost_mask: float = 1.0,
        cost_dice: float = 1.0,
        *,
        term: MaskTerm = FOCAL,
        points: PointSampling | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_mask_term(term)
        if cost_class == 0 and cost_mask == 0 and cost_dice == 0:
            raise ValueError("cost_class, cost_mask and cost_dice are all 0; there is no cost to match by")
        self.cost_class = cost_class
        self.cost_mask = cost_mask
        self.cost_dice = cost_dice
        self.term = term
        self.points = points
        self.backend = backend

    @torch.no_grad()
    def cost(self, class_logits: Tensor, mask_logits: Tensor, targets: Targets, points: Tensor | None = None) -> Tensor:
        """``(..., B, N, M)``: the cost of every query and target; see ``fastmask.mask_cost`` for the shapes.

        ``points (B, P, 2)`` take the place of all pixels. A matcher that samples points draws them if none are given.
        """
        if points is None:
            points = self.draw_points(targets)
        return mask_cost(
            class_logits,
            mask_logits,
            targets,
            points,
            cost_class=self.cost_class,
            cost_mask=self.cost_mask,
            cost_dice=self.cost_dice,
            term=self.term,
            backend=self.backend,
        )

    def draw_points(self, targets: Targets, generator: torch.Generator | None = None) -> Tensor | None:
        """``(B, P, 2)``, one set for each image; None if the matcher compares all pixels."""
        if self.points is None:
            return None
        return self.points.shared(targets.batch_size, targets.device, generator)

    def match(
        self, predictions: Sequence[Predictions], targets: Targets, *, generator: torch.Generator | None = None
    ) -> Tensor:
        points = self.draw_points(targets, generator)
        costs = [self.cost(group.class_logits, group.detached_mask_logits(), targets, points) for group in predictions]
        return assign(torch.cat(costs) if len(costs) > 1 else costs[0], targets.counts, backend=self.backend)

    @torch.no_grad()
    def forward(
        self,
        outputs: Mapping[str, Tensor],
        targets: Sequence[Mapping[str, Tensor]] | Targets,
        *,
        generator: torch.Generator | None = None,
    ) -> list[tuple[Tensor, Tensor]]:
        """The matching as index pairs on the host.

        Args:
            outputs: "pred_logits" ``(B, N, K+1)`` and "pred_masks" ``(B, N, h, w)``.
            targets: a list of {"labels": ``(M_b,)``, "masks": ``(M_b, H, W)``}, one for each image; or Targets.
            generator: of the device, for the points, if there are any; its default generator if None.

        Returns:
            For each image (queries, targets), int64 on the CPU, min(N, M_b) of each, by ascending query.
        """
        predictions = Predictions(outputs["pred_logits"][None], outputs["pred_masks"][None])
        if not isinstance(targets, Targets):
            num_classes, device = predictions.class_logits.shape[-1] - 1, predictions.class_logits.device
            targets = Targets.from_list(targets, num_classes=num_classes, device=device)
        return index_pairs(self.match([predictions], targets, generator=generator)[0])

    def extra_repr(self) -> str:
        return f"cost_class={self.cost_class}, cost_mask={self.cost_mask}, cost_dice={self.cost_dice}"


class FixedMatcher(Matcher):
    """Query k answers for class k (structure (c) of MaskFormer's comparison, arXiv:2107.06278, section 4.3).

    It needs as many queries as classes. Several targets of one class share its query; ``Targets.merged_by_class`` makes
    them one target, as in semantic segmentation.
    """

    def match(
        self, predictions: Sequence[Predictions], targets: Targets, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """See :meth:`Matcher.match`. It draws no points.

        Raises:
            ValueError: the numbers of queries and classes differ.
        """
        for group in predictions:
            num_queries, num_classes = group.class_logits.shape[-2], group.class_logits.shape[-1] - 1
            if num_queries != num_classes:
                raise ValueError(
                    f"class logits have {num_queries} queries and {num_classes} classes; fixed matching needs as many "
                    "queries as classes"
                )
        num_layers = sum(group.num_layers for group in predictions)
        return targets.labels.expand(num_layers, -1, -1).contiguous()


def index_pairs(assignment: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The assignment ``(B, M)`` as (queries, targets) of each image, int64 on the CPU, by ascending query."""
    pairs = []
    for queries in assignment.cpu():
        matched = (queries >= 0).nonzero().squeeze(1)
        order = queries[matched].argsort()
        pairs.append((queries[matched][order], matched[order]))
    return pairs
