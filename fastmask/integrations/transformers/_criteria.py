"""Matchers and criteria with the signatures of transformers' models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastmask.integrations import _random_points
from fastmask.integrations._foreign_targets import (
    MAX_BYTE_TARGETS,
    Pairs,
    Size,
    average_num_masks,
    device_pairs,
    mask_term,
    matched_masks,
    pair_losses,
    sizes_of,
    targets_of_masks,
    targets_of_segments,
)
from fastmask.integrations._known import find
from fastmask.integrations._replacement import Replacement, options_of
from fastmask.mask_term import MaskTerm
from fastmask.modules import Predictions
from fastmask.targets import Targets

MASKS, CLASSES = "masks_queries_logits", "class_queries_logits"

# The methods of transformers' criteria that ours call, or that call ours: a subclass may override them.
CALLED = {"forward", "get_num_masks", "loss_contrastive"}

MAX_TARGETS = 2**15  # of a segment map in a wider type than a byte

# The predictions of all layers but the last, as transformers lists them; or those of all layers, as our models hand
# them to our criteria.
Auxiliary = Sequence[Mapping[str, Tensor]] | Sequence[Predictions]


class MaskMatcher(Replacement, nn.Module):
    """Part of the classes that replace transformers' matchers."""

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
    ) -> Pairs:
        """For each image (queries, targets), int64 on the device of the logits, by ascending query."""
        predictions = Predictions(class_queries_logits[None], masks_queries_logits[None])
        targets = make_targets(self, mask_labels, class_labels, class_queries_logits)
        assignment = self.match(predictions, targets, sizes_of(mask_labels))[0]
        return device_pairs(assignment, [len(labels) for labels in class_labels], class_queries_logits.shape[1])


class MaskCriterion(Replacement, nn.Module):
    """Part of the classes that replace transformers' criteria."""

    loss_shape: tuple[int, ...] = ()  # of mask and dice losses
    get_num_masks: Callable[..., Tensor]
    matcher_class = MaskMatcher
    matcher: Any

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Unweighted losses under transformers' names, of all layers.

        All at once, unless a subclass has its own way of computing a part of them: then transformers' method calls
        each part.
        """
        if not computes_all(self):
            return super().forward(*args, **kwargs)
        return self.all_losses(*args, **kwargs)

    def all_losses(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """What ``forward`` returns, with its arguments."""
        return self.named_losses(*args, **kwargs)

    def loss_masks(
        self, masks_queries_logits: Tensor, mask_labels: Sequence[Tensor], indices: Pairs, num_masks: Tensor | float
    ) -> dict[str, Tensor]:
        """The mask and dice losses of one layer, of whose queries and targets the ``indices`` are pairs."""
        no_labels = [masks.new_zeros(most_targets(masks), dtype=torch.int64) for masks in mask_labels]
        targets = make_targets(self, mask_labels, no_labels, masks_queries_logits.new_empty(0, 2))
        queries = torch.cat([queries for queries, _ in indices])
        images = torch.cat([torch.full_like(queries, b) for b, (queries, _) in enumerate(indices)])
        mask_logits = masks_queries_logits[images, queries]
        masks, valid = matched_masks(targets, indices)
        points, term = self.points_and_term(mask_logits)
        loss_mask, loss_dice = pair_losses(mask_logits, masks, points, term=term, valid=valid)
        return {"loss_mask": loss_mask.sum() / num_masks, "loss_dice": loss_dice.sum() / num_masks}

    def points_and_term(self, mask_logits: Tensor) -> tuple[Tensor | None, MaskTerm]:
        """The points ``(T, P, 2)`` of the matched queries' masks ``(T, h, w)``, if there are any, and the mask term."""
        raise NotImplementedError

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
        if options_of(self).fix:
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


def most_targets(labels: Tensor) -> int:
    """The number of masks ``(M, H, W)``, or how many a segment map ``(H, W)`` tells apart."""
    if labels.dim() == 3:
        return len(labels)
    return MAX_BYTE_TARGETS if labels.dtype == torch.uint8 else MAX_TARGETS


class PointMatcher(_random_points.PointMatcher, MaskMatcher):
    """Part of the classes that replace the matchers at random points."""


class PointLoss(_random_points.PointLoss, MaskCriterion):
    """Part of the classes that replace the criteria at random points."""

    sample_points_using_uncertainty: Callable[..., Tensor]
    calculate_uncertainty: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def points_and_term(self, mask_logits: Tensor) -> tuple[Tensor, MaskTerm]:
        """See :meth:`MaskCriterion.points_and_term`; the points are transformers' own."""
        settings = (self.num_points, self.oversample_ratio, self.importance_sample_ratio)
        planes = mask_logits[:, None].float()
        points = self.sample_points_using_uncertainty(planes, self.calculate_uncertainty, *settings)
        return points, mask_term(self, "bce")

    def layer_losses(
        self, layers: Sequence[Predictions], targets: Targets, counts: Sequence[int], sizes: Sequence[Size]
    ) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
        """See :meth:`MaskCriterion.layer_losses`."""
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


def computes_all(criterion: nn.Module) -> bool:
    """Whether a criterion, patched or about to be, may compute its losses all at once: fastmask knows its class and its
    matcher's, and no subclass overrides a part of either."""
    found, matcher = find(criterion), find(criterion.get_submodule("matcher"))
    if found is None or matcher is None or not issubclass(found.replacement, MaskCriterion):
        return False
    return set(found.overridden()) <= CALLED and "forward" not in matcher.overridden()


def takes_predictions(model: nn.Module) -> bool:
    """Whether a model's criterion is one of ours that takes ``Predictions`` instead of auxiliary logits."""
    criterion = getattr(model, "criterion", None)
    found = find(criterion) if isinstance(criterion, nn.Module) else None
    return found is not None and computes_all(found.module) and "forward" not in found.overridden()


def make_targets(
    module: nn.Module, mask_labels: Sequence[Tensor], class_labels: Sequence[Tensor], class_logits: Tensor
) -> Targets:
    """The container of transformers' labels.

    Args:
        module: a patched matcher or criterion; without ``fix`` it rejects what its own class rejects.
        mask_labels: for each image ``(M_b, H_b, W_b)`` masks or a segment map ``(H_b, W_b)``; or ``(B, H, W)`` of maps.
        class_labels: for each image ``(M_b,)``.
        class_logits: ``(..., K+1)``, on the device of the result.

    Raises:
        TypeError: masks that are not floating point, without ``fix``.
        ValueError: masks that are not binary, or labels that do not fit.
    """
    device, num_classes, options = class_logits.device, class_logits.shape[-1] - 1, options_of(module)
    if all(masks.dim() == 2 for masks in mask_labels):
        return targets_of_segments(mask_labels, class_labels, num_classes=num_classes, device=device)
    for b, masks in enumerate(mask_labels):
        if not (masks.is_floating_point() or options.fix):
            raise TypeError(
                f"mask_labels[{b}] has dtype {masks.dtype}; transformers takes floating point only, unless the model "
                "is patched with fix=True"
            )
    return targets_of_masks(
        "mask_labels[{}]",
        mask_labels,
        class_labels,
        num_classes=num_classes,
        device=device,
        ignore_void=options.ignore_void,
    )
