"""Inputs that the tests of panoptic and instance inference draw, and how far rounding may move a resampled logit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmask.ops._geometry import Geometry

# (grid, padded_size, valid_size, size): each is there for a reason. Tiles have 16 rows and 64 columns.
GEOMETRIES = {
    "four times larger": Geometry((25, 38), None, None, (100, 152)),
    "odd sizes": Geometry((13, 29), None, None, (50, 117)),
    "the logits' own size": Geometry((21, 70), None, None, (21, 70)),
    "smaller than the logits": Geometry((33, 140), None, None, (17, 71)),
    "much smaller, a tile reads far more than two vectors": Geometry((90, 300), None, None, (5, 7)),
    "one logit": Geometry((1, 1), None, None, (9, 70)),
    "one pixel": Geometry((6, 5), None, None, (1, 1)),
    "one of everything": Geometry((1, 1), None, None, (1, 1)),
    "one row": Geometry((1, 70), None, None, (1, 280)),
    "one column": Geometry((70, 1), None, None, (280, 1)),
    "two steps up": Geometry((20, 30), (80, 120), (75, 101), (131, 90)),
    "up, then down": Geometry((20, 30), (80, 120), (63, 117), (31, 50)),
    "cropped alone": Geometry((20, 30), None, (17, 11), (60, 70)),
    "padded to fewer rows than the grid": Geometry((20, 30), (12, 50), (12, 50), (40, 20)),
}
KINDS = ("smooth", "noise")


def make_logits(
    generator: torch.Generator, grid: tuple[int, int], *, batch: int = 2, queries: int = 9, kind: str = "smooth"
) -> Tensor:
    """``(B, N, h, w)`` float32: "smooth" masks leave most tiles to one query or none; with "noise" all compete."""
    if kind == "noise":
        return torch.randn(batch, queries, *grid, generator=generator) * 4
    return F.interpolate(torch.randn(batch, queries, 3, 4, generator=generator) * 12 - 3, grid, mode="bicubic")


def make_class_logits(generator: torch.Generator, *, batch: int = 2, queries: int = 9, classes: int = 4) -> Tensor:
    """``(B, N, K+1)`` float32, probabilities that often exceed 0.5."""
    return torch.randn(batch, queries, classes + 1, generator=generator) * 3


def layouts(mask_logits: Tensor) -> dict[str, Tensor]:
    """The same logits in other places of memory."""
    padded = F.pad(mask_logits, (3, 2, 1, 4), value=float("nan"))
    h, w = mask_logits.shape[-2:]
    return {
        "channels last": mask_logits.contiguous(memory_format=torch.channels_last),
        "rows apart": padded[..., 1 : 1 + h, 3 : 3 + w],
        "columns apart": mask_logits.repeat_interleave(2, -1)[..., ::2],
        "images inside": mask_logits.transpose(0, 1).contiguous().transpose(0, 1),
        "transposed": mask_logits.mT.contiguous().mT,
    }


def exact_embeddings(generator: torch.Generator, grid: tuple[int, int], **sizes: Any) -> tuple[Tensor, Tensor]:
    """``(B, N, C)`` and ``(B, C, h, w)`` of small integers: their product is the same in any order."""
    batch, queries = sizes.get("batch", 2), sizes.get("queries", 9)
    mask_embed = torch.randint(-3, 4, (batch, queries, 6), generator=generator).float()
    pixel_embed = torch.randint(-2, 3, (batch, 6, *grid), generator=generator).float()
    return mask_embed, pixel_embed
