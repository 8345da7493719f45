"""Which query answers for which target: the Hungarian matcher of MaskFormer, and the fixed one it is compared with."""

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
    """What the criterion asks of a matcher: an assignment."""

    @abstractmethod
    def match(
        self, predictions: Sequence[Predictions], targets: Targets, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """``(L, B, M)`` int64 on the device: the query of each target in each of the layers of all ``predictions``, -1
        for padding and unmatched targets. ``generator``, of that device, draws the points, if there are any."""


class HungarianMatcher(Matcher):
    """Matches queries and targets one to one so that the total cost is least (MaskFormer, arXiv:2107.06278, 3.2).

    Args:
        cost_class: weight of the class term, -softmax(class_logits)[label].
        cost_mask: weight of the mask term.
        cost_dice: weight of the dice term.
        term: the mask term.
        points: how to sample the points at which masks are compared (Mask2Former); all pixels if None.
        backend: "auto", "reference" or "native", of the cost and of the assignment. "native" is for tensors on the CPU:
            on a GPU "auto" takes Triton kernels for the cost and CUDA ones for the assignment.

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
            raise ValueError("cost_class, cost_mask and cost_dice are all 0; nothing is left to match by")
        self.cost_class = cost_class
        self.cost_mask = cost_mask
        self.cost_dice = cost_dice
        self.term = term
        self.points = points
        self.backend = backend

    @torch.no_grad()
    def cost(self, class_logits: Tensor, mask_logits: Tensor, targets: Targets, points: Tensor | None = None) -> Tensor:
        """``(..., B, N, M)``: the cost of every pair; see ``fastmask.mask_cost`` for the shapes.

        ``points (B, P, 2)`` are compared instead of all pixels; drawn here if the matcher samples points and is given
        none.
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

    def solve(self, cost: Tensor, targets: Targets) -> Tensor:
        """``(..., B, M)`` int64 on the device: the query of each target, from costs ``(..., B, N, M)``."""
        return assign(cost, targets.counts, backend=self.backend)

    def assign(
        self,
        class_logits: Tensor,
        mask_logits: Tensor,
        targets: Targets,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """``(..., B, M)`` int64 on the device: the query of each target, -1 for padding and unmatched targets.

        Args:
            class_logits: ``(..., B, N, K+1)``; any leading dimensions, usually L decoder layers.
            mask_logits: ``(..., B, N, h, w)``.
            targets: of the B images.
            generator: of the device, for the points, if there are any; its default generator if None.
        """
        points = self.draw_points(targets, generator)
        return self.solve(self.cost(class_logits, mask_logits, targets, points), targets)

    def match(
        self, predictions: Sequence[Predictions], targets: Targets, *, generator: torch.Generator | None = None
    ) -> Tensor:
        points = self.draw_points(targets, generator)
        costs = [self.cost(group.class_logits, group.detached_mask_logits(), targets, points) for group in predictions]
        return self.solve(torch.cat(costs), targets)

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
        class_logits, mask_logits = outputs["pred_logits"], outputs["pred_masks"]
        if not isinstance(targets, Targets):
            num_classes = class_logits.shape[-1] - 1
            targets = Targets.from_list(targets, num_classes=num_classes, device=mask_logits.device)
        return index_pairs(self.assign(class_logits, mask_logits, targets, generator=generator))

    def extra_repr(self) -> str:
        return f"cost_class={self.cost_class}, cost_mask={self.cost_mask}, cost_dice={self.cost_dice}"


class FixedMatcher(Matcher):
    """Query k answers for class k (structure (c) of MaskFormer's comparison, arXiv:2107.06278, section 4.3).

    Needs as many queries as classes. A class that an image has several targets of shares one query among them:
    ``Targets.merged_by_class`` makes one of them, as semantic segmentation has it.
    """

    def match(
        self, predictions: Sequence[Predictions], targets: Targets, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """As :meth:`Matcher.match`; no points are drawn.

        Raises:
            ValueError: the number of queries is not that of the classes.
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
    """``(B, M)`` queries of targets to (queries, targets) of each image, int64 on the CPU, by ascending query."""
    pairs = []
    for queries in assignment.cpu():
        matched = (queries >= 0).nonzero().squeeze(1)
        order = queries[matched].argsort()
        pairs.append((queries[matched][order], matched[order]))
    return pairs
