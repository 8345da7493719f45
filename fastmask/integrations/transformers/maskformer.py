"""transformers' MaskFormer: matcher and losses of all decoder layers in one call each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.maskformer import modeling_maskformer as hf

from fastmask.functional import assign, class_loss, mask_loss, mask_products
from fastmask.integrations._foreign_targets import Size, mask_term, matching_cost
from fastmask.integrations._replacement import Found, Replacement, options_of
from fastmask.integrations.transformers._criteria import MaskCriterion, MaskMatcher, plain_outputs, takes_predictions
from fastmask.mask_term import MaskTerm
from fastmask.modules import Predictions
from fastmask.targets import Targets


class MaskFormerHungarianMatcher(MaskMatcher):
    """The matcher, by fastmask's kernels."""

    cost_class: float
    cost_mask: float
    cost_dice: float

    def match(self, predictions: Predictions, targets: Targets, sizes: Sequence[Size]) -> Tensor:
        """``(L, B, M)`` int64: the query of each target in each layer."""
        return assign(matching_cost(self, predictions, targets, sizes, term=mask_term(self, "focal")), targets.counts)


class MaskFormerLoss(MaskCriterion):
    """The losses, by fastmask's kernels."""

    matcher: MaskFormerHungarianMatcher
    empty_weight: Tensor

    def points_and_term(self, mask_logits: Tensor) -> tuple[None, MaskTerm]:
        """See :meth:`MaskCriterion.points_and_term`; all pixels count."""
        return None, mask_term(self, "focal")

    def layer_losses(
        self, layers: Sequence[Predictions], targets: Targets, counts: Sequence[int], sizes: Sequence[Size]
    ) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
        """See :meth:`MaskCriterion.layer_losses`."""
        assignments, masks, dices = [], [], []
        for group in layers:
            assignment = self.matcher.match(group, targets, sizes)
            mask_logits, rows = group.matched(targets, assignment)
            loss_mask, loss_dice = mask_loss(mask_logits, targets, rows, num_masks=1.0, term=mask_term(self, "focal"))
            assignments.append(assignment)
            masks.append(loss_mask)
            dices.append(loss_dice)
        class_logits = torch.cat([group.class_logits for group in layers])
        loss_ce = class_loss(class_logits, targets, torch.cat(assignments), class_weights=self.empty_weight)
        return torch.cat(masks).roll(1).unbind(), torch.cat(dices).roll(1).unbind(), loss_ce.roll(1).unbind()


class MaskFormerForInstanceSegmentation(Replacement, hf.MaskFormerForInstanceSegmentation):
    """The model: hands the criterion the predictions of all layers stacked, with their embeddings."""

    @classmethod
    def replacements(cls, module: nn.Module, known: type[nn.Module]) -> Iterator[Found]:
        """The model, if its criterion takes such predictions."""
        if takes_predictions(module):
            yield Found(module, known, cls)

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
        hidden = options_of(self).fix and self.config.use_auxiliary_loss and not shown
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
        outputs = plain_outputs(outputs)
        if not hidden:
            return outputs
        outputs = type(outputs)(**{name: x for name, x in outputs.items() if not name.endswith("hidden_states")})
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return outputs if as_dict else outputs.to_tuple()

    def get_logits(self, outputs: hf.MaskFormerModelOutput) -> tuple[Tensor, Tensor, list[Predictions]]:
        """Class logits and mask logits of the last layer, and the predictions of all layers."""
        if not self.config.use_auxiliary_loss:
            queries = outputs.transformer_decoder_last_hidden_state[None]
        else:
            queries = torch.stack(outputs.transformer_decoder_hidden_states)
        class_logits, mask_embed = self.class_predictor(queries), self.mask_embedder(queries)
        pixel_embed = outputs.pixel_decoder_last_hidden_state
        mask_logits = mask_products(mask_embed, pixel_embed)
        return class_logits[-1], mask_logits[-1], [Predictions(class_logits, mask_logits, (mask_embed, pixel_embed))]
