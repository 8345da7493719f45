"""Multi-scale deformable attention in transformers' models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fastmask.functional import deformable_attention
from fastmask.integrations._replacement import Replacement
from fastmask.modules.deformable_attention import projected_deformable_attention


class MultiScaleDeformableAttention(Replacement, nn.Module):
    """The part without weights that Deformable DETR's descendants share: samples of the values, weighted and summed."""

    reads_masks = False

    def forward(
        self,
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_spatial_shapes_list: Sequence[tuple[int, int]],
        level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int,
    ) -> Tensor:
        """``(B, Q, heads * dim)``; see :func:`fastmask.deformable_attention`."""
        return deformable_attention(value, value_spatial_shapes_list, sampling_locations, attention_weights)


class EncoderAttention(Replacement, nn.Module):
    """The attention in the pixel decoders of Mask2Former and OneFormer, with its projections."""

    n_heads: int
    sampling_offsets: nn.Linear
    attention_weights: nn.Linear
    value_proj: nn.Linear
    output_proj: nn.Linear

    reads_masks = False

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        position_embeddings: Tensor | None = None,
        reference_points: Tensor | None = None,
        *,
        spatial_shapes_list: Sequence[tuple[int, int]],
        **unused: Any,
    ) -> tuple[Tensor, Tensor]:
        """``(B, Q, E)`` and the attention weights ``(B, Q, heads, L, P)``.

        Args:
            hidden_states: ``(B, Q, E)``, the queries.
            attention_mask: ``(B, S)`` bool, True at padding.
            encoder_hidden_states: ``(B, S, E)``, the values before their projection.
            position_embeddings: ``(B, Q, E)``, added to the queries.
            reference_points: ``(B, Q, L, 2)`` points or ``(B, Q, L, 4)`` boxes.
            spatial_shapes_list: (height, width) of each level.
            encoder_attention_mask, unused: transformers does not use them either, or has them in another form.
        """
        assert encoder_hidden_states is not None and reference_points is not None
        return projected_deformable_attention(
            self,
            hidden_states if position_embeddings is None else hidden_states + position_embeddings,
            reference_points,
            encoder_hidden_states,
            spatial_shapes_list,
            attention_mask,
            num_heads=self.n_heads,
        )
