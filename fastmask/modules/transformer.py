"""The transformer of DETR: post-norm layers that add positions to queries and keys, never to values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastmask.modules.attention import MaskedCrossAttention


class PostNormLayer(nn.Module):
    """Base class of the layers: attentions and a two-layer MLP, each followed by a residual and a layer norm.

    Args:
        dim: channels of the tokens.
        feedforward_dim: hidden channels of the MLP.
        dropout: dropout probability after each block and inside the MLP.
        attentions: the attentions by name, in order.
    """

    norm1: nn.LayerNorm
    norm2: nn.LayerNorm
    norm3: nn.LayerNorm
    self_attn: nn.Module

    def __init__(self, dim: int, feedforward_dim: int, dropout: float, **attentions: nn.Module) -> None:
        super().__init__()
        for name, attention in attentions.items():
            self.add_module(name, attention)
        self.linear1 = nn.Linear(dim, feedforward_dim)
        self.linear2 = nn.Linear(feedforward_dim, dim)
        for i in range(len(attentions) + 1):
            self.add_module(f"norm{i + 1}", nn.LayerNorm(dim))
        self.dropout = nn.Dropout(dropout)

    def self_attention(self, queries: Tensor, position: Tensor, norm: nn.LayerNorm) -> Tensor:
        """Attention among ``queries (B, N, dim)``, to the same shape."""
        query = queries + position
        return self.add(queries, self.self_attn(query, query, queries), norm)

    def feed_forward(self, tokens: Tensor, norm: nn.LayerNorm) -> Tensor:
        """``tokens (B, S, dim)`` to the same shape."""
        hidden = self.dropout(self.linear1(tokens).relu())
        return self.add(tokens, self.linear2(hidden), norm)

    def add(self, tokens: Tensor, update: Tensor, norm: nn.LayerNorm) -> Tensor:
        """Adds a block's update to its input, then normalizes."""
        return norm(tokens + self.dropout(update))


def query_attentions(dim: int, num_heads: int, dropout: float, *names: str) -> dict[str, nn.Module]:
    """Attentions of a decoder layer; ``dropout`` is also that of their weights. Among a few hundred queries, too, our
    operator is up to three times as fast in training on a CPU as ``nn.MultiheadAttention``, most in bfloat16."""
    return {name: MaskedCrossAttention(dim, num_heads, dropout) for name in names}


class TransformerEncoderLayer(PostNormLayer):
    """Self-attention and an MLP.

    Args:
        dim: channels of the tokens.
        num_heads: attention heads; divides ``dim``.
        feedforward_dim: hidden channels of the MLP.
        dropout: dropout probability after each block, inside the MLP and on attention weights.
    """

    def __init__(self, dim: int, num_heads: int, feedforward_dim: int, dropout: float = 0.0) -> None:
        attention = nn.MultiheadAttention(dim, num_heads, dropout, batch_first=True)
        super().__init__(dim, feedforward_dim, dropout, self_attn=attention)

    def forward(self, tokens: Tensor, position: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """``tokens (B, S, dim)`` to the same shape.

        Args:
            tokens: ``(B, S, dim)``.
            position: ``(B or 1, S, dim)``, added to queries and keys.
            padding_mask: ``(B, S)`` bool, True at padding, which no token attends to.
        """
        query = tokens + position
        attended = self.self_attn(query, query, tokens, key_padding_mask=padding_mask, need_weights=False)[0]
        return self.feed_forward(self.add(tokens, attended, self.norm1), self.norm2)


class TransformerDecoderLayer(PostNormLayer):
    """Self-attention among the queries, cross-attention to the image, and an MLP; see
    :class:`TransformerEncoderLayer` for the arguments."""

    multihead_attn: MaskedCrossAttention

    def __init__(self, dim: int, num_heads: int, feedforward_dim: int, dropout: float = 0.0) -> None:
        attentions = query_attentions(dim, num_heads, dropout, "self_attn", "multihead_attn")
        super().__init__(dim, feedforward_dim, dropout, **attentions)

    def forward(
        self, queries: Tensor, query_position: Tensor, keys: Tensor, values: Tensor, padding_mask: Tensor | None = None
    ) -> Tensor:
        """``queries (B, N, dim)`` to the same shape.

        Args:
            queries: ``(B, N, dim)``.
            query_position: ``(1, N, dim)``, added to ``queries`` where they are attention queries or keys.
            keys: ``(B, S, dim)``, the memory with its position encoding.
            values: ``(B, S, dim)``, the memory itself.
            padding_mask: ``(B, S)`` bool, True at padding, which no query attends to.
        """
        queries = self.self_attention(queries, query_position, self.norm1)
        attended = self.multihead_attn(queries + query_position, keys, values, key_padding_mask=padding_mask)
        return self.feed_forward(self.add(queries, attended, self.norm2), self.norm3)


class MaskedDecoderLayer(PostNormLayer):
    """Masked cross-attention to the image, self-attention among the queries, and an MLP (Mask2Former,
    arXiv:2112.01527, section 3.2); see :class:`TransformerEncoderLayer` for the arguments."""

    cross_attn: MaskedCrossAttention

    def __init__(self, dim: int, num_heads: int, feedforward_dim: int, dropout: float = 0.0) -> None:
        attentions = query_attentions(dim, num_heads, dropout, "cross_attn", "self_attn")
        super().__init__(dim, feedforward_dim, dropout, **attentions)

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
            queries, query_position, padding_mask: as for :class:`TransformerDecoderLayer`.
            keys, values: ``(B, S, dim)``, a feature level with and without its position encoding.
            mask_logits: ``(B, N, h, w)``, the masks predicted from ``queries``.
            grid: (height, width) of the feature level.
        """
        attended = self.cross_attn(
            queries + query_position, keys, values, mask_logits, grid=grid, key_padding_mask=padding_mask
        )
        queries = self.add(queries, attended, self.norm1)
        return self.feed_forward(self.self_attention(queries, query_position, self.norm2), self.norm3)


def layer_stack(
    kind: Callable[[int, int, int, float], PostNormLayer],
    num_layers: int,
    dim: int,
    num_heads: int,
    feedforward_dim: int,
    dropout: float,
) -> nn.ModuleList:
    """Layers with weight matrices initialized as in DETR; biases and norms keep PyTorch's initial values."""
    layers = nn.ModuleList(kind(dim, num_heads, feedforward_dim, dropout) for _ in range(num_layers))
    for parameter in layers.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    return layers


class TransformerEncoder(nn.Module):
    """A stack of :class:`TransformerEncoderLayer`, without a final norm (the layers are post-norm)."""

    def __init__(self, num_layers: int, dim: int, num_heads: int, feedforward_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = layer_stack(TransformerEncoderLayer, num_layers, dim, num_heads, feedforward_dim, dropout)

    def forward(self, tokens: Tensor, position: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """``tokens (B, S, dim)`` to the same shape; see :class:`TransformerEncoderLayer` for the arguments."""
        for layer in self.layers:
            tokens = layer(tokens, position, padding_mask)
        return tokens


class TransformerDecoder(nn.Module):
    """A stack of :class:`TransformerDecoderLayer` whose outputs all pass through one shared final norm."""

    def __init__(self, num_layers: int, dim: int, num_heads: int, feedforward_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = layer_stack(TransformerDecoderLayer, num_layers, dim, num_heads, feedforward_dim, dropout)
        self.norm = nn.LayerNorm(dim)

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
            padding_mask: ``(B, S)`` bool, True at padding, which no query attends to.
            all_layers: return the output of every layer, as deep supervision needs, or only of the last.

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
