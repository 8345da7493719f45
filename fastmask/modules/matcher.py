"""Matchers, which assign queries to targets: MaskFormer's Hungarian matcher, and fixed matching."""

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
    """Base class of the criterion's matchers."""

    @abstractmethod
    def match(
        self, predictions: Sequence[Predictions], targets: Targets, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """``(L, B, M)`` int64 on the device: the query of each target in each layer, -1 for padding and unmatched
        targets.

        Args:
            predictions: groups of layers, L layers in total.
            targets: the targets of the B images.
            generator: draws the points, if any; a generator on the device, or None for the device's default generator.
        """


class HungarianMatcher(Matcher):
    """Matches queries and targets one to one with minimal total cost (MaskFormer, arXiv:2107.06278, section 3.2).

    Args:
        cost_class: weight of the class term, -softmax(class_logits)[label].
        cost_mask: weight of the mask term.
        cost_dice: weight of the dice term.
        term: the mask term.
        points: how to sample the points at which masks are compared (Mask2Former); None compares all pixels.
        backend: the backend of the cost and the assignment: "auto", "reference", or, for CPU tensors, "native". On a
            GPU the cost has only Triton kernels and the assignment only CUDA kernels, so "auto" is needed to use both.

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
        """The cost of every query and target, ``(..., B, N, M)``; see ``fastmask.mask_cost`` for the shapes.

        ``points (B, P, 2)`` replace all pixels. A matcher that samples points draws them if none are given.
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
        """One set of points for each image, ``(B, P, 2)``; None if the matcher compares all pixels."""
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
        """The matching as pairs of indices on the host.

        Args:
            outputs: "pred_logits" ``(B, N, K+1)`` and "pred_masks" ``(B, N, h, w)``.
            targets: a list of {"labels": ``(M_b,)``, "masks": ``(M_b, H, W)``}, one for each image; or Targets.
            generator: draws the points, if any; a generator on the device, or None for the device's default generator.

        Returns:
            For each image (queries, targets), min(N, M_b) indices each, int64 on the CPU, by ascending query.
        """
        predictions = Predictions(outputs["pred_logits"][None], outputs["pred_masks"][None])
        if not isinstance(targets, Targets):
            num_classes, device = predictions.class_logits.shape[-1] - 1, predictions.class_logits.device
            targets = Targets.from_list(targets, num_classes=num_classes, device=device)
        return index_pairs(self.match([predictions], targets, generator=generator)[0])

    def extra_repr(self) -> str:
        return f"cost_class={self.cost_class}, cost_mask={self.cost_mask}, cost_dice={self.cost_dice}"


class FixedMatcher(Matcher):
    """Matches query k to the targets of class k (structure (c) in MaskFormer, arXiv:2107.06278, section 4.3).

    There must be as many queries as classes. All targets of a class share its query; ``Targets.merged_by_class`` merges
    them into one target, as in semantic segmentation.
    """

    def match(
        self, predictions: Sequence[Predictions], targets: Targets, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """See :meth:`Matcher.match`. The generator is not used.

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
    """Turns an assignment ``(B, M)`` into (queries, targets) for each image, int64 on the CPU, by ascending query."""
    pairs = []
    for queries in assignment.cpu():
        matched = (queries >= 0).nonzero().squeeze(1)
        order = queries[matched].argsort()
        pairs.append((queries[matched][order], matched[order]))
    return pairs
