"""Mask2Former's transformer decoder: each query reads the image where its own mask is foreground."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from fastmask.functional import mask_products
from fastmask.modules.attention import MaskedCrossAttention
from fastmask.modules.mlp import MLP
from fastmask.modules.pixel_decoder import conv_init
from fastmask.modules.position_encoding import sine_position_encoding
from fastmask.modules.predictor import MASK_EMBED_LAYERS
from fastmask.modules.transformer import xavier_init


class MaskedDecoderLayer(nn.Module):
    """Masked cross-attention to the image, self-attention among the queries, and a two-layer perceptron, all post-norm
    (arXiv:2112.01527, section 3.2).

    Args:
        dim: channels of queries and keys.
        num_heads: attention heads; divides ``dim``.
        feedforward_dim: hidden channels of the perceptron.
        dropout: probability, after each block, inside the perceptron and on attention weights.
    """

    def __init__(self, dim: int, num_heads: int, feedforward_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.cross_attn = MaskedCrossAttention(dim, num_heads, dropout)
        self.self_attn = nn.MultiheadAttention(dim, num_heads, dropout, batch_first=True)
        self.linear1 = nn.Linear(dim, feedforward_dim)
        self.linear2 = nn.Linear(feedforward_dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        queries: Tensor,
        query_position: Tensor,
        keys: Tensor,
        values: Tensor,
        mask_logits: Tensor,
        grid: tuple[int, int],
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """``queries (B, N, dim)`` to the same shape.

        Args:
            queries: ``(B, N, dim)``.
            query_position: ``(1, N, dim)``, added wherever queries serve as attention queries or keys.
            keys: ``(B, S, dim)``, the feature level with its position encoding.
            values: ``(B, S, dim)``, the feature level itself.
            mask_logits: ``(B, N, h, w)``, the queries' masks so far.
            grid: (height, width) of the feature level.
            padding_mask: ``(B, S)`` bool, True at cells that are not attended to.
        """
        attended = self.cross_attn(
            queries + query_position, keys, values, mask_logits, grid=grid, key_padding_mask=padding_mask
        )
        queries = self.norm1(queries + self.dropout(attended))
        query = queries + query_position
        attended = self.self_attn(query, query, queries, need_weights=False)[0]
        queries = self.norm2(queries + self.dropout(attended))
        hidden = self.dropout(self.linear1(queries).relu())
        return self.norm3(queries + self.dropout(self.linear2(hidden)))


class MaskedTransformerPredictor(nn.Module):
    """Mask2Former's transformer decoder and segmentation head (arXiv:2112.01527, section 3.2).

    Query features and query positions are learned. Layer i attends to feature level i modulo their number, each with a
    learned embedding of its own, and only where the mask that is predicted from the queries before the layer is
    foreground. The first prediction is that of the query features alone. The heads and the norm before them are shared
    by all predictions.

    Args:
        input_dim: channels of the feature levels; projected to ``hidden_dim`` if they differ.
        num_classes: K.
        num_levels: of feature maps.
        num_queries: N.
        hidden_dim: channels of the transformer, a multiple of 4 and of ``num_heads``.
        mask_dim: channels of the pixel embeddings.
        decoder_layers: there is one prediction more.
        num_heads: attention heads.
        feedforward_dim: hidden channels of the transformer's perceptrons.
        dropout: of the transformer.
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
        self.input_proj = nn.ModuleList(nn.Identity() for _ in range(num_levels))
        if input_dim != hidden_dim:
            self.input_proj = nn.ModuleList(nn.Conv2d(input_dim, hidden_dim, 1) for _ in range(num_levels))
            for projection in self.input_proj:
                conv_init(projection)
        self.level_embed = nn.Embedding(num_levels, hidden_dim)
        self.query_feat = nn.Embedding(num_queries, hidden_dim)
        self.query_embed = nn.Embedding(num_queries, hidden_dim)
        self.layers = nn.ModuleList(
            MaskedDecoderLayer(hidden_dim, num_heads, feedforward_dim, dropout) for _ in range(decoder_layers)
        )
        xavier_init(self.layers)
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
        """Class logits and mask embedding of every query; the mask logits are ``mask_products`` of these with the pixel
        embeddings.

        Args:
            levels: ``num_levels`` maps ``(B, input_dim, h_i, w_i)``, the first layer's first: coarse to fine.
            pixel_embed: ``(B, mask_dim, h, w)``.
            padding_masks: of each level ``(B, h_i, w_i)`` bool, True at cells that are padding, or None.
            all_layers: return every prediction, as deep supervision needs, or the last alone (L = 1).

        Returns:
            ``class_logits (L, B, N, K+1)`` and ``mask_embed (L, B, N, mask_dim)``, L = ``decoder_layers`` + 1.

        Raises:
            ValueError: another number of levels.
        """
        if len(levels) != self.num_levels:
            raise ValueError(f"levels has {len(levels)} maps; expected num_levels = {self.num_levels}")
        if padding_masks is None:
            padding_masks = [None] * len(levels)
        grids = [tuple(level.shape[-2:]) for level in levels]
        memories = [self._memory(i, level, padding_masks[i]) for i, level in enumerate(levels)]
        paddings = [None if mask is None else mask.flatten(1) for mask in padding_masks]
        # Resampling is linear, so it may come before the product with the mask embeddings: once for an image instead of
        # once for each query and layer, and the product is made for the cells of the level alone.
        level_embeds = [_resized(pixel_embed.detach(), grid) for grid in grids]

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
        position = sine_position_encoding(
            *level.shape[-2:], values.shape[-1], padding_mask=padding_mask, dtype=values.dtype, device=values.device
        )
        return values + position, values


def _resized(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    return interpolate(maps, size=grid, mode="bilinear", align_corners=False)
