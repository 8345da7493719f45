"""Segmenter's decoders, which turn encoded patches into class logits of each patch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fastmask.modules.vit import INIT_STD, blocks, init_linear


class LinearDecoder(nn.Module):
    """A point-wise linear layer (arXiv:2105.05633, section 3.2, "Linear").

    Args:
        dim: channels of the patches.
        num_classes: K.
    """

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(dim, num_classes)
        init_linear(self.head)

    def forward(self, patches: Tensor, attended: Tensor | None = None) -> Tensor:
        """``patches (B, S, dim)`` to logits ``(B, S, K)``."""
        return self.head(patches)


class MaskTransformer(nn.Module):
    """A transformer over patches and class embeddings (arXiv:2105.05633, section 3.2, "Mask Transformer").

    The logits are the scalar products of the projected patches with the projected class embeddings, both L2-normalized,
    followed by a layer norm over the classes.

    Args:
        dim: channels of the patches and of the transformer.
        num_classes: K.
        num_layers: blocks of the transformer.
        num_heads: attention heads; divides ``dim``.
        feedforward_dim: hidden channels of the blocks' MLPs.
        dropout: dropout probability in the blocks.
        drop_path: probability of dropping a residual of the last block.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        num_layers: int,
        num_heads: int,
        feedforward_dim: int,
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.proj_dec = nn.Linear(dim, dim)
        self.cls_emb = nn.Parameter(torch.zeros(1, num_classes, dim))
        self.blocks = nn.ModuleList(blocks(num_layers, dim, num_heads, feedforward_dim, dropout, drop_path))
        self.decoder_norm = nn.LayerNorm(dim)
        self.proj_patch = nn.Parameter(dim**-0.5 * torch.randn(dim, dim))
        self.proj_classes = nn.Parameter(dim**-0.5 * torch.randn(dim, dim))
        self.mask_norm = nn.LayerNorm(num_classes)
        nn.init.trunc_normal_(self.cls_emb, std=INIT_STD)
        self.apply(init_linear)

    def forward(self, patches: Tensor, attended: Tensor | None = None) -> Tensor:
        """``patches (B, S, dim)`` to logits ``(B, S, K)``; ``attended (B, S)`` bool is False at padding."""
        batch_size, num_patches, _ = patches.shape
        classes = self.cls_emb.expand(batch_size, -1, -1)
        tokens = torch.cat([self.proj_dec(patches), classes], 1)
        if attended is not None:
            attended = torch.cat([attended, attended.new_ones(batch_size, classes.shape[1])], 1)
        for block in self.blocks:
            tokens = block(tokens, attended)
        tokens = self.decoder_norm(tokens)
        patches = normalize(tokens[:, :num_patches] @ self.proj_patch, dim=-1)
        classes = normalize(tokens[:, num_patches:] @ self.proj_classes, dim=-1)
        return self.mask_norm(patches @ classes.transpose(1, 2))
