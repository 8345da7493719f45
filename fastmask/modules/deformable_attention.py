"""Multi-scale deformable attention as a module, with the parameters of Deformable DETR's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from fastmask.functional import deformable_attention


class Projections(Protocol):
    """The learned parts of multi-scale deformable attention; see :class:`MultiScaleDeformableAttention`."""

    sampling_offsets: nn.Linear
    attention_weights: nn.Linear
    value_proj: nn.Linear
    output_proj: nn.Linear


class MultiScaleDeformableAttention(nn.Module):
    """Attention in which each query reads a few points of each feature level, at predicted offsets from its reference
    points (Deformable DETR, arXiv:2010.04159, equation 3).

    The parameters have the names, shapes and initial values of the authors' ``MSDeformAttn``, which the models of
    ``transformers`` share: the first offsets of head h point in the direction of angle 2 pi h / num_heads, one pixel
    further at each point, and the first weights are equal. Batch first. See :func:`fastmask.deformable_attention`.

    Args:
        embed_dim: channels of queries and values, a multiple of ``num_heads``.
        num_heads: attention heads.
        num_levels: L, the number of feature levels.
        num_points: P, the number of points that a head reads of each level.
        backend: "auto", "reference", "native" or "triton".

    Raises:
        ValueError: a number below 1, or ``num_heads`` does not divide ``embed_dim``.
    """

    def __init__(
        self,
        embed_dim: int = 256,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int = 4,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        for name, value in (("num_heads", num_heads), ("num_levels", num_levels), ("num_points", num_points)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if embed_dim < 1 or embed_dim % num_heads != 0:
            raise ValueError(f"num_heads={num_heads} does not divide embed_dim={embed_dim}")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_levels = num_levels
        self.num_points = num_points
        self.backend = backend
        self.sampling_offsets = nn.Linear(embed_dim, num_heads * num_levels * num_points * 2)
        self.attention_weights = nn.Linear(embed_dim, num_heads * num_levels * num_points)
        self.value_proj = nn.Linear(embed_dim, embed_dim)
        self.output_proj = nn.Linear(embed_dim, embed_dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Sets the initial values."""
        for linear in (self.sampling_offsets, self.attention_weights, self.value_proj, self.output_proj):
            nn.init.zeros_(linear.bias)
        for linear in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(linear.weight)
        for linear in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
        angles = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        directions = torch.stack((angles.cos(), angles.sin()), -1)
        directions = directions / directions.abs().amax(-1, keepdim=True)  # [heads, 2]
        steps = torch.arange(1, self.num_points + 1)[:, None]  # [P, 1]
        offsets = (directions[:, None] * steps)[:, None].expand(-1, self.num_levels, -1, -1)
        self.sampling_offsets.bias.copy_(offsets.flatten())

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        value: Tensor,
        spatial_shapes: Sequence[tuple[int, int]],
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """``(B, Q, embed_dim)`` in the dtype of the projections.

        Args:
            query: ``(B, Q, embed_dim)``, with its position encoding.
            reference_points: ``(B or 1, Q, L or 1, 2)``, (x, y) from which the offsets count, in 0..1 inside the level;
                offsets are in pixels of the level. Or ``(B or 1, Q, L or 1, 4)``, boxes (x, y, width, height) with
                their centers; an offset of ``num_points`` is then half the width or height.
            value: ``(B, S, embed_dim)``, the pixels of all levels, one level after another, row by row.
            spatial_shapes: (H, W) of each of the L levels; S is the sum of H * W.
            padding_mask: ``(B, S)`` bool, True at padding, whose values count as 0.

        Raises:
            ValueError: shapes that do not fit.
        """
        if len(spatial_shapes) != self.num_levels:
            raise ValueError(f"spatial_shapes has {len(spatial_shapes)} levels; expected num_levels={self.num_levels}")
        for name, letter, tensor in (("query", "Q", query), ("value", "S", value)):
            if tensor.dim() != 3 or tensor.shape[-1] != self.embed_dim:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}; expected (B, {letter}, embed_dim={self.embed_dim})"
                )
        attended, _ = projected_deformable_attention(
            self,
            query,
            reference_points,
            value,
            spatial_shapes,
            padding_mask,
            num_heads=self.num_heads,
            backend=self.backend,
        )
        return attended

    def extra_repr(self) -> str:
        return (
            f"{self.embed_dim}, num_heads={self.num_heads}, num_levels={self.num_levels}, num_points={self.num_points}"
        )


def projected_deformable_attention(
    projections: Projections,
    query: Tensor,
    reference_points: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    padding_mask: Tensor | None = None,
    *,
    num_heads: int,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The output of :class:`MultiScaleDeformableAttention` and the attention weights ``(B, Q, heads, L, P)``.

    Args:
        projections: a module of any library with these projections.
        query, reference_points, value, spatial_shapes, padding_mask: as for the module.
        num_heads: attention heads.
        backend: of :func:`fastmask.deformable_attention`.
    """
    num_levels = len(spatial_shapes)
    value = projections.value_proj(value)
    if padding_mask is not None:
        if padding_mask.shape != value.shape[:2]:
            raise ValueError(f"padding_mask has shape {tuple(padding_mask.shape)}; expected {tuple(value.shape[:2])}")
        value = value.masked_fill(padding_mask[..., None], 0)
    weights = projections.attention_weights(query).unflatten(-1, (num_heads, -1)).softmax(-1)
    weights = weights.unflatten(-1, (num_levels, -1))
    offsets = projections.sampling_offsets(query).unflatten(-1, (num_heads, num_levels, -1, 2))
    locations = sampling_locations(reference_points, offsets, spatial_shapes)
    attended = deformable_attention(
        value.unflatten(-1, (num_heads, -1)), spatial_shapes, locations, weights, backend=backend
    )
    return projections.output_proj(attended), weights


def sampling_locations(reference_points: Tensor, offsets: Tensor, spatial_shapes: Sequence[tuple[int, int]]) -> Tensor:
    """``(B, Q, heads, L, P, 2)``: the points of :func:`fastmask.deformable_attention`, in 0..1 inside each level.

    Args:
        reference_points, spatial_shapes: as for :class:`MultiScaleDeformableAttention`.
        offsets: ``(B, Q, heads, L, P, 2)``.

    Raises:
        ValueError: reference points of another shape.
    """
    shape = tuple(reference_points.shape)
    if len(shape) != 4 or shape[-1] not in (2, 4) or shape[2] not in (1, len(spatial_shapes)):
        raise ValueError(
            f"reference_points has shape {shape}; expected (B, Q, L, 2) or (B, Q, L, 4) for L = {len(spatial_shapes)}"
        )
    levels, points = offsets.shape[3:5]

    def of_each_point(of_levels: Tensor) -> Tensor:
        """``(..., L or 1, 2)`` as ``(..., L * P * 2)``: a loop over the two coordinates alone would take long."""
        return of_levels[..., None, :].expand(*of_levels.shape[:-2], levels, points, 2).flatten(-3)

    origins, offsets = of_each_point(reference_points[..., :2])[:, :, None], offsets.flatten(3)
    if shape[-1] == 4:
        units = of_each_point(reference_points[..., 2:] * (0.5 / points))[:, :, None]
        locations = torch.addcmul(origins, offsets, units)
    else:
        # Filled on the device: a copy from the host could not be part of a CUDA graph.
        sides = [reference_points.new_full((), side) for height, width in spatial_shapes for side in (width, height)]
        locations = torch.addcdiv(origins, offsets, of_each_point(torch.stack(sides).view(-1, 2)))
    return locations.unflatten(-1, (levels, points, 2))
