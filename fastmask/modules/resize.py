"""Bilinear resizing of maps."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import interpolate

from fastmask.ops._tracing import same_size


def resize_bilinear(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Resizes ``maps (B, C, h, w)`` to (height, width) ``size``, if they differ, with align_corners=False."""
    if same_size(maps.shape[-2:], size):
        return maps
    return interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)
