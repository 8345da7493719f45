"""The vision transformers DINOv2 and DINOv3, whose last blocks queries can join, as in EoMT."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

from fastmask.functional import masked_attention
from fastmask.modules.vit import INIT_STD, DropPath, FeedForward, PatchEmbedding, init_linear, resize_positions

Rotation = tuple[Tensor, Tensor]


class MaskedSelfAttention(nn.Module):
    """Multi-head self-attention of N queries and all other tokens, in which a query attends to chosen tokens only.

    Only the queries' rows have a mask, and they run on :func:`fastmask.masked_attention`. All other rows, several times
    as many, attend to every token without a mask, so PyTorch's fused attention serves them; without masks it serves all
    rows. The kernel takes the T tokens as a grid of one row and each query's mask as T logits, 0 or -1. It could read
    the masks of the patches at their own resolution instead, but its rule for an empty mask, to attend everywhere, is
    Mask2Former's: EoMT's queries then attend to the other tokens alone.

    Args:
        dim: channels of the tokens.
        num_heads: attention heads; divides ``dim``.
        key_bias: whether the projection of keys has a bias.
        backend: the backend of :func:`fastmask.masked_attention`.
    """

    def __init__(self, dim: int, num_heads: int, *, key_bias: bool = True, backend: str = "auto") -> None:
        super().__init__()
        self.num_heads = num_heads
        self.backend = backend
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim, bias=key_bias)
        self.v_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor, rotation: Rotation | None = None, attended: Tensor | None = None) -> Tensor:
        """``tokens (B, T, dim)`` to the same shape.

        Args:
            tokens: the queries first, the patches last.
            rotation: cosines and sines ``(S, dim / num_heads)`` of the rotary positions of the S patches, or None.
            attended: ``(B, N, T)`` bool, the tokens to which each query attends, at least one; None for all.
        """
        query, key, value = self.q_proj(tokens), self.k_proj(tokens), self.v_proj(tokens)
        if rotation is not None:
            query, key = self._rotated(query, rotation), self._rotated(key, rotation)
        if attended is None:
            return self.out_proj(self._unmasked(query, key, value))
        num_queries, num_tokens = attended.shape[1:]
        of_queries = masked_attention(
            query[:, :num_queries],
            key,
            value,
            attended.to(query.dtype)[:, :, None] - 1,
            grid=(1, num_tokens),
            num_heads=self.num_heads,
            backend=self.backend,
        )
        of_others = self._unmasked(query[:, num_queries:], key, value)
        return self.out_proj(torch.cat([of_queries, of_others], 1))

    def _unmasked(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads = [x.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in (query, key, value)]
        return scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)

    def _rotated(self, x: Tensor, rotation: Rotation) -> Tensor:
        """``x (B, T, dim)`` with its last S tokens rotated."""
        cos, sin = (angles[:, None] for angles in rotation)  # (S, 1, dim / heads)
        first = x.shape[1] - cos.shape[0]
        patches = x[:, first:].unflatten(2, (self.num_heads, -1))
        left, right = patches.chunk(2, -1)
        turned = patches * cos + torch.cat([-right, left], -1) * sin
        return torch.cat([x[:, :first], turned.flatten(2).to(x.dtype)], 1)


class GatedFeedForward(nn.Module):
    """SwiGLU (Shazeer, arXiv:2002.05202): the second of two linear layers multiplies the first after SiLU."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden_dim)
        self.up_proj = nn.Linear(dim, hidden_dim)
        self.down_proj = nn.Linear(hidden_dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """``(..., dim)`` to the same shape."""
        return self.down_proj(silu(self.gate_proj(tokens)) * self.up_proj(tokens))


class ScaledBlock(nn.Module):
    """Self-attention and an MLP, each after a layer norm, scaled per channel and added to its input.

    Args:
        dim: channels of the tokens.
        num_heads: attention heads; divides ``dim``.
        feedforward_dim: hidden channels of the MLP.
        gated: SwiGLU instead of two layers with GELU.
        key_bias: whether the projection of keys has a bias.
        norm_eps: added to the variance in layer norms.
        drop_path: probability of dropping a residual.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        feedforward_dim: int,
        *,
        gated: bool = False,
        key_bias: bool = True,
        norm_eps: float = 1e-6,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, norm_eps)
        self.attn = MaskedSelfAttention(dim, num_heads, key_bias=key_bias)
        self.scale1 = nn.Parameter(torch.ones(dim))
        self.norm2 = nn.LayerNorm(dim, norm_eps)
        self.mlp = GatedFeedForward(dim, feedforward_dim) if gated else FeedForward(dim, feedforward_dim)
        self.scale2 = nn.Parameter(torch.ones(dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, tokens: Tensor, rotation: Rotation | None = None, attended: Tensor | None = None) -> Tensor:
        """``tokens (B, T, dim)`` to the same shape; the other arguments are those of :class:`MaskedSelfAttention`."""
        tokens = tokens + self.drop_path(self.scale1 * self.attn(self.norm1(tokens), rotation, attended))
        return tokens + self.drop_path(self.scale2 * self.mlp(self.norm2(tokens)))


class DinoTransformer(nn.Module):
    """The encoder of DINOv2 (Oquab et al., arXiv:2304.07193) or DINOv3 (Siméoni et al., arXiv:2508.10104).

    DINOv2 adds learned position embeddings to the patches; they belong to one grid and are resized bilinearly to
    others. DINOv3 rotates queries and keys by the patches' positions instead, each axis in -1..1, and has no bias on
    keys. Both have a class token and registers (Darcet et al., arXiv:2309.16588).

    Args:
        grid_size: (rows, columns) of the patches for which position embeddings are learned.
        patch_size: side of a patch in pixels.
        dim: channels of the tokens.
        num_layers: blocks.
        rotary: rotary positions (DINOv3) instead of learned ones (DINOv2); ``dim / num_heads`` is a multiple of 4.
        num_heads: attention heads; divides ``dim``.
        feedforward_dim: hidden channels of the blocks' MLPs.
        rescale: in training, rotary positions are multiplied by a random factor in ``1 / rescale..rescale``.
        num_registers: register tokens, after the class token.
        norm_eps: added to the variance in layer norms.
        channels: C of the images.
        block: further arguments of :class:`ScaledBlock`.
    """

    ROTARY_BASE = 100.0

    def __init__(
        self,
        grid_size: tuple[int, int],
        patch_size: int,
        *,
        dim: int,
        num_layers: int,
        rotary: bool,
        num_heads: int,
        feedforward_dim: int,
        rescale: float = 1.0,
        num_registers: int = 4,
        norm_eps: float = 1e-6,
        channels: int = 3,
        **block: Any,
    ) -> None:
        super().__init__()
        self.grid_size = grid_size
        self.head_dim = dim // num_heads
        self.rescale = rescale
        self.patch_embed = PatchEmbedding(channels, dim, patch_size)
        self.cls_token = nn.Parameter(INIT_STD * torch.randn(1, 1, dim))
        self.register_tokens = nn.Parameter(INIT_STD * torch.randn(1, num_registers, dim))
        self.pos_embed: nn.Parameter | None = None
        if not rotary:
            self.pos_embed = nn.Parameter(INIT_STD * torch.randn(grid_size[0] * grid_size[1], dim))
        self.blocks = nn.ModuleList(
            ScaledBlock(dim, num_heads, feedforward_dim, key_bias=not rotary, norm_eps=norm_eps, **block)
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(dim, norm_eps)
        self.blocks.apply(init_linear)

    def embed(self, pixels: Tensor) -> tuple[Tensor, Rotation | None, tuple[int, int]]:
        """The tokens before the first block.

        Args:
            pixels: ``(B, C, H, W)``, both sides multiples of the patch size.

        Returns:
            ``(B, 1 + num_registers + S, dim)``: class token, registers and patches, row by row; the rotary positions,
            if any; and (rows, columns) of the patches.
        """
        embedded = self.patch_embed(pixels)
        batch_size, _, rows, columns = embedded.shape
        patches = embedded.flatten(2).transpose(1, 2)
        rotation = None
        if self.pos_embed is None:
            rotation = self._rotation((rows, columns))
        else:
            patches = patches + resize_positions(self.pos_embed[None], self.grid_size, (rows, columns))
        special = torch.cat([self.cls_token, self.register_tokens], 1).expand(batch_size, -1, -1)
        return torch.cat([special, patches], 1), rotation, (rows, columns)

    def _rotation(self, grid: tuple[int, int]) -> Rotation:
        """Cosines and sines ``(S, head_dim)`` float32. Half of the channels turn with the row, half with the column;
        the frequencies are powers of ``ROTARY_BASE``.
        """
        device = self.cls_token.device
        axes = [2 * (torch.arange(side, device=device) + 0.5) / side - 1 for side in grid]
        positions = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 1)  # (S, 2), in -1..1
        if self.training and self.rescale != 1:
            limit = math.log(self.rescale)
            positions = positions * torch.empty(1, device=device).uniform_(-limit, limit).exp()
        frequencies = self.ROTARY_BASE ** -torch.arange(0, 1, 4 / self.head_dim, device=device)
        angles = (2 * math.pi * positions[:, :, None] * frequencies).flatten(1).tile(2)
        return angles.cos(), angles.sin()
