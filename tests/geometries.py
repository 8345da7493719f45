"""Sizes of mask logits and of results, and logits for them, that tests of the inference kernels share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Size = tuple[int, int]


@dataclass(frozen=True)
class Sizes:
    """h x w logits, which become size pixels by way of the valid part of a padded image."""

    grid: Size
    size: Size
    padded: Size | None = None
    valid: Size | None = None

    def options(self) -> dict[str, Size | None]:
        return {"padded_size": self.padded, "valid_size": self.valid}

    def arguments(self) -> tuple[object, ...]:
        """The operators' last arguments, for all of the result."""
        return self.grid, self.padded, self.valid, self.size, 0, 0, self.size[0]


# Each is there for a reason: no step, one and both, up and down, sizes that tiles divide and do not.
GEOMETRIES = {
    "stride 4": Sizes((5, 7), (20, 28)),
    "no ratio": Sizes((7, 5), (17, 23)),
    "one logit": Sizes((1, 1), (9, 20)),
    "one pixel": Sizes((3, 4), (1, 1)),
    "one dimension": Sizes((1, 9), (1, 35)),
    "at the logits' size": Sizes((9, 17), (9, 17)),
    "downsampling": Sizes((23, 30), (9, 7)),
    "cropped": Sizes((6, 7), (21, 25), (24, 28), (21, 25)),
    "both steps": Sizes((6, 7), (17, 30), (24, 28), (21, 25)),
    "both steps, down and up": Sizes((14, 15), (13, 19), (6, 7), (5, 7)),
    "crop alone": Sizes((9, 8), (11, 18), None, (5, 6)),
}


def random_masks(
    batch: int, queries: int, grid: Size, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> Tensor:
    """(B, N, h, w) logits of blobs: a query's neighbours resemble each other, as in what a network predicts."""
    noise = torch.randn(batch, queries, *grid, generator=generator) * 6
    return torch.nn.functional.avg_pool2d(noise, 3, 1, 1, count_include_pad=False).to(dtype)


def random_classes(
    batch: int, queries: int, classes: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> Tensor:
    """(B, N, K+1) logits, each query fairly sure of a class or of none."""
    return (torch.randn(batch, queries, classes + 1, generator=generator) * 2).to(dtype)
