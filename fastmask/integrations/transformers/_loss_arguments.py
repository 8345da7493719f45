"""What the losses of transformers' models are called with, and what they return, in fastmask's terms and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from fastmask.integrations._foreign_targets import average_num_masks
from fastmask.integrations._patching import fixes, original_class
from fastmask.targets import Targets, check_binary

MASKS, CLASSES = "masks_queries_logits", "class_queries_logits"


def criterion_replacements(
    module: nn.Module,
    matchers: Mapping[type[nn.Module], type[nn.Module]],
    criteria: Mapping[type[nn.Module], type[nn.Module]],
) -> Iterator[tuple[nn.Module, type[nn.Module]]]:
    """A matcher or a criterion, and the class that it gets.

    Args:
        matchers, criteria: transformers' classes and ours.

    Raises:
        TypeError: a criterion whose matcher is none of the ``matchers``.
    """
    cls = type(module)
    if cls in matchers:
        yield module, matchers[cls]
    if cls in criteria:
        if original_class(module.matcher) not in matchers:
            raise TypeError(
                f"the matcher of {cls.__name__} is a {type(module.matcher).__name__}, not a "
                f"{', '.join(known.__name__ for known in matchers)}; fastmask cannot tell by what costs it matches"
            )
        yield module, criteria[cls]


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
        return average_num_masks(targets)
    return criterion.get_num_masks(class_labels, device=targets.device)


def name_losses(
    loss_mask: Sequence[Tensor], loss_dice: Sequence[Tensor], loss_ce: Sequence[Tensor], num_masks: Tensor
) -> dict[str, Tensor]:
    """Losses under transformers' names, in its order.

    Args:
        loss_mask, loss_dice: sums over pairs of each layer; the last layer comes first, then the others in order.
        loss_ce: of each layer.
        num_masks: what the sums are divided by.
    """
    named = {}
    for layer, losses in enumerate(zip(loss_mask, loss_dice, loss_ce, strict=True)):
        suffix = f"_{layer - 1}" if layer > 0 else ""
        mask, dice, ce = losses
        named[f"loss_mask{suffix}"] = mask / num_masks
        named[f"loss_dice{suffix}"] = dice / num_masks
        # A tensor of its own: the model multiplies each loss by its weight in place.
        named[f"loss_cross_entropy{suffix}"] = ce.clone()
    return named
