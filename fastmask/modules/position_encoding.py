"""The sine position encoding of a feature map."""

from __future__ import annotations

import math

import torch
from torch import Tensor

EPSILON = 1e-6


def sine_position_encoding(
    height: int,
    width: int,
    dim: int,
    *,
    padding_mask: Tensor | None = None,
    temperature: float = 10000.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """The fixed two-dimensional encoding that DETR adds to attention keys.

    Rows and columns are counted from 1 and scaled so that the last one of the image is at 2 pi; then
    ``PE(p, 2i) = sin(p / T^(2i / d))`` and ``PE(p, 2i + 1) = cos(p / T^(2i / d))`` with ``d = dim / 2``. Channels of
    the row come first (Vaswani et al., arXiv:1706.03762, section 3.5; Carion et al., arXiv:2005.12872, appendix A.4).

    Args:
        height: rows of the map.
        width: columns of the map.
        dim: channels, a multiple of 4.
        padding_mask: ``(B, height, width)`` bool, True at padding, which is at the bottom and right. Positions are
            scaled by the extent of each image without padding, so that an image gets the same encoding in any batch.
        temperature: T.
        dtype: dtype of the result; the arithmetic is float32, or float64 for float64.
        device: device of the result; by default that of ``padding_mask``.

    Returns:
        ``(B, height * width, dim)``, or ``(1, height * width, dim)`` without a mask.

    Raises:
        ValueError: ``dim`` is not a multiple of 4, or the mask has another shape.
    """
    if dim <= 0 or dim % 4:
        raise ValueError(f"dim must be a positive multiple of 4, got {dim}")
    compute_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    if padding_mask is None:
        rows = torch.arange(1, height + 1, dtype=compute_dtype, device=device)[None, :, None]
        columns = torch.arange(1, width + 1, dtype=compute_dtype, device=device)[None, None, :]
        rows, columns = rows.expand(1, height, width), columns.expand(1, height, width)
    else:
        if padding_mask.dim() != 3 or padding_mask.shape[1:] != (height, width):
            raise ValueError(f"padding_mask has shape {tuple(padding_mask.shape)}; expected (B, {height}, {width})")
        inside = ~padding_mask
        rows, columns = inside.cumsum(1, dtype=compute_dtype), inside.cumsum(2, dtype=compute_dtype)
    period = temperature ** (torch.arange(0, dim // 2, 2, dtype=compute_dtype, device=rows.device) / (dim // 2))
    rows = rows / (rows[:, -1:, :] + EPSILON) * (2 * math.pi)
    columns = columns / (columns[:, :, -1:] + EPSILON) * (2 * math.pi)
    angles = torch.stack((rows, columns), 3)[..., None] / period  # (B, height, width, 2, dim / 4)
    encoding = torch.stack((angles.sin(), angles.cos()), -1)
    return encoding.flatten(3).flatten(1, 2).to(dtype)
