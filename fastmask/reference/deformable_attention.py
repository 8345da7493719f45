"""Multi-scale deformable attention: bilinear samples of several feature maps, weighted and summed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmask.reference._common import check_shape


def deformable_attention(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """sum_l sum_p A_lp V_l(x_lp, y_lp) in each head, where V_l(x, y) is the bilinear sample of level l.

    Deformable DETR (arXiv:2010.04159), equation 3, without its two projections. (0, 0) is the upper left corner of a
    level's upper left pixel and (1, 1) the lower right corner of its lower right pixel (align_corners=False). Pixels
    beyond the border are 0. A point a pixel or more outside, or at NaN, contributes nothing, whatever its weight.

    Args:
        value: ``(B, S, heads, dim)`` float, the pixels of all levels, one level after another, row by row.
        spatial_shapes: (H, W) of each of the L levels; S is the sum of H * W.
        sampling_locations: ``(B, Q, heads, L, P, 2)``, (x, y) of each point, in 0..1 inside the level.
        attention_weights: ``(B, Q, heads, L, P)``.

    Returns:
        ``(B, Q, heads * dim)``.

    Raises:
        ValueError: shapes that do not fit.
    """
    _check_sizes(value, spatial_shapes, sampling_locations, attention_weights)
    batch_size, _, heads, dim = value.shape
    num_queries = sampling_locations.shape[1]
    out = value.new_zeros(batch_size * heads, dim, num_queries)
    levels = value.split([height * width for height, width in spatial_shapes], 1)
    for level, (pixels, size) in enumerate(zip(levels, spatial_shapes, strict=True)):
        maps = pixels.permute(0, 2, 3, 1).reshape(batch_size * heads, dim, *size)
        points = sampling_locations[:, :, :, level].transpose(1, 2).flatten(0, 1)  # [B * heads, Q, P, 2]
        weights = attention_weights[:, :, :, level].transpose(1, 2).flatten(0, 1)  # [B * heads, Q, P]
        inside = _inside(_positions(points, size), size)
        grid = 2 * points.masked_fill(~inside[..., None], -2) - 1
        samples = F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        out = out + (samples * weights.masked_fill(~inside, 0)[:, None]).sum(-1)
    return out.view(batch_size, heads * dim, num_queries).transpose(1, 2)


def gathered_deformable_attention(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """The same for finite values, from operators that every runtime has: four gathered rows for each point."""
    _check_sizes(value, spatial_shapes, sampling_locations, attention_weights)
    batch_size, num_values, heads, dim = value.shape
    rows = value.reshape(batch_size * num_values * heads, dim)
    images = torch.arange(batch_size, device=value.device)[:, None, None, None] * num_values
    head = torch.arange(heads, device=value.device)[:, None]
    out: Tensor | None = None
    start = 0
    for level, size in enumerate(spatial_shapes):
        position = _positions(sampling_locations[:, :, :, level], size)  # [B, Q, heads, P, 2]
        inside = _inside(position, size)
        position = position.masked_fill(~inside[..., None], 0)
        weights = attention_weights[:, :, :, level].masked_fill(~inside, 0)
        first = position.floor()
        right, lower = (position - first).unbind(-1)
        column, row = first.long().unbind(-1)
        for row_step, row_share in ((0, 1 - lower), (1, lower)):
            for column_step, column_share in ((0, 1 - right), (1, right)):
                y, x = row + row_step, column + column_step
                on_map = (y >= 0) & (y < size[0]) & (x >= 0) & (x < size[1])
                pixel = start + y.clamp(0, size[0] - 1) * size[1] + x.clamp(0, size[1] - 1)
                share = (weights * row_share * column_share).masked_fill(~on_map, 0)
                part = (rows[(images + pixel) * heads + head] * share[..., None]).sum(-2)  # [B, Q, heads, dim]
                out = part if out is None else out + part
        start += size[0] * size[1]
    assert out is not None
    return out.flatten(2)


def _positions(points: Tensor, size: tuple[int, int]) -> Tensor:
    """(x, y) in pixels, relative to the center of the upper left one."""
    return torch.stack([points[..., 0] * size[1], points[..., 1] * size[0]], -1) - 0.5


def _inside(positions: Tensor, size: tuple[int, int]) -> Tensor:
    """Whether a position is less than a pixel away from the centers of pixels; not if it is NaN."""
    x, y = positions.unbind(-1)
    return (x > -1) & (x < size[1]) & (y > -1) & (y < size[0])


def _check_sizes(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> None:
    check_shape("value", value, (-1, -1, -1, -1))
    num_pixels = sum(height * width for height, width in spatial_shapes)
    if len(spatial_shapes) == 0 or value.shape[1] != num_pixels:
        raise ValueError(f"the levels have {num_pixels} pixels; value has shape {tuple(value.shape)}")
    batch_size, _, heads, _ = value.shape
    check_shape("sampling_locations", sampling_locations, (batch_size, -1, heads, len(spatial_shapes), -1, 2))
    check_shape("attention_weights", attention_weights, tuple(sampling_locations.shape[:-1]))
