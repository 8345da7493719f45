"""Masked cross-attention as a module, with the parameters of ``nn.MultiheadAttention``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fastmask.functional import masked_attention


class MaskedCrossAttention(nn.Module):
    """Multi-head cross-attention in which each query attends where its own mask is foreground (Mask2Former,
    arXiv:2112.01527, equation 2); without mask logits, plain cross-attention.

    The parameters have the names, shapes and initial values of ``nn.MultiheadAttention``, so either can load the
    other's state dict. Batch first. See :func:`fastmask.masked_attention` for how masks are read.

    Args:
        embed_dim: channels of queries, keys and values, a multiple of ``num_heads``.
        num_heads: attention heads.
        dropout: the probability of dropping an attention weight in training.
        bias: whether the projections have biases.
        backend: "auto", "reference", "native" or "triton".

    Raises:
        ValueError: ``num_heads`` does not divide ``embed_dim``.
    """

    def __init__(
        self, embed_dim: int, num_heads: int, dropout: float = 0.0, bias: bool = True, *, backend: str = "auto"
    ) -> None:
        super().__init__()
        if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads != 0:
            raise ValueError(f"num_heads={num_heads} does not divide embed_dim={embed_dim}")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.dropout = dropout
        self.backend = backend
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * embed_dim)) if bias else None
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        nn.init.xavier_uniform_(self.in_proj_weight)
        if bias:
            nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask_logits: Tensor | None = None,
        *,
        grid: tuple[int, int] | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """``(B, N, embed_dim)`` in the dtype of the projections.

        Args:
            query: ``(B, N, embed_dim)``.
            key, value: ``(B, S, embed_dim)``, row by row over the grid.
            mask_logits: ``(B, N, h, w)``, each query's mask at any resolution; None to attend everywhere.
            grid: (height, width) of the keys; required with mask logits.
            key_padding_mask: ``(B, S)`` bool, True at padding, which no query attends to.

        Raises:
            ValueError: shapes that do not fit, or mask logits without a grid.
        """
        if grid is None:
            if mask_logits is not None:
                raise ValueError("mask_logits need grid, the (height, width) of the keys")
            grid = (1, key.shape[1])
        attended = projected_attention(
            query,
            key,
            value,
            mask_logits,
            self.in_proj_weight,
            self.in_proj_bias,
            grid=grid,
            num_heads=self.num_heads,
            key_padding_mask=key_padding_mask,
            dropout_p=self.dropout if self.training else 0.0,
            backend=self.backend,
        )
        return self.out_proj(attended)

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, num_heads={self.num_heads}, dropout={self.dropout}"


def projected_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask_logits: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    **options: Any,
) -> Tensor:
    """Projects the inputs with ``nn.MultiheadAttention``'s parameters, then calls :func:`fastmask.masked_attention`.

    Args:
        query, key, value, mask_logits: as for :class:`MaskedCrossAttention`.
        weight: ``(3 * embed_dim, embed_dim)``, the stacked projections of queries, keys and values.
        bias: ``(3 * embed_dim,)``, their biases, or None.
        options: further arguments of :func:`fastmask.masked_attention`.
    """
    biases = (None, None, None) if bias is None else bias.chunk(3)
    q, k, v = (linear(x, w, b) for x, w, b in zip((query, key, value), weight.chunk(3), biases, strict=True))
    return masked_attention(q, k, v, mask_logits, **options)
