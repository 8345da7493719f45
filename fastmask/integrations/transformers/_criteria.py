"""Matchers and criteria with the signatures of transformers' models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastmask.integrations import _random_points
from fastmask.integrations._foreign_targets import Size, average_num_masks, sizes_of
from fastmask.integrations._patching import fixes, original_class
from fastmask.modules import Predictions
from fastmask.modules.matcher import index_pairs
from fastmask.targets import Targets, check_binary

MASKS, CLASSES = "masks_queries_logits", "class_queries_logits"

# The predictions of all layers but the last, as transformers lists them; or those of all layers, as our models hand
# them to our criteria.
Auxiliary = Sequence[Mapping[str, Tensor]] | Sequence[Predictions]


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
        matcher = module.get_submodule("matcher")
        if original_class(matcher) not in matchers:
            raise TypeError(
                f"the matcher of {cls.__name__} is a {type(matcher).__name__}, not a "
                f"{', '.join(known.__name__ for known in matchers)}; fastmask does not know its costs"
            )
        yield module, criteria[cls]


class Matcher(nn.Module):
    """Part of a class that replaces one of transformers' matchers."""

    def match(self, predictions: Predictions, targets: Targets, sizes: Sequence[Size]) -> Tensor:
        """``(L, B, M)`` int64: the query of each target in each layer."""
        raise NotImplementedError

    @torch.no_grad()
    def forward(
        self,
        masks_queries_logits: Tensor,
        class_queries_logits: Tensor,
        mask_labels: Sequence[Tensor],
        class_labels: Sequence[Tensor],
    ) -> list[tuple[Tensor, Tensor]]:
        """For each image (queries, targets), int64 on the CPU, by ascending query."""
        predictions = Predictions(class_queries_logits[None], masks_queries_logits[None])
        targets = make_targets(self, mask_labels, class_labels, class_queries_logits)
        return index_pairs(self.match(predictions, targets, sizes_of(mask_labels))[0])


class Criterion(nn.Module):
    """Part of a class that replaces one of transformers' criteria."""

    loss_shape: tuple[int, ...] = ()  # of mask and dice losses
    get_num_masks: Callable[..., Tensor]

    def layer_losses(
        self, layers: Sequence[Predictions], targets: Targets, counts: Sequence[int], sizes: Sequence[Size]
    ) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
        """Mask and dice losses, summed over the matched pairs, and classification losses; the last layer's come first.

        Args:
            layers: the last one last.
            targets: of the B images.
            counts: targets of each image.
            sizes: (H_b, W_b) of each image's masks.
        """
        raise NotImplementedError

    def named_losses(
        self,
        masks_queries_logits: Tensor,
        class_queries_logits: Tensor,
        mask_labels: Sequence[Tensor],
        class_labels: Sequence[Tensor],
        auxiliary_predictions: Auxiliary | None = None,
    ) -> dict[str, Tensor]:
        """Unweighted losses of all layers under transformers' names, in its order."""
        targets = make_targets(self, mask_labels, class_labels, class_queries_logits)
        layers = layers_of(class_queries_logits, masks_queries_logits, auxiliary_predictions)
        counts = [len(labels) for labels in class_labels]
        losses = self.layer_losses(layers, targets, counts, sizes_of(mask_labels))
        if fixes(self):
            num_masks = average_num_masks(targets)
        else:
            num_masks = self.get_num_masks(class_labels, device=targets.device)
        num_masks = num_masks.view(self.loss_shape)
        named: dict[str, Tensor] = {}
        for layer, (mask, dice, ce) in enumerate(zip(*losses, strict=True)):
            suffix = f"_{layer - 1}" if layer > 0 else ""
            named[f"loss_mask{suffix}"] = mask / num_masks
            named[f"loss_dice{suffix}"] = dice / num_masks
            # A tensor of its own: the model multiplies each loss by its weight in place.
            named[f"loss_cross_entropy{suffix}"] = ce.clone()
        return named


class PointMatcher(_random_points.PointMatcher, Matcher):
    """Part of the classes that replace the matchers at random points."""


class PointLoss(_random_points.PointLoss, Criterion):
    """Part of the classes that replace the criteria at random points."""

    def layer_losses(
        self, layers: Sequence[Predictions], targets: Targets, counts: Sequence[int], sizes: Sequence[Size]
    ) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
        """See :meth:`Criterion.layer_losses`."""
        *earlier, last = layers
        masks, dices, loss_ce = self.losses_at_points([last, *earlier], targets, counts, sizes)
        return masks, dices, loss_ce.unbind()


def layers_of(class_logits: Tensor, mask_logits: Tensor, auxiliary: Auxiliary | None) -> list[Predictions]:
    """The predictions of all layers, the last one last.

    Args:
        class_logits: ``(B, N, K+1)`` of the last layer.
        mask_logits: ``(B, N, h, w)`` of the last layer. A caller who changed either gets the losses of the new logits.
        auxiliary: the predictions of the other layers.
    """
    groups = [group for group in auxiliary or () if isinstance(group, Predictions)]
    if groups:
        last = groups[-1]
        assert last.mask_logits is not None
        if class_logits.is_set_to(last.class_logits[-1]) and mask_logits.is_set_to(last.mask_logits[-1]):
            return groups
        auxiliary = auxiliary_list(groups)
    layers = [layer for layer in auxiliary or () if not isinstance(layer, Predictions)]
    layers.append({CLASSES: class_logits, MASKS: mask_logits})
    return [Predictions(layer[CLASSES][None], layer[MASKS][None]) for layer in layers]


def auxiliary_list(groups: Sequence[Predictions]) -> list[Mapping[str, Tensor]]:
    """The predictions of all layers but the last, as transformers lists them."""
    layers: list[Mapping[str, Tensor]] = []
    for group in groups:
        assert group.mask_logits is not None
        layers += [
            {MASKS: masks, CLASSES: classes}
            for masks, classes in zip(group.mask_logits, group.class_logits, strict=True)
        ]
    return layers[:-1]


def plain_outputs(outputs: Any) -> Any:
    """A model's outputs, a dict or a tuple, with the auxiliary predictions as transformers lists them."""
    if isinstance(outputs, tuple):
        return tuple(auxiliary_list(x) if isinstance(x, list) and _has_predictions(x) else x for x in outputs)
    if outputs.auxiliary_logits is not None and _has_predictions(outputs.auxiliary_logits):
        outputs.auxiliary_logits = auxiliary_list(outputs.auxiliary_logits)
    return outputs


def _has_predictions(layers: Sequence[Any]) -> bool:
    return len(layers) > 0 and isinstance(layers[0], Predictions)


def make_targets(
    module: nn.Module, mask_labels: Sequence[Tensor], class_labels: Sequence[Tensor], class_logits: Tensor
) -> Targets:
    """The container of transformers' lists of labels.

    Args:
        module: a patched matcher or criterion; without ``fix`` it rejects what its own class rejects.
        mask_labels: for each image ``(M_b, H_b, W_b)``.
        class_labels: for each image ``(M_b,)``.
        class_logits: ``(..., K+1)``, on the device of the result.

    Raises:
        TypeError: masks that are not floating point, without ``fix``.
        ValueError: masks that are not binary, or labels that do not fit.
    """
    for b, masks in enumerate(mask_labels):
        if not (masks.is_floating_point() or fixes(module)):
            raise TypeError(
                f"mask_labels[{b}] has dtype {masks.dtype}; transformers takes floating point only, unless the model "
                "is patched with fix=True"
            )
        check_binary(f"mask_labels[{b}]", masks)
    pairs = zip(class_labels, mask_labels, strict=True)
    return Targets.from_list(
        [{"labels": labels, "masks": masks} for labels, masks in pairs],
        num_classes=class_logits.shape[-1] - 1,
        device=class_logits.device,
    )
