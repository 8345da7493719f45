"""The set criterion: matches and computes the losses of all decoder layers and images in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastmask.functional import mask_loss
from fastmask.mask_term import FOCAL, MaskTerm
from fastmask.modules.across_processes import across_processes
from fastmask.modules.matcher import Matcher
from fastmask.modules.point_sampling import PointSampling
from fastmask.modules.predictions import Predictions
from fastmask.ops._checks import check_mask_term
from fastmask.ops.class_loss import class_loss_terms
from fastmask.targets import Targets

LOSSES = ("labels", "masks")


class LayerLosses(NamedTuple):
    """Unweighted losses of L decoder layers, ``(L,)`` each; None for a loss that the criterion does not compute."""

    loss_ce: Tensor | None
    loss_mask: Tensor | None
    loss_dice: Tensor | None
    assignment: Tensor  # (L, B, M) int64


class SetCriterion(nn.Module):
    """Matches predictions to targets and computes classification, mask and dice losses (MaskFormer, arXiv:2107.06278,
    section 3.2).

    Every decoder layer is matched separately. The signature, the losses and their names are those of the original
    repository. The host never waits for the device.

    With several processes (an initialized ``torch.distributed``) all losses are normalized over all processes, so that
    data-parallel averages of losses and gradients equal those of one process with the joined batch. All processes must
    call the criterion together. The original counts at least one target per process instead of one in total, and
    normalizes the classification loss over the queries of each process, so its averaged classification loss differs if
    processes have unequal numbers of targets.

    Args:
        num_classes: K, without "no object".
        matcher: a HungarianMatcher or a FixedMatcher.
        weight_dict: the weight of each loss, by name; kept for the code that sums the losses, not applied here.
        eos_coef: the weight of "no object" in the classification loss.
        losses: any of "labels" (loss_ce) and "masks" (loss_mask, loss_dice).
        term: the mask term of the losses; a HungarianMatcher has a separate one.
        points: how to sample the points at which the losses compare masks (Mask2Former); None compares all pixels.
        backend: "auto", "reference" or "native".

    Raises:
        ValueError: an unknown loss, or no classes.
    """

    empty_weight: Tensor

    def __init__(
        self,
        num_classes: int,
        matcher: Matcher,
        weight_dict: Mapping[str, float],
        eos_coef: float = 0.1,
        losses: Sequence[str] = LOSSES,
        *,
        term: MaskTerm = FOCAL,
        points: PointSampling | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        if unknown := [loss for loss in losses if loss not in LOSSES]:
            raise ValueError(f"losses holds {', '.join(map(repr, unknown))}; expected any of {', '.join(LOSSES)}")
        check_mask_term(term)
        self.num_classes = num_classes
        self.matcher = matcher
        self.weight_dict = dict(weight_dict)
        self.eos_coef = eos_coef
        self.losses = tuple(losses)
        self.term = term
        self.points = points
        self.backend = backend
        empty_weight = torch.ones(num_classes + 1)
        empty_weight[-1] = eos_coef
        self.register_buffer("empty_weight", empty_weight)

    def forward(
        self,
        outputs: Mapping[str, Any] | Sequence[Predictions],
        targets: Sequence[Mapping[str, Tensor]] | Targets,
        *,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """The unweighted scalar losses "loss_ce", "loss_mask" and "loss_dice", with suffix "_i" for auxiliary output i.

        Args:
            outputs: "pred_logits" ``(B, N, K+1)`` and "pred_masks" ``(B, N, h, w)``; optionally "aux_outputs", a list
                of such dicts, one for each earlier layer. Or, to avoid copies, all layers stacked, the last layer last:
                "class_logits" ``(L, B, N, K+1)``, and "mask_logits" ``(L, B, N, h, w)`` or the embeddings "mask_embed"
                ``(L, B, N, C)`` and "pixel_embed" ``(B, C, h, w)`` or both; see :class:`Predictions`. Stacked layers
                take precedence. Or a list of Predictions, groups of layers with pixel embeddings of their own.
            targets: Targets; or a list of {"labels": ``(M_b,)``, "masks": ``(M_b, H_b, W_b)``}, one for each image,
                which is padded to the largest mask.
            generator: draws the points, if any; a generator on the device, or None for the device's default generator.
                The same generator state gives the same losses.

        Raises:
            ValueError: outputs and targets that do not fit.
        """
        predictions = Predictions.from_outputs(outputs) if isinstance(outputs, Mapping) else outputs
        class_logits = predictions[0].class_logits
        if class_logits.shape[-1] != self.num_classes + 1:
            raise ValueError(
                f"class logits have {class_logits.shape[-1]} classes; expected num_classes + 1 = {self.num_classes + 1}"
            )
        if not isinstance(targets, Targets):
            targets = Targets.from_list(targets, num_classes=self.num_classes, device=class_logits.device)
        losses = self.layer_losses(predictions, targets, generator=generator)
        named = {}
        num_layers = losses.assignment.shape[0]
        for name in ("loss_ce", "loss_mask", "loss_dice"):
            values = getattr(losses, name)
            if values is None:
                continue
            named[name] = values[-1]
            for i in range(num_layers - 1):
                named[f"{name}_{i}"] = values[i]
        return named

    def layer_losses(
        self, predictions: Sequence[Predictions], targets: Targets, *, generator: torch.Generator | None = None
    ) -> LayerLosses:
        """The losses of all layers of ``predictions``, in order."""
        assignment = self.matcher.match(predictions, targets, generator=generator)
        loss_ce = loss_mask = loss_dice = None
        weight = torch.zeros(0, device=assignment.device)
        if "labels" in self.losses:
            classes = [group.class_logits for group in predictions]
            class_logits = torch.cat(classes) if len(classes) > 1 else classes[0]
            loss_ce, weight = class_loss_terms(class_logits, targets, assignment, class_weights=self.empty_weight)
        weight, num_masks = self.normalizers(weight, targets)
        if loss_ce is not None:
            loss_ce = loss_ce / weight
        if "masks" in self.losses:
            assignments = assignment.split([group.num_layers for group in predictions])
            losses = [
                self.mask_losses(group, targets, queries, num_masks, generator=generator)
                for group, queries in zip(predictions, assignments, strict=True)
            ]
            loss_mask, loss_dice = (torch.cat(values) for values in zip(*losses, strict=True))
        return LayerLosses(loss_ce, loss_mask, loss_dice, assignment)

    def normalizers(self, weight: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
        """The divisors of the summed classification and mask losses.

        Args:
            weight: ``(L,)``, the total weight of this process's queries in each layer.
            targets: this process's targets.

        Returns:
            The divisors for classification, ``(L,)``, and for masks, a scalar.
        """
        weight, num_masks = across_processes([weight, targets.counts.sum().float()], least=(0, 1))
        return weight, num_masks

    def mask_losses(
        self,
        predictions: Predictions,
        targets: Targets,
        assignment: Tensor,
        num_masks: Tensor,
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(loss_mask, loss_dice) of one group of layers, ``(L,)`` each."""
        mask_logits, assignment = predictions.matched(targets, assignment)
        points = None
        if self.points is not None:
            points = self.points.uncertain(mask_logits, assignment, generator=generator, backend=self.backend)
        return mask_loss(
            mask_logits,
            targets,
            assignment,
            points,
            num_masks=num_masks,
            term=self.term,
            backend=self.backend,
        )
