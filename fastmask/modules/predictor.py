"""MaskFormer's transformer decoder, which predicts the class and mask of each query from image features."""

from __future__ import annotations

from torch import Tensor, nn

from fastmask.modules.mlp import MLP
from fastmask.modules.pixel_decoder import projection
from fastmask.modules.position_encoding import sine_position_encoding
from fastmask.modules.transformer import TransformerDecoder

MASK_EMBED_LAYERS = 3


class TransformerPredictor(nn.Module):
    """MaskFormer's transformer module and segmentation head (arXiv:2107.06278, section 3.3).

    Learned query positions attend to the image in a transformer decoder; a linear layer gives each query its class
    logits, an MLP its mask embedding, and the mask logits are the products of the mask embeddings with the pixel
    embeddings. All decoder layers share the heads and the final norm.

    Args:
        input_dim: channels of the memory; projected to ``hidden_dim`` if they differ.
        num_classes: K; None if each query stands for one class, so that there is no class head.
        num_queries: N.
        hidden_dim: channels of the transformer, a multiple of 4 and of ``num_heads``.
        mask_dim: channels of the pixel embeddings.
        decoder_layers: L.
        num_heads: attention heads.
        feedforward_dim: hidden channels of the transformer's MLPs.
        dropout: dropout probability in the transformer.
    """

    def __init__(
        self,
        input_dim: int,
        num_classes: int | None,
        *,
        num_queries: int = 100,
        hidden_dim: int = 256,
        mask_dim: int = 256,
        decoder_layers: int = 6,
        num_heads: int = 8,
        feedforward_dim: int = 2048,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.input_proj = projection(input_dim, hidden_dim)
        self.query_embed = nn.Embedding(num_queries, hidden_dim)
        self.decoder = TransformerDecoder(decoder_layers, hidden_dim, num_heads, feedforward_dim, dropout)
        self.class_embed = None if num_classes is None else nn.Linear(hidden_dim, num_classes + 1)
        self.mask_embed = MLP(hidden_dim, hidden_dim, mask_dim, MASK_EMBED_LAYERS)

    def forward(
        self, memory: Tensor, padding_mask: Tensor | None = None, *, all_layers: bool = True
    ) -> tuple[Tensor | None, Tensor]:
        """Predicts from the coarsest map; ``mask_products`` of mask and pixel embeddings gives the mask logits.

        Args:
            memory: ``(B, input_dim, h', w')``, the coarsest map.
            padding_mask: ``(B, h', w')`` bool, True at cells of the memory that are padding.
            all_layers: predict after every decoder layer, or only after the last (L = 1).

        Returns:
            ``class_logits (L, B, N, K+1)``, None without a class head, and ``mask_embed (L, B, N, mask_dim)``.
        """
        memory = self.input_proj(memory)
        _, dim, height, width = memory.shape
        position = sine_position_encoding(
            height, width, dim, padding_mask=padding_mask, dtype=memory.dtype, device=memory.device
        )
        if padding_mask is not None:
            padding_mask = padding_mask.flatten(1)
        queries = self.decoder(
            self.query_embed.weight, memory.flatten(2).transpose(1, 2), position, padding_mask, all_layers=all_layers
        )
        return None if self.class_embed is None else self.class_embed(queries), self.mask_embed(queries)
