"""transformers' Mask2Former: matcher and losses at random points, and masked attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers.models.mask2former import modeling_mask2former as hf

from fastmask.functional import mask_products
from fastmask.integrations.transformers._loss_arguments import criterion_replacements
from fastmask.integrations.transformers._point_losses import FactoredLayers, PointLoss, PointMatcher
from fastmask.modules import MaskedCrossAttention

# Up to 5.22 transformers draws a number for each layer even where no layer is to be dropped, which moves on the
# generator that the loss draws its points from.
DRAWS_FOR_EVERY_LAYER = Version(transformers.__version__) < Version("5.23")


def replacements(module: nn.Module) -> Iterator[tuple[nn.Module, type[nn.Module]]]:
    """Which modules get which class; see ``fastmask.integrations._patching``."""
    matchers = {hf.Mask2FormerHungarianMatcher: Mask2FormerHungarianMatcher}
    yield from criterion_replacements(module, matchers, {hf.Mask2FormerLoss: Mask2FormerLoss})
    # Layers of the user's own may read the attention mask, so they keep it.
    if type(module) is hf.Mask2FormerMaskedAttentionDecoder and all(map(_is_known, module.layers)):
        yield module, Mask2FormerMaskedAttentionDecoder
        for layer in module.layers:
            yield layer.cross_attn, CrossAttention
    if type(module) is hf.Mask2FormerForUniversalSegmentation:
        yield module, Mask2FormerForUniversalSegmentation


def _is_known(layer: nn.Module) -> bool:
    return type(layer) is hf.Mask2FormerMaskedAttentionDecoderLayer and type(layer.cross_attn) is nn.MultiheadAttention


class Mask2FormerHungarianMatcher(PointMatcher, hf.Mask2FormerHungarianMatcher):
    """The matcher, by fastmask's kernels."""


class Mask2FormerLoss(PointLoss, hf.Mask2FormerLoss):
    """The losses, by fastmask's kernels."""


class LayerMasks(tuple):
    """Mask logits of each layer, which know their factors: mask embeddings ``(B, N, C)`` and pixel embeddings
    ``(B, C, h, w)`` of each."""

    factors: list[tuple[Tensor, Tensor]]


class Mask2FormerForUniversalSegmentation(hf.Mask2FormerForUniversalSegmentation):
    """The model: hands the criterion the factors of its mask logits. Named as its own class is, since
    ``save_pretrained`` writes the class's name."""

    def get_auxiliary_logits(self, classes: tuple[Tensor, ...], output_masks: tuple[Tensor, ...]) -> list:
        """Predictions of all layers but the last."""
        predictions = super().get_auxiliary_logits(classes, output_masks)
        if not isinstance(output_masks, LayerMasks):
            return predictions
        return FactoredLayers(predictions, output_masks[-1], output_masks.factors)


class Foreground(NamedTuple):
    """What takes the place of the attention mask: the masks that it would be made of.

    Args:
        mask_logits: ``(B, N, h, w)``.
        grid: (height, width) of the keys.
    """

    mask_logits: Tensor
    grid: tuple[int, int]


class CrossAttention(MaskedCrossAttention, nn.MultiheadAttention):
    """The cross-attention of a layer, with the arguments that the layer passes."""

    backend = "auto"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Foreground | Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """``(N, B, E)`` and, where the mask is :class:`Foreground`, no weights.

        Args:
            query: ``(N, B, E)``.
            key, value: ``(S, B, E)``.
            attn_mask: the previous layer's masks; or any mask that ``nn.MultiheadAttention`` takes.
        """
        if not isinstance(attn_mask, Foreground):
            return nn.MultiheadAttention.forward(
                self, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        attended = super().forward(query, key, value, attn_mask.mask_logits, grid=attn_mask.grid)
        return attended.transpose(0, 1), None


class Mask2FormerMaskedAttentionDecoder(hf.Mask2FormerMaskedAttentionDecoder):
    """The decoder, which hands masks on as they are: the kernel thresholds them, once for all heads.

    With dropout, transformers drops whole layers in training, and then fails, as the next layer finds the attention
    mask of another level's size. Here it gets its own.
    """

    def forward(
        self,
        inputs_embeds: Tensor | None = None,
        multi_stage_positional_embeddings: list[Tensor] | None = None,
        pixel_embeddings: Tensor | None = None,
        encoder_hidden_states: list[Tensor] | None = None,
        query_position_embeddings: Tensor | None = None,
        feature_size_list: list | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> hf.Mask2FormerMaskedAttentionDecoderOutput | tuple:
        """As the decoder's own.

        Args:
            inputs_embeds: ``(N, B, E)``, the queries.
            multi_stage_positional_embeddings: of each level ``(S, B, E)``.
            pixel_embeddings: ``(B, C, h, w)``.
            encoder_hidden_states: of each level ``(S, B, E)``.
            query_position_embeddings: ``(N, B, E)``.
            feature_size_list: (height, width) of each level.
            output_attentions, output_hidden_states, return_dict: the configuration's by default.
        """
        settings = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        settings = {name: getattr(self.config, name) if value is None else value for name, value in settings.items()}
        queries = inputs_embeds
        hidden_states, attentions = [], []
        normalized = [self.layernorm(queries)]
        mask_embeds = [self.embed_masks(normalized[0])]
        masks = [mask_products(mask_embeds[0], pixel_embeddings)]
        for index, layer in enumerate(self.layers):
            hidden_states.append(queries)
            may_drop = self.training and self.layerdrop > 0
            if (may_drop or DRAWS_FOR_EVERY_LAYER) and torch.rand([]) < self.layerdrop and may_drop:
                continue
            level = index % self.num_feature_levels
            outputs = layer(
                queries,
                level,
                None,
                multi_stage_positional_embeddings,
                query_position_embeddings,
                encoder_hidden_states,
                encoder_attention_mask=Foreground(masks[-1].detach(), tuple(feature_size_list[level])),
                output_attentions=settings["output_attentions"],
            )
            queries = outputs[0]
            attentions += outputs[1:2]
            normalized.append(self.layernorm(queries))
            mask_embeds.append(self.embed_masks(normalized[-1]))
            masks.append(mask_products(mask_embeds[-1], pixel_embeddings))
        hidden_states.append(queries)
        layer_masks = LayerMasks(masks)
        layer_masks.factors = [(mask_embed, pixel_embeddings) for mask_embed in mask_embeds]
        output = hf.Mask2FormerMaskedAttentionDecoderOutput(
            last_hidden_state=queries.transpose(1, 0),
            hidden_states=tuple(hidden_states) if settings["output_hidden_states"] else None,
            attentions=tuple(attentions) if settings["output_attentions"] else None,
            intermediate_hidden_states=tuple(normalized),
            masks_queries_logits=layer_masks,
        )
        as_dict = self.config.return_dict if return_dict is None else return_dict
        if as_dict:
            return output
        in_order = (
            output.last_hidden_state,
            output.hidden_states,
            output.attentions,
            output.intermediate_hidden_states,
            output.masks_queries_logits,
        )
        return tuple(value for value in in_order if value is not None)

    def embed_masks(self, normalized: Tensor) -> Tensor:
        """``(B, N, C)`` mask embeddings of the queries ``(N, B, E)``."""
        return self.mask_predictor.mask_embedder(normalized.transpose(0, 1))
