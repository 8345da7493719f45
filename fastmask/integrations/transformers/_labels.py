"""What the losses of transformers' models are called with, and what they return, in fastmask's terms and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fastmask.integrations._labels import check_binary
from fastmask.integrations._patching import fixes
from fastmask.modules.criterion import global_num_masks
from fastmask.targets import Targets

MASKS, CLASSES = "masks_queries_logits", "class_queries_logits"


class LayerLogits(list):
    """Auxiliary predictions as transformers' models list them, which know the stacked tensors that they are views of.

    Args:
        class_logits: ``(L, B, N, K+1)`` of all decoder layers, the last one last.
        mask_logits: ``(L, B, N, h, w)``.
    """

    def __init__(self, class_logits: Tensor, mask_logits: Tensor) -> None:
        pairs = zip(class_logits[:-1], mask_logits[:-1], strict=True)
        super().__init__({MASKS: masks, CLASSES: classes} for classes, masks in pairs)
        self.class_logits = class_logits
        self.mask_logits = mask_logits


def layers_of(
    class_logits: Tensor, mask_logits: Tensor, auxiliary_predictions: Sequence[Mapping[str, Tensor]] | None
) -> list[tuple[Tensor, Tensor]]:
    """(class_logits, mask_logits) of each decoder layer, the last one last."""
    layers = [(layer[CLASSES], layer[MASKS]) for layer in auxiliary_predictions or ()]
    return [*layers, (class_logits, mask_logits)]


def make_targets(
    criterion: nn.Module,
    mask_labels: Sequence[Tensor],
    class_labels: Sequence[Tensor],
    num_classes: int,
    device: torch.device,
) -> Targets:
    """The container of transformers' lists of labels.

    Args:
        criterion: a patched module; unless it is to be fixed it rejects what its own class rejects.
        mask_labels: for each image ``(M_b, H_b, W_b)``.
        class_labels: for each image ``(M_b,)``.

    Raises:
        TypeError: masks that are not floating point, unless defects are to be fixed.
        ValueError: masks that are not binary, or labels that do not fit.
    """
    for b, masks in enumerate(mask_labels):
        if not (masks.is_floating_point() or fixes(criterion)):
            raise TypeError(
                f"mask_labels[{b}] has dtype {masks.dtype}; transformers takes floating point only, unless the model "
                "is patched with fix=True"
            )
        check_binary(f"mask_labels[{b}]", masks)
    pairs = zip(class_labels, mask_labels, strict=True)
    return Targets.from_list(
        [{"labels": labels, "masks": masks} for labels, masks in pairs], num_classes=num_classes, device=device
    )


def num_masks_of(criterion: nn.Module, class_labels: Sequence[Tensor], targets: Targets) -> Tensor:
    """What the sums over pairs are divided by: as transformers has it, or as it is meant to be."""
    if fixes(criterion):
        return global_num_masks(targets)
    return criterion.get_num_masks(class_labels, device=targets.device)


def name_losses(loss_mask: Tensor, loss_dice: Tensor, loss_ce: Tensor, num_masks: Tensor) -> dict[str, Tensor]:
    """Losses under transformers' names, in its order; the last layer's have no suffix.

    Args:
        loss_mask, loss_dice: ``(L,)`` sums over pairs.
        loss_ce: ``(L,)``.
        num_masks: what the sums are divided by.
    """
    num_layers = loss_ce.shape[0]
    named = {}
    for layer, suffix in ((num_layers - 1, ""), *((i, f"_{i}") for i in range(num_layers - 1))):
        named[f"loss_mask{suffix}"] = loss_mask[layer] / num_masks
        named[f"loss_dice{suffix}"] = loss_dice[layer] / num_masks
        # A tensor of its own: the model multiplies each loss by its weight in place.
        named[f"loss_cross_entropy{suffix}"] = loss_ce[layer].clone()
    return named
