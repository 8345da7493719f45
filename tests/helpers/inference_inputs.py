"""Geometries and logits that the tests of inference draw, and the reference's resampled logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastmask.ops._geometry import Geometry
from fastmask.reference._common import image_logits, resize_bilinear

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
# The same for Triton's interpreter, which takes a tenth of a second for each tile of pixels: no step, one and both, up
# and down, sizes that tiles divide and do not.
SMALL_GEOMETRIES = {
    "stride 4": Geometry((5, 7), None, None, (20, 28)),
    "no ratio": Geometry((7, 5), None, None, (17, 23)),
    "one logit": Geometry((1, 1), None, None, (9, 20)),
    "one pixel": Geometry((3, 4), None, None, (1, 1)),
    "one dimension": Geometry((1, 9), None, None, (1, 35)),
    "at the logits' size": Geometry((9, 17), None, None, (9, 17)),
    "downsampling": Geometry((23, 30), None, None, (9, 7)),
    "cropped": Geometry((6, 7), (24, 28), (21, 25), (21, 25)),
    "both steps": Geometry((6, 7), (24, 28), (21, 25), (17, 30)),
    "both steps, down and up": Geometry((14, 15), (6, 7), (5, 7), (13, 19)),
    "crop alone": Geometry((9, 8), None, (5, 6), (11, 18)),
}
KINDS = ("smooth", "noise")
# (change, error, message): changes of what panoptic and instance inference refuse alike.
BAD_LOGITS_AND_SIZES = {
    "no height": ({"size": (0, 4)}, ValueError, "size must be"),
    "no width": ({"size": (4, 0)}, ValueError, "size must be"),
    "crop beyond the map": ({"valid_size": (10, 4)}, ValueError, "valid_size"),
    "integer logits": ({"mask_logits": torch.zeros(2, 9, 9, 11).int()}, TypeError, "mask_logits must be floating"),
    "other queries": ({"mask_logits": torch.zeros(2, 8, 9, 11)}, ValueError, "mask_logits"),
}


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


def random_masks(
    batch: int, queries: int, grid: tuple[int, int], generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> Tensor:
    """(B, N, h, w) logits of blobs: a query's neighbors resemble each other, as in what a network predicts."""
    noise = torch.randn(batch, queries, *grid, generator=generator) * 6
    return F.avg_pool2d(noise, 3, 1, 1, count_include_pad=False).to(dtype)


def random_classes(
    batch: int, queries: int, classes: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> Tensor:
    """(B, N, K+1) logits, each query fairly sure of a class or of none."""
    return (torch.randn(batch, queries, classes + 1, generator=generator) * 2).to(dtype)


def with_broken_logits(mask_logits: Tensor, generator: torch.Generator) -> Tensor:
    """A NaN or an infinite logit for each twenty. Both infinities in one query would leave its sign to rounding."""
    mask_logits = mask_logits.clone()
    for first, value in enumerate((torch.inf, -torch.inf)):
        some = mask_logits[:, first::2]
        some[torch.rand(some.shape, generator=generator) < 0.05] = value
    mask_logits[torch.rand(mask_logits.shape, generator=generator) < 0.05] = torch.nan
    return mask_logits


def steps(geometry: Geometry) -> dict[str, tuple[int, int] | None]:
    """The public functions' arguments for what comes before the last step."""
    return {"padded_size": geometry.padded_size, "valid_size": geometry.valid_size}


def geometry_of(arguments: Mapping[str, Any]) -> Geometry:
    """Of the arguments of a public function."""
    sizes = (arguments.get(name) for name in ("padded_size", "valid_size"))
    return Geometry(tuple(arguments["mask_logits"].shape[2:]), *sizes, arguments["size"])


def resampled(mask_logits: Tensor, geometry: Geometry, dtype: torch.dtype, *, probabilities: bool = False) -> Tensor:
    """``(B, N, H, W)`` logits of the result's pixels by the reference; of probabilities, if these are resized."""
    logits = image_logits(mask_logits.to(dtype), *steps(geometry).values())
    return resize_bilinear(logits.sigmoid() if probabilities else logits, geometry.size)


def rounding_of(mask_logits: Tensor) -> float:
    """How far rounding may move a resampled logit: by eight roundings of the largest finite one that it is made of."""
    finite = mask_logits[mask_logits.abs() < 1e4]
    return 8 * torch.finfo(torch.float32).eps * (finite.abs().max().item() if len(finite) else 0.0)


def exact_embeddings(generator: torch.Generator, grid: tuple[int, int], **sizes: Any) -> tuple[Tensor, Tensor]:
    """``(B, N, C)`` and ``(B, C, h, w)`` of small integers: their product is the same in any order."""
    batch, queries = sizes.get("batch", 2), sizes.get("queries", 9)
    mask_embed = torch.randint(-3, 4, (batch, queries, 6), generator=generator).float()
    pixel_embed = torch.randint(-2, 3, (batch, 6, *grid), generator=generator).float()
    return mask_embed, pixel_embed


def check_refused(
    inference: Callable[..., Any],
    generator: torch.Generator,
    change: Mapping[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    """Checks that valid arguments, with this change, raise the error."""
    arguments = {"mask_logits": make_logits(generator, (9, 11)), "size": (21, 34)} | change
    with pytest.raises(error, match=message):
        inference(make_class_logits(generator), **arguments)
