"""Small geometries, and logits for them, that the tests of the Triton kernels of inference share: the interpreter takes
a tenth of a second for each tile of pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask.ops._geometry import Geometry

# (grid, padded_size, valid_size, size): no step, one and both, up and down, sizes that tiles divide and do not.
GEOMETRIES = {
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


def steps(geometry: Geometry) -> dict[str, tuple[int, int] | None]:
    """The public functions' arguments for what comes before the last step."""
    return {"padded_size": geometry.padded_size, "valid_size": geometry.valid_size}


def random_masks(
    batch: int, queries: int, grid: tuple[int, int], generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> Tensor:
    """(B, N, h, w) logits of blobs: a query's neighbors resemble each other, as in what a network predicts."""
    noise = torch.randn(batch, queries, *grid, generator=generator) * 6
    return torch.nn.functional.avg_pool2d(noise, 3, 1, 1, count_include_pad=False).to(dtype)


def random_classes(
    batch: int, queries: int, classes: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> Tensor:
    """(B, N, K+1) logits, each query fairly sure of a class or of none."""
    return (torch.randn(batch, queries, classes + 1, generator=generator) * 2).to(dtype)
