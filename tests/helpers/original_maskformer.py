"""MaskFormer as the papers and the names in its authors' checkpoints describe it, written for tests alone: ResNet
(basic or DeepLab's stem), Swin with fused projections, the pyramid and the decoder. Every weight's name is theirs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmask.modules import MLP, sine_position_encoding


class ConvNorm(nn.Conv2d):
    """detectron2's convolution: its weights are the module's own, those of its norm are ``norm.*``."""

    def __init__(self, *args, norm: nn.Module, **options):
        super().__init__(*args, bias=False, **options)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


def conv_bn(input_dim, output_dim, size, stride=1, dilation=1):
    padding = size // 2 * dilation
    norm = nn.BatchNorm2d(output_dim)
    return ConvNorm(input_dim, output_dim, size, stride=stride, padding=padding, dilation=dilation, norm=norm)


class Bottleneck(nn.Module):
    def __init__(self, input_dim, output_dim, stride, dilation):
        super().__init__()
        middle = output_dim // 4
        self.conv1 = conv_bn(input_dim, middle, 1)
        self.conv2 = conv_bn(middle, middle, 3, stride, dilation)
        self.conv3 = conv_bn(middle, output_dim, 1)
        if input_dim != output_dim:
            self.shortcut = conv_bn(input_dim, output_dim, 1, stride)

    def forward(self, x):
        shortcut = self.shortcut(x) if hasattr(self, "shortcut") else x
        return (self.conv3(self.conv2(self.conv1(x).relu()).relu()) + shortcut).relu()


class ResNet(nn.Module):
    def __init__(self, channels, depths, stem_dim, deep_stem):
        super().__init__()
        self.stem = nn.Module()
        if deep_stem:
            self.stem.conv1 = conv_bn(3, stem_dim // 2, 3, 2)
            self.stem.conv2 = conv_bn(stem_dim // 2, stem_dim // 2, 3)
            self.stem.conv3 = conv_bn(stem_dim // 2, stem_dim, 3)
        else:
            self.stem.conv1 = conv_bn(3, stem_dim, 7, 2)
        self.channels = channels
        input_dim = stem_dim
        for stage, (dim, depth) in enumerate(zip(channels, depths, strict=True)):
            dilations = (1, 2, 4) if deep_stem and stage == 3 else (1,)
            blocks = []
            for i in range(depth):
                stride = 2 if stage > 0 and i == 0 else 1
                blocks.append(Bottleneck(input_dim, dim, stride, dilations[i % len(dilations)]))
                input_dim = dim
            setattr(self, f"res{stage + 2}", nn.Sequential(*blocks))

    def forward(self, x):
        for conv in self.stem.children():
            x = conv(x).relu()
        x = F.max_pool2d(x, 3, 2, 1)
        maps = []
        for stage in range(4):
            x = getattr(self, f"res{stage + 2}")(x)
            maps.append(x)
        return maps


class WindowAttention(nn.Module):
    def __init__(self, dim, window, heads):
        super().__init__()
        self.window, self.heads = window, heads
        self.relative_position_bias_table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads) * 0.1)
        y, x = (axis.flatten() for axis in torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij"))
        dy, dx = y[:, None] - y[None] + window - 1, x[:, None] - x[None] + window - 1
        self.register_buffer("relative_position_index", dy * (2 * window - 1) + dx)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens, excluded):
        """``tokens (windows, S, dim)``; ``excluded (windows, S, S)`` bool."""
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5 + bias
        scores = scores - 100.0 * excluded[:, None].to(scores.dtype)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def windows_of(x: Tensor, size: int) -> Tensor:
    """``(B, H, W, C)`` to ``(windows, size * size, C)``."""
    b, h, w, c = x.shape
    return x.view(b, h // size, size, w // size, size, c).transpose(2, 3).reshape(-1, size * size, c)


def from_windows(tokens: Tensor, shape: torch.Size, size: int) -> Tensor:
    b, h, w, c = shape
    return tokens.view(b, h // size, w // size, size, size, c).transpose(2, 3).reshape(shape)


class SwinBlock(nn.Module):
    def __init__(self, dim, heads, window, shift):
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, window, heads)
        self.mlp = nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, C)``: padded to whole windows, shifted cyclically, attention within what was adjacent."""
        _, height, width, _ = x.shape
        padded = F.pad(self.norm1(x), (0, 0, 0, -width % self.window, 0, -height % self.window))
        regions = torch.zeros(1, *padded.shape[1:3], 1)
        if self.shift:
            cuts = (slice(0, -self.window), slice(-self.window, -self.shift), slice(-self.shift, None))
            for i, rows in enumerate(cuts):
                for j, columns in enumerate(cuts):
                    regions[:, rows, columns] = 3 * i + j
            padded = padded.roll((-self.shift, -self.shift), (1, 2))
        ids = windows_of(regions, self.window).squeeze(-1)
        excluded = (ids[:, None] != ids[:, :, None]).repeat(len(x), 1, 1)
        attended = from_windows(self.attn(windows_of(padded, self.window), excluded), padded.shape, self.window)
        x = x + attended.roll((self.shift, self.shift), (1, 2))[:, :height, :width]
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))


class Swin(nn.Module):
    def __init__(self, dim, depths, heads, window):
        super().__init__()
        self.channels = [dim * 2**i for i in range(4)]
        self.patch_embed = nn.Module()
        self.patch_embed.proj, self.patch_embed.norm = nn.Conv2d(3, dim, 4, 4), nn.LayerNorm(dim)
        self.layers = nn.ModuleList()
        for i, (width, depth) in enumerate(zip(self.channels, depths, strict=True)):
            layer = nn.Module()
            shifts = [window // 2 * (j % 2) for j in range(depth)]
            layer.blocks = nn.ModuleList(SwinBlock(width, heads[i], window, shift) for shift in shifts)
            if i < 3:
                layer.downsample = nn.Module()
                layer.downsample.norm = nn.LayerNorm(4 * width)
                layer.downsample.reduction = nn.Linear(4 * width, 2 * width, bias=False)
            self.layers.append(layer)
            setattr(self, f"norm{i}", nn.LayerNorm(width))

    def forward(self, x):
        x = F.pad(x, (0, -x.shape[3] % 4, 0, -x.shape[2] % 4))
        x = self.patch_embed.norm(self.patch_embed.proj(x).permute(0, 2, 3, 1))
        maps = []
        for i, layer in enumerate(self.layers):
            for block in layer.blocks:
                x = block(x)
            maps.append(getattr(self, f"norm{i}")(x).permute(0, 3, 1, 2))
            if i < 3:
                x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
                corners = [x[:, y::2, c::2] for c in (0, 1) for y in (0, 1)]
                x = layer.downsample.reduction(layer.downsample.norm(torch.cat(corners, -1)))
        return maps


def gn(dim):
    return nn.GroupNorm(32, dim)


class EncoderLayer(nn.Module):
    def __init__(self, dim, heads, hidden):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, heads)
        self.linear1, self.linear2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x, position):
        x = self.norm1(x + self.self_attn(x + position, x + position, x)[0])
        return self.norm2(x + self.linear2(self.linear1(x).relu()))


class DecoderLayer(nn.Module):
    def __init__(self, dim, heads, hidden):
        super().__init__()
        self.self_attn, self.multihead_attn = nn.MultiheadAttention(dim, heads), nn.MultiheadAttention(dim, heads)
        self.linear1, self.linear2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x, queries, memory, position):
        x = self.norm1(x + self.self_attn(x + queries, x + queries, x)[0])
        x = self.norm2(x + self.multihead_attn(x + queries, memory + position, memory)[0])
        return self.norm3(x + self.linear2(self.linear1(x).relu()))


class OriginalMaskFormer(nn.Module):
    """``forward``: normalized pixels to (class logits, mask logits) of the last layer."""

    def __init__(self, backbone, *, classes, queries, dim, conv_dim, mask_dim, heads, hidden, layers, encoder_layers):
        super().__init__()
        self.backbone = backbone
        self.sem_seg_head = nn.Module()
        decoder = self.sem_seg_head.pixel_decoder = nn.Module()
        last_dim = backbone.channels[-1]
        if encoder_layers:
            decoder.input_proj = nn.Conv2d(last_dim, conv_dim, 1)
            decoder.transformer = nn.Module()
            decoder.transformer.encoder = nn.Module()
            decoder.transformer.encoder.layers = nn.ModuleList(
                EncoderLayer(conv_dim, heads, hidden) for _ in range(encoder_layers)
            )
            last_dim = conv_dim
        for i, width in enumerate(backbone.channels[:-1], 1):
            setattr(decoder, f"adapter_{i}", ConvNorm(width, conv_dim, 1, norm=gn(conv_dim)))
            setattr(decoder, f"layer_{i}", ConvNorm(conv_dim, conv_dim, 3, padding=1, norm=gn(conv_dim)))
        decoder.layer_4 = ConvNorm(last_dim, conv_dim, 3, padding=1, norm=gn(conv_dim))
        decoder.mask_features = nn.Conv2d(conv_dim, mask_dim, 3, padding=1)
        predictor = self.sem_seg_head.predictor = nn.Module()
        predictor.input_proj = nn.Conv2d(last_dim, dim, 1) if last_dim != dim else nn.Sequential()
        predictor.query_embed = nn.Embedding(queries, dim)
        predictor.transformer = nn.Module()
        predictor.transformer.decoder = nn.Module()
        predictor.transformer.decoder.layers = nn.ModuleList(DecoderLayer(dim, heads, hidden) for _ in range(layers))
        predictor.transformer.decoder.norm = nn.LayerNorm(dim)
        predictor.class_embed = nn.Linear(dim, classes + 1)
        predictor.mask_embed = MLP(dim, dim, mask_dim, 3)
        self.criterion = nn.Module()
        self.criterion.register_buffer("empty_weight", torch.ones(classes + 1))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.backbone(pixels)
        decoder, predictor = self.sem_seg_head.pixel_decoder, self.sem_seg_head.predictor
        memory = maps[-1]
        if hasattr(decoder, "transformer"):
            memory = decoder.input_proj(memory)
            tokens, position = sequence(memory)
            for layer in decoder.transformer.encoder.layers:
                tokens = layer(tokens, position)
            memory = tokens.permute(1, 2, 0).view_as(memory)
        y = decoder.layer_4(memory).relu()
        for i in (3, 2, 1):
            lateral = getattr(decoder, f"adapter_{i}")(maps[i - 1])
            y = getattr(decoder, f"layer_{i}")(lateral + F.interpolate(y, size=lateral.shape[-2:])).relu()
        tokens, position = sequence(predictor.input_proj(memory))
        queries = predictor.query_embed.weight[:, None].expand(-1, len(pixels), -1)
        x = torch.zeros_like(queries)
        for layer in predictor.transformer.decoder.layers:
            x = layer(x, queries, tokens, position)
        x = predictor.transformer.decoder.norm(x).transpose(0, 1)
        masks = torch.einsum("bnc,bchw->bnhw", predictor.mask_embed(x), decoder.mask_features(y))
        return predictor.class_embed(x), masks


def sequence(memory: Tensor) -> tuple[Tensor, Tensor]:
    """``(S, B, C)`` tokens and their position encoding ``(S, 1, C)``."""
    _, dim, height, width = memory.shape
    position = sine_position_encoding(height, width, dim, dtype=memory.dtype, device=memory.device)
    return memory.flatten(2).permute(2, 0, 1), position.transpose(0, 1)
