"""Mask2Former's pixel decoder: deformable attention between the coarse maps, then one step of a feature pyramid."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from fastmask.modules.deformable_attention import MultiScaleDeformableAttention
from fastmask.modules.pixel_decoder import NORM_GROUPS, ConvNorm, conv_init
from fastmask.modules.position_encoding import sine_position_encoding
from fastmask.modules.resize import resize_bilinear
from fastmask.modules.transformer import PostNormLayer, layer_stack

ENCODED_LEVELS = 3  # the coarsest maps, between which the encoder attends


class DeformableEncoderLayer(PostNormLayer):
    """Multi-scale deformable self-attention and an MLP (Deformable DETR, arXiv:2010.04159, section 4.1).

    Args:
        dim: channels of the tokens.
        num_heads: attention heads; divides ``dim``.
        feedforward_dim: hidden channels of the MLP.
        dropout: dropout probability after each block and inside the MLP.
        num_levels: the number of feature levels.
        num_points: the number of points that a head reads of each level.
    """

    def __init__(
        self, dim: int, num_heads: int, feedforward_dim: int, dropout: float = 0.0, *, num_levels: int, num_points: int
    ) -> None:
        attention = MultiScaleDeformableAttention(dim, num_heads, num_levels, num_points)
        super().__init__(dim, feedforward_dim, dropout, self_attn=attention)

    def forward(
        self,
        tokens: Tensor,
        position: Tensor,
        reference_points: Tensor,
        spatial_shapes: Sequence[tuple[int, int]],
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """``tokens (B, S, dim)`` to the same shape.

        Args:
            tokens: ``(B, S, dim)``, the pixels of all levels.
            position: ``(B or 1, S, dim)``, added to queries.
            reference_points, spatial_shapes, padding_mask: as for :class:`MultiScaleDeformableAttention`.
        """
        attended = self.self_attn(tokens + position, reference_points, tokens, spatial_shapes, padding_mask)
        return self.feed_forward(self.add(tokens, attended, self.norm1), self.norm2)


class DeformablePixelDecoder(nn.Module):
    """Mask2Former's pixel decoder (arXiv:2112.01527, section 4.1). The pixels of the three coarsest maps attend to each
    other by multi-scale deformable attention. The finest of the three is upsampled and added to the backbone's finest
    map, from which a 1 x 1 convolution computes the pixel embeddings; if the backbone has more maps, all that are left
    follow one after another.

    Args:
        channels: channels of the backbone's maps, from fine to coarse; at least two.
        dim: channels of the maps, a multiple of 32 and of ``num_heads``.
        mask_dim: channels of the pixel embeddings.
        encoder_layers: the number of layers of deformable attention.
        num_heads: attention heads of these layers.
        num_points: the number of points that a head reads of each map.
        feedforward_dim: hidden channels of these layers.
        dropout: dropout probability in these layers.

    Raises:
        ValueError: fewer than two maps, or ``dim`` is no such multiple.
    """

    def __init__(
        self,
        channels: Sequence[int],
        dim: int = 256,
        mask_dim: int = 256,
        *,
        encoder_layers: int = 6,
        num_heads: int = 8,
        num_points: int = 4,
        feedforward_dim: int = 1024,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if len(channels) < 2:
            raise ValueError(f"channels is {list(channels)}; expected those of at least two maps of the backbone")
        if dim <= 0 or dim % NORM_GROUPS:
            raise ValueError(f"dim must be a positive multiple of {NORM_GROUPS}, got {dim}")
        self.num_levels = min(ENCODED_LEVELS, len(channels) - 1)
        self.input_proj = nn.ModuleList(_projection(width, dim) for width in channels[: -self.num_levels - 1 : -1])
        self.level_embed = nn.Parameter(torch.randn(self.num_levels, dim))
        layer = partial(DeformableEncoderLayer, num_levels=self.num_levels, num_points=num_points)
        self.encoder = layer_stack(layer, encoder_layers, dim, num_heads, feedforward_dim, dropout)
        for attention in self.encoder.modules():
            if isinstance(attention, MultiScaleDeformableAttention):
                attention.reset_parameters()
        finer = channels[: -self.num_levels]
        self.adapters = nn.ModuleList(ConvNorm(width, dim, 1, relu=False) for width in finer)
        self.layers = nn.ModuleList(ConvNorm(dim, dim, 3, relu=True) for _ in finer)
        self.mask_features = nn.Conv2d(dim, mask_dim, 1)
        conv_init(self.mask_features)

    def forward(
        self, features: Sequence[Tensor], padding_masks: Sequence[Tensor | None] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Pixel embeddings, and the maps that masked attention reads.

        Args:
            features: the backbone's maps ``(B, channels[i], h_i, w_i)`` from fine to coarse.
            padding_masks: for each of them ``(B, h_i, w_i)`` bool, True at padding, which is at the bottom and right,
                or None. The encoder attends to no padding, and counts positions within each image.

        Returns:
            ``pixel_embed (B, mask_dim, h_0, w_0)``, and the encoder's maps ``(B, dim, h_i, w_i)`` from coarse to fine.

        Raises:
            ValueError: another number of maps than ``channels``, or of masks than maps.
        """
        num_maps = self.num_levels + len(self.adapters)
        if len(features) != num_maps:
            raise ValueError(f"features has {len(features)} maps; expected {num_maps}, as many as channels")
        if padding_masks is None:
            padding_masks = [None] * num_maps
        elif len(padding_masks) != num_maps:
            raise ValueError(f"padding_masks has {len(padding_masks)} entries; expected {num_maps}, one for each map")
        coarse = slice(None, -self.num_levels - 1, -1)
        levels = [project(level) for project, level in zip(self.input_proj, features[coarse], strict=True)]
        levels = self.encode(levels, padding_masks[coarse])
        finest = levels[-1]
        for i in range(len(self.adapters) - 1, -1, -1):
            lateral = self.adapters[i](features[i])
            finest = self.layers[i](lateral + resize_bilinear(finest, lateral.shape[-2:]))
        return self.mask_features(finest), levels

    def encode(self, levels: Sequence[Tensor], padding_masks: Sequence[Tensor | None]) -> list[Tensor]:
        """The encoder: maps ``(B, dim, h_i, w_i)`` from coarse to fine to the same shapes."""
        sizes = [(level.shape[-2], level.shape[-1]) for level in levels]
        masks: Sequence[Tensor | None] = padding_masks
        if any(mask is not None for mask in masks):
            masks = [
                level.new_zeros((level.shape[0], *size), dtype=torch.bool) if mask is None else mask
                for level, size, mask in zip(levels, sizes, masks, strict=True)
            ]
        positions = [
            sine_position_encoding(*size, level.shape[1], padding_mask=mask, dtype=level.dtype, device=level.device)
            + embed
            for level, size, mask, embed in zip(levels, sizes, masks, self.level_embed, strict=True)
        ]
        present = [mask for mask in masks if mask is not None]
        padding = torch.cat([mask.flatten(1) for mask in present], 1) if present else None
        points = reference_points(sizes, present, levels[0])
        tokens = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], 1)
        position = torch.cat(positions, 1)
        for layer in self.encoder:
            tokens = layer(tokens, position, points, sizes, padding)
        parts = tokens.split([height * width for height, width in sizes], 1)
        return [part.transpose(1, 2).unflatten(2, size) for part, size in zip(parts, sizes, strict=True)]


def reference_points(sizes: Sequence[tuple[int, int]], padding_masks: Sequence[Tensor], like: Tensor) -> Tensor:
    """The centers of all levels' pixels, as (x, y) in every level (Deformable DETR, arXiv:2010.04159, appendix A.4).

    Args:
        sizes: (height, width) of the L levels.
        padding_masks: for each level ``(B, h_l, w_l)`` bool, True at padding; or none at all. A pixel is at the same
            share of the image without padding in every level.
        like: gives the device; float64 gives float64, other dtypes float32, since bfloat16 does not tell pixels apart.

    Returns:
        ``(B, S, L, 2)``, S pixels in all; ``(1, S, 1, 2)`` without padding.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    centers = []
    for height, width in sizes:
        y, x = ((torch.arange(side, dtype=dtype, device=like.device) + 0.5) / side for side in (height, width))
        centers.append(torch.stack((x.expand(height, -1), y[:, None].expand(-1, width)), -1).flatten(0, 1))
    if not padding_masks:
        return torch.cat(centers)[None, :, None]
    shares = []  # of the image in each level, as (x, y), by its first row and column
    for mask, (height, width) in zip(padding_masks, sizes, strict=True):
        counts = [(~edge).sum(1, dtype=dtype) for edge in (mask[:, 0], mask[:, :, 0])]
        shares.append(torch.stack((counts[0] / width, counts[1] / height), -1))
    positions = [center / share[:, None] for center, share in zip(centers, shares, strict=True)]
    return torch.cat(positions, 1)[:, :, None] * torch.stack(shares, 1)[:, None]


def _projection(input_dim: int, output_dim: int) -> nn.Module:
    """A 1 x 1 convolution and group norm, initialized as in the original."""
    conv = nn.Conv2d(input_dim, output_dim, 1)
    nn.init.xavier_uniform_(conv.weight)
    nn.init.zeros_(conv.get_parameter("bias"))
    return nn.Sequential(conv, nn.GroupNorm(NORM_GROUPS, output_dim))
