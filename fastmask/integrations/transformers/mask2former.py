"""transformers' Mask2Former: matcher and losses at random points, and masked attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, NamedTuple, overload

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers.models.mask2former import modeling_mask2former as hf

from fastmask.functional import mask_products
from fastmask.integrations._replacement import Found, Replacement
from fastmask.integrations.transformers._criteria import plain_outputs, takes_predictions
from fastmask.modules import Predictions
from fastmask.modules.attention import projected_attention

# Up to 5.22 transformers draws a number for each layer even if no layer can be dropped, and so advances the generator
# from which the loss draws its points.
DRAWS_FOR_EVERY_LAYER = Version(transformers.__version__) < Version("5.23")


def _is_known(layer: nn.Module) -> bool:
    return type(layer) is hf.Mask2FormerMaskedAttentionDecoderLayer and type(layer.cross_attn) is nn.MultiheadAttention


@dataclass(frozen=True, eq=False)
class LayerMasks(Sequence[Tensor]):
    """The mask logits of each layer, and the embeddings whose products they are.

    Args:
        mask_logits: ``(B, N, h, w)`` of each layer.
        mask_embeds: ``(B, N, C)`` of each layer.
        pixel_embed: ``(B, C, h, w)``.
    """

    mask_logits: tuple[Tensor, ...]
    mask_embeds: tuple[Tensor, ...]
    pixel_embed: Tensor

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Tensor, ...]: ...

    def __getitem__(self, index: int | slice) -> Tensor | tuple[Tensor, ...]:
        return self.mask_logits[index]

    def __len__(self) -> int:
        return len(self.mask_logits)


class Mask2FormerForUniversalSegmentation(Replacement, hf.Mask2FormerForUniversalSegmentation):
    """The model: hands the criterion its predictions with their embeddings."""

    @classmethod
    def replacements(cls, module: nn.Module, known: type[nn.Module]) -> Iterator[Found]:
        """The model, if its criterion takes such predictions."""
        if takes_predictions(module):
            yield Found(module, known, cls)

    @wraps(hf.Mask2FormerForUniversalSegmentation.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return plain_outputs(super().forward(*args, **kwargs))

    def get_auxiliary_logits(self, classes: tuple[Tensor, ...], output_masks: Sequence[Tensor]) -> list[Any]:
        """The predictions of all layers if the embeddings are known; else of all but the last, as transformers'."""
        if not isinstance(output_masks, LayerMasks):
            return super().get_auxiliary_logits(classes, output_masks)
        layers = zip(classes, output_masks.mask_logits, output_masks.mask_embeds, strict=True)
        return [
            Predictions(class_logits[None], mask_logits[None], (mask_embed[None], output_masks.pixel_embed))
            for class_logits, mask_logits, mask_embed in layers
        ]


class Foreground(NamedTuple):
    """The masks from which transformers would make an attention mask; they take its place.

    Args:
        mask_logits: ``(B, N, h, w)``.
        grid: (height, width) of the keys.
    """

    mask_logits: Tensor
    grid: tuple[int, int]


class CrossAttention(Replacement, nn.MultiheadAttention):
    """The cross-attention of a layer, with the arguments that the layer passes."""

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
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        attended = projected_attention(
            query,
            key,
            value,
            attn_mask.mask_logits,
            self.in_proj_weight,
            self.in_proj_bias,
            grid=attn_mask.grid,
            num_heads=self.num_heads,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.out_proj(attended).transpose(0, 1), None


class Mask2FormerMaskedAttentionDecoder(Replacement, hf.Mask2FormerMaskedAttentionDecoder):
    """The decoder. It passes on mask logits, which the kernel thresholds once for all heads.

    With ``layerdrop``, transformers skips whole layers in training and then fails, because the next layer gets an
    attention mask of another level's size. Here each layer gets a mask of its own level.
    """

    @classmethod
    def replacements(cls, module: nn.Module, known: type[nn.Module]) -> Iterator[Found]:
        """The decoder and the cross-attention of its layers. Layers of the user's own may read the attention mask, so
        their decoder keeps it, and so does one with a forward of its own."""
        layers = list(module.get_submodule("layers").children())
        found = Found(module, known, cls)
        if not found.overridden() and all(map(_is_known, layers)):
            yield found
            for layer in layers:
                yield Found(layer.get_submodule("cross_attn"), nn.MultiheadAttention, CrossAttention)

    def forward(
        self,
        inputs_embeds: Tensor,
        multi_stage_positional_embeddings: list[Tensor],
        pixel_embeddings: Tensor,
        encoder_hidden_states: list[Tensor],
        query_position_embeddings: Tensor,
        feature_size_list: list,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> hf.Mask2FormerMaskedAttentionDecoderOutput | tuple:
        """See transformers' decoder.

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
        output = hf.Mask2FormerMaskedAttentionDecoderOutput(
            last_hidden_state=queries.transpose(1, 0),
            hidden_states=tuple(hidden_states) if settings["output_hidden_states"] else None,
            attentions=tuple(attentions) if settings["output_attentions"] else None,
            intermediate_hidden_states=tuple(normalized),
            masks_queries_logits=LayerMasks(tuple(masks), tuple(mask_embeds), pixel_embeddings),
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
