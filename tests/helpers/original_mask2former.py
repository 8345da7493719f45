"""Mask2Former as the papers and the names in its authors' checkpoints describe it, written for tests alone. Every
weight's name is theirs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmask.modules import MLP
from fastmask.reference.deformable_attention import deformable_attention
from tests.helpers.original_maskformer import ConvNorm, gn, sequence

LEVELS, POINTS = 3, 4


class DeformableAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.sampling_offsets = nn.Linear(dim, heads * LEVELS * POINTS * 2)
        self.attention_weights = nn.Linear(dim, heads * LEVELS * POINTS)
        self.value_proj, self.output_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, query, centers, tokens, sizes):
        offsets = self.sampling_offsets(query).unflatten(-1, (self.heads, LEVELS, POINTS, 2))
        scale = torch.tensor([[width, height] for height, width in sizes])[:, None]
        weights = self.attention_weights(query).unflatten(-1, (self.heads, -1)).softmax(-1)
        values = self.value_proj(tokens).unflatten(-1, (self.heads, -1))
        points = centers[None, :, None, None, None] + offsets / scale
        return self.output_proj(deformable_attention(values, sizes, points, weights.unflatten(-1, (LEVELS, POINTS))))


class EncoderLayer(nn.Module):
    def __init__(self, dim, heads, hidden):
        super().__init__()
        self.self_attn = DeformableAttention(dim, heads)
        self.linear1, self.linear2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x, position, centers, sizes):
        x = self.norm1(x + self.self_attn(x + position, centers, x, sizes))
        return self.norm2(x + self.linear2(self.linear1(x).relu()))


class PixelDecoder(nn.Module):
    def __init__(self, channels, dim, mask_dim, heads, hidden, layers):
        super().__init__()
        self.input_proj = nn.ModuleList(nn.Sequential(nn.Conv2d(width, dim, 1), gn(dim)) for width in channels[:0:-1])
        self.transformer = nn.Module()
        self.transformer.level_embed = nn.Parameter(torch.randn(LEVELS, dim))
        self.transformer.encoder = nn.Module()
        self.transformer.encoder.layers = nn.ModuleList(EncoderLayer(dim, heads, hidden) for _ in range(layers))
        self.mask_features = nn.Conv2d(dim, mask_dim, 1)
        self.adapter_1 = ConvNorm(channels[0], dim, 1, norm=gn(dim))
        self.layer_1 = ConvNorm(dim, dim, 3, padding=1, norm=gn(dim))

    def forward(self, maps):
        levels = [project(level) for project, level in zip(self.input_proj, maps[:0:-1], strict=True)]
        sizes = [tuple(level.shape[-2:]) for level in levels]
        tokens, positions = zip(*(sequence(level) for level in levels), strict=True)
        x = torch.cat(tokens).transpose(0, 1)
        position = torch.cat([p + embed for p, embed in zip(positions, self.transformer.level_embed, strict=True)])
        centers = torch.cat([pixel_centers(*size).to(x) for size in sizes])
        for layer in self.transformer.encoder.layers:
            x = layer(x, position.transpose(0, 1), centers, sizes)
        parts = x.split([height * width for height, width in sizes], 1)
        levels = [part.transpose(1, 2).unflatten(2, size) for part, size in zip(parts, sizes, strict=True)]
        lateral = self.adapter_1(maps[0])
        finest = lateral + F.interpolate(levels[-1], lateral.shape[-2:], mode="bilinear", align_corners=False)
        return self.mask_features(self.layer_1(finest).relu()), levels


def pixel_centers(height: int, width: int) -> Tensor:
    """``(height * width, 2)`` as (x, y)."""
    y, x = ((torch.arange(side).double() + 0.5) / side for side in (height, width))
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)


def layer_list(count, **parts):
    layers = nn.ModuleList(nn.Module() for _ in range(count))
    for layer in layers:
        for name, make in parts.items():
            layer.add_module(name, make())
    return layers


class OriginalMask2Former(nn.Module):
    """``forward``: normalized pixels to (class logits, mask logits) of the last layer."""

    def __init__(self, backbone, *, classes, queries, dim, conv_dim, mask_dim, heads, hidden, layers, encoder_layers):
        super().__init__()
        self.backbone = backbone
        self.heads = heads
        self.sem_seg_head = nn.Module()
        self.sem_seg_head.pixel_decoder = PixelDecoder(
            backbone.channels, conv_dim, mask_dim, heads, hidden // 2, encoder_layers
        )
        predictor = self.sem_seg_head.predictor = nn.Module()
        predictor.input_proj = nn.ModuleList(
            nn.Conv2d(conv_dim, dim, 1) if conv_dim != dim else nn.Sequential() for _ in range(LEVELS)
        )
        predictor.level_embed = nn.Embedding(LEVELS, dim)
        predictor.query_feat, predictor.query_embed = nn.Embedding(queries, dim), nn.Embedding(queries, dim)
        norm, attention = (lambda: nn.LayerNorm(dim)), (lambda: nn.MultiheadAttention(dim, heads))
        predictor.transformer_cross_attention_layers = layer_list(layers, multihead_attn=attention, norm=norm)
        predictor.transformer_self_attention_layers = layer_list(layers, self_attn=attention, norm=norm)
        predictor.transformer_ffn_layers = layer_list(
            layers, linear1=lambda: nn.Linear(dim, hidden), linear2=lambda: nn.Linear(hidden, dim), norm=norm
        )
        predictor.decoder_norm = nn.LayerNorm(dim)
        predictor.class_embed = nn.Linear(dim, classes + 1)
        predictor.mask_embed = MLP(dim, dim, mask_dim, 3)
        self.criterion = nn.Module()
        self.criterion.register_buffer("empty_weight", torch.ones(classes + 1))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        predictor = self.sem_seg_head.predictor
        mask_features, levels = self.sem_seg_head.pixel_decoder(self.backbone(pixels))
        memories = [
            (tokens + embed, position, level.shape[-2:])
            for project, level, embed in zip(predictor.input_proj, levels, predictor.level_embed.weight, strict=True)
            for tokens, position in [sequence(project(level))]
        ]

        def predict(x: Tensor) -> tuple[Tensor, Tensor]:
            x = predictor.decoder_norm(x).transpose(0, 1)
            return predictor.class_embed(x), torch.einsum("bnc,bchw->bnhw", predictor.mask_embed(x), mask_features)

        x, queries = (
            embed.weight[:, None].expand(-1, len(pixels), -1) for embed in (predictor.query_feat, predictor.query_embed)
        )
        parts = zip(
            predictor.transformer_cross_attention_layers,
            predictor.transformer_self_attention_layers,
            predictor.transformer_ffn_layers,
            strict=True,
        )
        classes, masks = predict(x)
        for i, (cross, own, feedforward) in enumerate(parts):
            tokens, position, size = memories[i % LEVELS]
            excluded = (F.interpolate(masks, size, mode="bilinear", align_corners=False).sigmoid() < 0.5).flatten(2)
            excluded = (excluded & ~excluded.all(-1, keepdim=True)).repeat_interleave(self.heads, 0)
            x = cross.norm(x + cross.multihead_attn(x + queries, tokens + position, tokens, attn_mask=excluded)[0])
            x = own.norm(x + own.self_attn(x + queries, x + queries, x)[0])
            x = feedforward.norm(x + feedforward.linear2(feedforward.linear1(x).relu()))
            classes, masks = predict(x)
        return classes, masks
