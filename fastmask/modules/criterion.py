"""The set criterion: matching and losses of every decoder layer, in one call for all layers and images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn

from fastmask.functional import class_loss, mask_loss
from fastmask.modules.matcher import HungarianMatcher
from fastmask.targets import Targets

LOSSES = ("labels", "masks")


class LayerLosses(NamedTuple):
    """Unweighted losses of L decoder layers, ``(L,)`` each; None where the criterion leaves one out."""

    loss_ce: Tensor | None
    loss_mask: Tensor | None
    loss_dice: Tensor | None
    assignment: Tensor  # (L, B, M) int64


class SetCriterion(nn.Module):
    """Matches predictions to targets, then classification, mask and dice losses (MaskFormer, arXiv:2107.06278, 3.2).

    Every decoder layer has a matching of its own. The signature, the losses and their names are those of the original
    repository; on the device, nothing is read back to the host.

    Args:
        num_classes: K, without "no object".
        matcher: the HungarianMatcher; its mask term and void rule hold for the losses too.
        weight_dict: weight of each loss name; kept for whoever sums the losses, not applied here.
        eos_coef: weight of "no object" in the classification loss.
        losses: any of "labels" (loss_ce) and "masks" (loss_mask, loss_dice).
        backend: "auto", "reference" or "native".

    Raises:
        ValueError: an unknown loss, or no classes.
    """

    empty_weight: Tensor

    def __init__(
        self,
        num_classes: int,
        matcher: HungarianMatcher,
        weight_dict: Mapping[str, float],
        eos_coef: float = 0.1,
        losses: Sequence[str] = LOSSES,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        if unknown := [loss for loss in losses if loss not in LOSSES]:
            raise ValueError(f"losses holds {', '.join(map(repr, unknown))}; expected any of {', '.join(LOSSES)}")
        self.num_classes = num_classes
        self.matcher = matcher
        self.weight_dict = dict(weight_dict)
        self.eos_coef = eos_coef
        self.losses = tuple(losses)
        self.backend = backend
        empty_weight = torch.ones(num_classes + 1)
        empty_weight[-1] = eos_coef
        self.register_buffer("empty_weight", empty_weight)

    def forward(
        self, outputs: Mapping[str, Any], targets: Sequence[Mapping[str, Tensor]] | Targets
    ) -> dict[str, Tensor]:
        """Unweighted scalar losses "loss_ce", "loss_mask", "loss_dice", and with suffix "_i" for auxiliary output i.

        Args:
            outputs: "pred_logits" ``(B, N, K+1)`` and "pred_masks" ``(B, N, h, w)``; optionally "aux_outputs", a list
                of such dicts, one for each earlier layer. Where the stacked "class_logits" ``(L, B, N, K+1)`` and
                "mask_logits" ``(L, B, N, h, w)`` are given as well (last layer last, as fastmask's models do), all
                layers go through in one call, without a copy.
            targets: a list of {"labels": ``(M_b,)``, "masks": ``(M_b, H_b, W_b)``}, one for each image, which is padded
                to the largest mask; or Targets.

        Raises:
            ValueError: outputs and targets that do not fit.
        """
        layers = list(_layers(outputs))
        class_logits = layers[0][0]
        if class_logits.shape[-1] != self.num_classes + 1:
            raise ValueError(
                f"class logits have {class_logits.shape[-1]} classes; expected num_classes + 1 = {self.num_classes + 1}"
            )
        if not isinstance(targets, Targets):
            targets = Targets.from_list(targets, num_classes=self.num_classes, device=class_logits.device)
        losses = self.layer_losses(layers, targets)
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

    def layer_losses(self, layers: Sequence[tuple[Tensor, Tensor]], targets: Targets) -> LayerLosses:
        """The losses of groups of layers that are stacked in memory: the batched form beneath ``forward``.

        Args:
            layers: (class_logits ``(L_i, B, N, K+1)``, mask_logits ``(L_i, B, N, h, w)``) of each group.
            targets: of the B images.
        """
        cost = torch.cat([self.matcher.cost(classes, masks, targets) for classes, masks in layers])
        assignment = self.matcher.solve(cost, targets)
        loss_ce = loss_mask = loss_dice = None
        if "labels" in self.losses:
            class_logits = torch.cat([classes for classes, _ in layers]) if len(layers) > 1 else layers[0][0]
            loss_ce = class_loss(class_logits, targets, assignment, class_weights=self.empty_weight)
        if "masks" in self.losses:
            num_masks = global_num_masks(targets)
            assignments = assignment.split([masks.shape[0] for _, masks in layers])
            pairs = [
                mask_loss(
                    masks,
                    targets,
                    group,
                    num_masks=num_masks,
                    mask_term=self.matcher.mask_term,
                    alpha=self.matcher.alpha,
                    gamma=self.matcher.gamma,
                    ignore_void=self.matcher.ignore_void,
                    backend=self.backend,
                )
                for (_, masks), group in zip(layers, assignments, strict=True)
            ]
            loss_mask, loss_dice = (torch.cat(values) for values in zip(*pairs, strict=True))
        return LayerLosses(loss_ce, loss_mask, loss_dice, assignment)


def global_num_masks(targets: Targets) -> Tensor:
    """Targets of an average rank's batch, at least 1: what the mask losses are divided by."""
    num_masks = targets.counts.sum().float()
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(num_masks)
        num_masks = num_masks / distributed.get_world_size()
    return num_masks.clamp(min=1)


def _layers(outputs: Mapping[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """Groups of stacked layers, the last layer last."""
    if "class_logits" in outputs and "mask_logits" in outputs:
        yield outputs["class_logits"], outputs["mask_logits"]
        return
    for layer in (*outputs.get("aux_outputs", ()), outputs):
        yield layer["pred_logits"][None], layer["pred_masks"][None]
