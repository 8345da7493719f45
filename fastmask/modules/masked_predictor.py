"""Mask2Former's transformer decoder, in which each query attends where its own mask is foreground."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastmask.functional import mask_products
from fastmask.modules.mlp import MLP
from fastmask.modules.pixel_decoder import projection
from fastmask.modules.position_encoding import sine_position_encoding
from fastmask.modules.predictor import MASK_EMBED_LAYERS
from fastmask.modules.resize import resize_bilinear
from fastmask.modules.transformer import MaskedDecoderLayer, layer_stack


class MaskedTransformerPredictor(nn.Module):
    """Mask2Former's transformer decoder and segmentation head (arXiv:2112.01527, section 3.2).

    Query features, query positions and an embedding of each feature level are learned. Layer i attends to feature level
    i % num_levels, where the mask that the queries predicted before this layer is foreground. The first prediction uses
    the query features alone. All predictions share the heads and the norm before them.

    Args:
        input_dim: channels of the feature levels; projected to ``hidden_dim`` if they differ.
        num_classes: K.
        num_levels: the number of feature levels.
        decoder_layers: the number of layers; there is one more prediction.
        num_queries, hidden_dim, ...: as for :class:`fastmask.modules.TransformerPredictor`.
    """

    def __init__(
        self,
        input_dim: int,
        num_classes: int,
        *,
        num_levels: int = 3,
        num_queries: int = 100,
        hidden_dim: int = 256,
        mask_dim: int = 256,
        decoder_layers: int = 9,
        num_heads: int = 8,
        feedforward_dim: int = 2048,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_levels = num_levels
        self.input_proj = nn.ModuleList(projection(input_dim, hidden_dim) for _ in range(num_levels))
        self.level_embed = nn.Embedding(num_levels, hidden_dim)
        self.query_feat = nn.Embedding(num_queries, hidden_dim)
        self.query_embed = nn.Embedding(num_queries, hidden_dim)
        self.layers = layer_stack(MaskedDecoderLayer, decoder_layers, hidden_dim, num_heads, feedforward_dim, dropout)
        self.norm = nn.LayerNorm(hidden_dim)
        self.class_embed = nn.Linear(hidden_dim, num_classes + 1)
        self.mask_embed = MLP(hidden_dim, hidden_dim, mask_dim, MASK_EMBED_LAYERS)

    def forward(
        self,
        levels: Sequence[Tensor],
        pixel_embed: Tensor,
        padding_masks: Sequence[Tensor | None] | None = None,
        *,
        all_layers: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Class logits and mask embeddings; ``mask_products`` of mask and pixel embeddings gives the mask logits.

        Args:
            levels: ``num_levels`` maps ``(B, input_dim, h_i, w_i)``, from coarse to fine; the first layer takes the
                first.
            pixel_embed: ``(B, mask_dim, h, w)``.
            padding_masks: for each level ``(B, h_i, w_i)`` bool, True at cells that are padding, or None.
            all_layers: return every prediction, as deep supervision needs, or only the last (L = 1).

        Returns:
            ``class_logits (L, B, N, K+1)`` and ``mask_embed (L, B, N, mask_dim)``, L = ``decoder_layers`` + 1.

        Raises:
            ValueError: the number of levels is not ``num_levels``.
        """
        if len(levels) != self.num_levels:
            raise ValueError(f"levels has {len(levels)} maps; expected num_levels = {self.num_levels}")
        if padding_masks is None:
            padding_masks = [None] * len(levels)
        grids = [(level.shape[-2], level.shape[-1]) for level in levels]
        memories = [self._memory(i, level, padding_masks[i]) for i, level in enumerate(levels)]
        paddings = [None if mask is None else mask.flatten(1) for mask in padding_masks]
        # Resizing is linear, so it may precede the product with the mask embeddings. It then runs once per image, not
        # once per query and layer, and the product covers only the cells of the level.
        level_embeds = [resize_bilinear(pixel_embed.detach(), grid) for grid in grids]

        query_position = self.query_embed.weight[None]
        queries = self.query_feat.weight.expand(pixel_embed.shape[0], -1, -1)
        outputs = [self.norm(queries)]
        mask_embeds = [self.mask_embed(outputs[-1])]
        for i, layer in enumerate(self.layers):
            level = i % len(levels)
            mask_logits = mask_products(mask_embeds[-1].detach(), level_embeds[level])
            queries = layer(queries, query_position, *memories[level], mask_logits, grids[level], paddings[level])
            outputs.append(self.norm(queries))
            mask_embeds.append(self.mask_embed(outputs[-1]))
        first = 0 if all_layers else -1
        return self.class_embed(torch.stack(outputs[first:])), torch.stack(mask_embeds[first:])

    def _memory(self, index: int, level: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The keys and values ``(B, S, dim)`` of a feature level."""
        values = self.input_proj[index](level).flatten(2).transpose(1, 2) + self.level_embed.weight[index]
        height, width = level.shape[-2:]
        position = sine_position_encoding(
            height, width, values.shape[-1], padding_mask=padding_mask, dtype=values.dtype, device=values.device
        )
        return values + position, values
