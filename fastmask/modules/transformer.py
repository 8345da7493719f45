"""The transformer of DETR: post-norm layers that add positions to queries and keys, never to values."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastmask.modules.attention import MaskedCrossAttention


class TransformerEncoderLayer(nn.Module):
    """Self-attention and a two-layer perceptron, each followed by residual and layer norm.

    Args:
        dim: channels of the tokens.
        num_heads: attention heads; divides ``dim``.
        feedforward_dim: hidden channels of the perceptron.
        dropout: probability, after each block, inside the perceptron and on attention weights.
    """

    def __init__(self, dim: int, num_heads: int, feedforward_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, num_heads, dropout, batch_first=True)
        self.linear1 = nn.Linear(dim, feedforward_dim)
        self.linear2 = nn.Linear(feedforward_dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, position: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """``tokens (B, S, dim)`` to the same shape.

        Args:
            tokens: ``(B, S, dim)``.
            position: ``(B or 1, S, dim)``, added to queries and keys.
            padding_mask: ``(B, S)`` bool, True at tokens that are not attended to.
        """
        query = tokens + position
        attended = self.self_attn(query, query, tokens, key_padding_mask=padding_mask, need_weights=False)[0]
        tokens = self.norm1(tokens + self.dropout(attended))
        hidden = self.dropout(self.linear1(tokens).relu())
        return self.norm2(tokens + self.dropout(self.linear2(hidden)))


class TransformerEncoder(nn.Module):
    """A stack of :class:`TransformerEncoderLayer`, without a final norm (the layers are post-norm)."""

    def __init__(self, num_layers: int, dim: int, num_heads: int, feedforward_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            TransformerEncoderLayer(dim, num_heads, feedforward_dim, dropout) for _ in range(num_layers)
        )
        xavier_init(self)

    def forward(self, tokens: Tensor, position: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """``tokens (B, S, dim)`` to the same shape; the arguments are those of a layer."""
        for layer in self.layers:
            tokens = layer(tokens, position, padding_mask)
        return tokens


class TransformerDecoderLayer(nn.Module):
    """Self-attention among the queries, cross-attention to the image, and a two-layer perceptron, all post-norm.

    Args:
        dim: channels of queries and memory.
        num_heads: attention heads; divides ``dim``.
        feedforward_dim: hidden channels of the perceptron.
        dropout: probability, after each block, inside the perceptron and on attention weights.
    """

    def __init__(self, dim: int, num_heads: int, feedforward_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, num_heads, dropout, batch_first=True)
        self.multihead_attn = MaskedCrossAttention(dim, num_heads, dropout)
        self.linear1 = nn.Linear(dim, feedforward_dim)
        self.linear2 = nn.Linear(feedforward_dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, queries: Tensor, query_position: Tensor, keys: Tensor, values: Tensor, padding_mask: Tensor | None = None
    ) -> Tensor:
        """``queries (B, N, dim)`` to the same shape.

        Args:
            queries: ``(B, N, dim)``.
            query_position: ``(1, N, dim)``, added wherever queries serve as attention queries or keys.
            keys: ``(B, S, dim)``, the memory with its position encoding.
            values: ``(B, S, dim)``, the memory itself.
            padding_mask: ``(B, S)`` bool, True at memory that is not attended to.
        """
        query = queries + query_position
        attended = self.self_attn(query, query, queries, need_weights=False)[0]
        queries = self.norm1(queries + self.dropout(attended))
        query = queries + query_position
        attended = self.multihead_attn(query, keys, values, key_padding_mask=padding_mask)
        queries = self.norm2(queries + self.dropout(attended))
        hidden = self.dropout(self.linear1(queries).relu())
        return self.norm3(queries + self.dropout(self.linear2(hidden)))


class TransformerDecoder(nn.Module):
    """A stack of :class:`TransformerDecoderLayer` whose outputs all pass through one shared final norm."""

    def __init__(self, num_layers: int, dim: int, num_heads: int, feedforward_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            TransformerDecoderLayer(dim, num_heads, feedforward_dim, dropout) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(dim)
        xavier_init(self)

    def forward(
        self,
        query_position: Tensor,
        memory: Tensor,
        memory_position: Tensor,
        padding_mask: Tensor | None = None,
        *,
        all_layers: bool = True,
    ) -> Tensor:
        """Decodes queries that start at zero and differ only in their position.

        Args:
            query_position: ``(N, dim)``.
            memory: ``(B, S, dim)``.
            memory_position: ``(B or 1, S, dim)``, added to the keys.
            padding_mask: ``(B, S)`` bool, True at memory that is not attended to.
            all_layers: return the output of every layer, as deep supervision needs, or of the last alone.

        Returns:
            ``(L, B, N, dim)``, with L = 1 unless ``all_layers``.
        """
        query_position = query_position[None]
        keys = memory + memory_position
        queries = query_position.new_zeros(memory.shape[0], *query_position.shape[1:])
        outputs = []
        for layer in self.layers:
            queries = layer(queries, query_position, keys, memory, padding_mask)
            outputs.append(queries)
        return self.norm(torch.stack(outputs if all_layers else outputs[-1:]))


def xavier_init(module: nn.Module) -> None:
    """Fills every weight matrix of a transformer as DETR does; biases and norms keep their own initial values."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
