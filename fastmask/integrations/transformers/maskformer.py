"""transformers' MaskFormer: matcher and losses of all decoder layers in one call each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.maskformer import modeling_maskformer as hf

from fastmask.functional import assign, class_loss, mask_cost, mask_loss, mask_products, matched_mask_logits
from fastmask.integrations._foreign_targets import cost_of_images, sizes_of
from fastmask.integrations._patching import fixes, original_class
from fastmask.integrations.transformers._loss_arguments import (
    CLASSES,
    MASKS,
    criterion_replacements,
    layers_of,
    make_targets,
    name_losses,
    num_masks_of,
)
from fastmask.modules.matcher import index_pairs
from fastmask.targets import Targets


def replacements(module: nn.Module) -> Iterator[tuple[nn.Module, type[nn.Module]]]:
    """Which modules get which class; see ``fastmask.integrations._patching``."""
    matchers = {hf.MaskFormerHungarianMatcher: MaskFormerHungarianMatcher}
    yield from criterion_replacements(module, matchers, {hf.MaskFormerLoss: MaskFormerLoss})
    # With a criterion of the user's own, the model's logits are left as they are.
    is_model = type(module) is hf.MaskFormerForInstanceSegmentation
    if is_model and original_class(module.criterion) is hf.MaskFormerLoss:
        yield module, MaskFormerForInstanceSegmentation


class MaskFormerHungarianMatcher(hf.MaskFormerHungarianMatcher):
    """The matcher, by fastmask's kernels."""

    @torch.no_grad()
    def forward(
        self,
        masks_queries_logits: Tensor,
        class_queries_logits: Tensor,
        mask_labels: Sequence[Tensor],
        class_labels: Sequence[Tensor],
    ) -> list[tuple[Tensor, Tensor]]:
        """For each image (queries, targets), int64 on the CPU, by ascending query."""
        num_classes = class_queries_logits.shape[-1] - 1
        targets = make_targets(self, mask_labels, class_labels, num_classes, masks_queries_logits.device)
        cost = self.cost(class_queries_logits[None], masks_queries_logits[None], targets, sizes_of(mask_labels))
        return index_pairs(assign(cost[0], targets.counts))

    def cost(
        self, class_logits: Tensor, mask_logits: Tensor, targets: Targets, sizes: Sequence[tuple[int, int]]
    ) -> Tensor:
        """``(L, B, N, M)``: the matching cost.

        Args:
            class_logits: ``(L, B, N, K+1)``.
            mask_logits: ``(L, B, N, h, w)``.
            targets: of the B images.
            sizes: (H_b, W_b) of each image's masks, which are matched without the padding that the losses see.
        """

        def cost(class_logits: Tensor, mask_logits: Tensor, targets: Targets, images: slice) -> Tensor:
            return mask_cost(
                class_logits,
                mask_logits,
                targets,
                cost_class=self.cost_class,
                cost_mask=self.cost_mask,
                cost_dice=self.cost_dice,
            )

        return cost_of_images(cost, class_logits, mask_logits, targets, sizes)


class MaskFormerLoss(hf.MaskFormerLoss):
    """The losses, by fastmask's kernels."""

    def forward(
        self,
        masks_queries_logits: Tensor,
        class_queries_logits: Tensor,
        mask_labels: Sequence[Tensor],
        class_labels: Sequence[Tensor],
        auxiliary_predictions: Sequence[Mapping[str, Tensor]] | None = None,
    ) -> dict[str, Tensor]:
        """Unweighted losses under transformers' names, of all layers."""
        targets = make_targets(self, mask_labels, class_labels, self.num_labels, masks_queries_logits.device)
        sizes = sizes_of(mask_labels)
        last = (class_queries_logits, masks_queries_logits)
        layers = auxiliary_predictions
        # Not where the caller puts other logits in the place of the last layer's.
        if isinstance(layers, FactoredLogits) and all(x is y for x, y in zip(last, layers.last, strict=True)):
            class_logits = layers.class_logits
            assignment = self.match([(class_logits, layers.mask_logits)], targets, sizes)
            logits, rows = matched_mask_logits(layers.mask_embed, layers.pixel_embed, targets, assignment)
            loss_mask, loss_dice = mask_loss(logits, targets, rows, num_masks=1.0)
        else:
            layers = layers_of(*last, auxiliary_predictions)
            class_logits = torch.stack([classes for classes, _ in layers])
            assignment = self.match([(classes[None], masks[None]) for classes, masks in layers], targets, sizes)
            pairs = [
                mask_loss(masks, targets, queries, num_masks=1.0)
                for (_, masks), queries in zip(layers, assignment, strict=True)
            ]
            loss_mask, loss_dice = map(torch.stack, zip(*pairs, strict=True))
        loss_ce = class_loss(class_logits, targets, assignment, class_weights=self.empty_weight)
        losses = [values.roll(1) for values in (loss_mask, loss_dice, loss_ce)]
        return name_losses(*losses, num_masks_of(self, class_labels, targets))

    def match(
        self, groups: Sequence[tuple[Tensor, Tensor]], targets: Targets, sizes: Sequence[tuple[int, int]]
    ) -> Tensor:
        """``(L, B, M)`` int64: the query of each target, from stacked class and mask logits of groups of layers."""
        cost = torch.cat([self.matcher.cost(*logits, targets, sizes) for logits in groups])
        return assign(cost, targets.counts)


class FactoredLogits(list):
    """Auxiliary predictions as the model lists them, which know the stacked logits of all layers, and the factors of
    the mask logits.

    Args:
        class_logits: ``(L, B, N, K+1)`` of all decoder layers, the last one last.
        mask_embed: ``(L, B, N, C)``.
        pixel_embed: ``(B, C, h, w)``.
    """

    def __init__(self, class_logits: Tensor, mask_embed: Tensor, pixel_embed: Tensor) -> None:
        self.class_logits = class_logits
        self.mask_logits = mask_products(mask_embed, pixel_embed)
        self.mask_embed = mask_embed
        self.pixel_embed = pixel_embed
        *earlier, self.last = zip(self.class_logits, self.mask_logits, strict=True)
        super().__init__({MASKS: masks, CLASSES: classes} for classes, masks in earlier)


class MaskFormerForInstanceSegmentation(hf.MaskFormerForInstanceSegmentation):
    """The model: hands the criterion its logits stacked, with their factors. Named as its own class is, since
    ``save_pretrained`` writes the class's name."""

    def forward(
        self,
        pixel_values: Tensor,
        mask_labels: list[Tensor] | None = None,
        class_labels: list[Tensor] | None = None,
        pixel_mask: Tensor | None = None,
        output_auxiliary_logits: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> hf.MaskFormerForInstanceSegmentationOutput | tuple:
        """As the model's own; with ``fix``, auxiliary losses do not need hidden states to be asked for."""
        shown = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        hidden = fixes(self) and self.config.use_auxiliary_loss and not shown
        outputs = super().forward(
            pixel_values,
            mask_labels,
            class_labels,
            pixel_mask=pixel_mask,
            output_auxiliary_logits=output_auxiliary_logits,
            output_hidden_states=True if hidden else output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True if hidden else return_dict,
            **kwargs,
        )
        if not hidden:
            return outputs
        outputs = type(outputs)(**{name: x for name, x in outputs.items() if not name.endswith("hidden_states")})
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return outputs if as_dict else outputs.to_tuple()

    def get_logits(self, outputs: hf.MaskFormerModelOutput) -> tuple[Tensor, Tensor, list[dict[str, Tensor]]]:
        """Class logits and mask logits of the last layer, and the auxiliary predictions."""
        if not self.config.use_auxiliary_loss:
            queries = outputs.transformer_decoder_last_hidden_state[None]
        else:
            queries = torch.stack(outputs.transformer_decoder_hidden_states)
        layers = FactoredLogits(
            self.class_predictor(queries), self.mask_embedder(queries), outputs.pixel_decoder_last_hidden_state
        )
        return *layers.last, layers
