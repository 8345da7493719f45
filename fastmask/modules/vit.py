"""The plain vision transformer; its parameters have the names that timm uses."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from fastmask.modules.resize import resize_bilinear
from fastmask.ops._tracing import same_size

INIT_STD = 0.02


class SelfAttention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values.

    Args:
        dim: channels of the tokens.
        num_heads: attention heads; divides ``dim``.
        dropout: dropout probability on attention weights and after the output projection.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, attended: Tensor | None = None) -> Tensor:
        """``tokens (B, S, dim)`` to the same shape; ``attended (B, S)`` bool is False at padding."""
        qkv = self.qkv(tokens).unflatten(2, (3, self.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, S, dim / heads) each
        mask = None if attended is None else attended[:, None, None, :]
        dropout = self.dropout if self.training else 0.0
        mixed = scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        return self.proj_drop(self.proj(mixed.transpose(1, 2).flatten(2)))


class FeedForward(nn.Module):
    """Two linear layers with GELU between them and dropout after each."""

    def __init__(self, dim: int, hidden_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """``(..., dim)`` to the same shape."""
        return self.drop(self.fc2(self.drop(self.act(self.fc1(tokens)))))


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., arXiv:1603.09382): in training, the residual of each sample is dropped with
    probability ``rate``; the others are divided by ``1 - rate``.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, residual: Tensor) -> Tensor:
        """``(B, ...)`` to the same shape."""
        if not self.training or self.rate == 0:
            return residual
        kept = torch.rand(len(residual), *[1] * (residual.dim() - 1), device=residual.device) >= self.rate
        return residual * kept / (1 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


class Block(nn.Module):
    """Self-attention and an MLP, each with a layer norm before it and a residual connection around both.

    Args:
        dim: channels of the tokens.
        num_heads: attention heads; divides ``dim``.
        feedforward_dim: hidden channels of the MLP.
        dropout: dropout probability in attention and MLP.
        drop_path: probability of dropping a residual.
    """

    def __init__(
        self, dim: int, num_heads: int, feedforward_dim: int, dropout: float = 0.0, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = SelfAttention(dim, num_heads, dropout)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = FeedForward(dim, feedforward_dim, dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, tokens: Tensor, attended: Tensor | None = None) -> Tensor:
        """``tokens (B, S, dim)`` to the same shape; ``attended (B, S)`` bool is False at padding."""
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens), attended))
        return tokens + self.drop_path(self.mlp(self.norm2(tokens)))


class PatchEmbedding(nn.Module):
    """Turns each patch of pixels into one token by a linear layer: a convolution whose stride is its kernel size."""

    def __init__(self, channels: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch_size, patch_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """``(B, C, H, W)``, both sides multiples of the patch size, to ``(B, dim, H / patch, W / patch)``."""
        return self.proj(pixels)


class VisionTransformer(nn.Module):
    """The encoder of Dosovitskiy et al. (arXiv:2010.11929) for images of any size.

    Position embeddings are learned on one grid of patches and resized bilinearly to others, as in Segmenter
    (arXiv:2105.05633), whose code, however, skips this for another grid with the same number of patches. In contrast,
    the ViT of ``transformers`` resizes bicubically, has no stochastic depth and attends to padding.

    Args:
        grid_size: (rows, columns) of the patches for which position embeddings are learned.
        patch_size: side of a patch in pixels.
        dim: channels of the tokens.
        num_layers: blocks.
        num_heads: attention heads; divides ``dim``.
        feedforward_dim: hidden channels of the blocks' MLPs.
        dropout: dropout probability on the embedded tokens and in the blocks.
        drop_path: probability of dropping a residual of the last block; it grows linearly from 0 at the first block.
        distilled: add a distillation token beside the class token (DeiT, arXiv:2012.12877).
        channels: C of the images.
    """

    def __init__(
        self,
        grid_size: tuple[int, int],
        patch_size: int,
        dim: int,
        num_layers: int,
        num_heads: int,
        feedforward_dim: int,
        *,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        distilled: bool = False,
        channels: int = 3,
    ) -> None:
        super().__init__()
        self.grid_size = grid_size
        self.patch_embed = PatchEmbedding(channels, dim, patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, dim)) if distilled else None
        self.num_extra = 2 if distilled else 1
        self.pos_embed = nn.Parameter(torch.zeros(1, self.num_extra + grid_size[0] * grid_size[1], dim))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(blocks(num_layers, dim, num_heads, feedforward_dim, dropout, drop_path))
        self.norm = nn.LayerNorm(dim)
        for parameter in (self.cls_token, self.dist_token, self.pos_embed):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=INIT_STD)
        self.apply(init_linear)

    def forward(self, pixels: Tensor, grids: list[tuple[int, int]], attended: Tensor | None = None) -> Tensor:
        """The encoded patches.

        Args:
            pixels: ``(B, C, H, W)``, both sides multiples of the patch size.
            grids: (rows, columns) of each image's patches, which are in the top left corner of a padded batch.
            attended: ``(B, S)`` bool, False at patches that are padding; None if there is no padding.

        Returns:
            ``(B, S, dim)``, S = (H / patch) * (W / patch), row by row.
        """
        embedded = self.patch_embed(pixels)
        batch_size, _, rows, columns = embedded.shape
        patches = embedded.flatten(2).transpose(1, 2) + self._positions(grids, (rows, columns))
        extra = self.cls_token if self.dist_token is None else torch.cat([self.cls_token, self.dist_token], 1)
        extra = (extra + self.pos_embed[:, : self.num_extra]).expand(batch_size, -1, -1)
        tokens = self.dropout(torch.cat([extra, patches], 1))
        if attended is not None:
            attended = torch.cat([attended.new_ones(batch_size, self.num_extra), attended], 1)
        for block in self.blocks:
            tokens = block(tokens, attended)
        return self.norm(tokens[:, self.num_extra :])

    def _positions(self, grids: list[tuple[int, int]], padded: tuple[int, int]) -> Tensor:
        """``(B or 1, S, dim)``: each image's position embeddings, 0 at padding."""
        if all(same_size(grid, grids[0]) for grid in grids):
            return self._padded_positions(grids[0], padded)
        distinct = {grid: self._padded_positions(grid, padded) for grid in dict.fromkeys(grids)}
        return torch.cat([distinct[grid] for grid in grids])

    def _padded_positions(self, grid: tuple[int, int], padded: tuple[int, int]) -> Tensor:
        """``(1, S, dim)``: the position embeddings of one grid, 0 at padding."""
        positions = resize_positions(self.pos_embed[:, self.num_extra :], self.grid_size, grid).unflatten(1, grid)
        below, beside = padded[0] - grid[0], padded[1] - grid[1]
        return nn.functional.pad(positions, (0, 0, 0, beside, 0, below)).flatten(1, 2)


def resize_positions(positions: Tensor, from_grid: tuple[int, int], to_grid: tuple[int, int]) -> Tensor:
    """Position embeddings ``(1, rows * columns, dim)`` of one grid of patches, resized bilinearly to another."""
    if same_size(from_grid, to_grid):
        return positions
    planes = positions.transpose(1, 2).unflatten(2, from_grid)
    return resize_bilinear(planes, to_grid).flatten(2).transpose(1, 2)


def blocks(
    num_layers: int, dim: int, num_heads: int, feedforward_dim: int, dropout: float, drop_path: float
) -> list[Block]:
    """Blocks whose residuals are dropped with a probability that grows linearly from 0 to ``drop_path``."""
    rates = [drop_path * i / max(num_layers - 1, 1) for i in range(num_layers)]
    return [Block(dim, num_heads, feedforward_dim, dropout, rate) for rate in rates]


def init_linear(module: nn.Module) -> None:
    """Initializes linear layers as Segmenter and DeiT do: normal weights (standard deviation 0.02) and zero bias."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=INIT_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
