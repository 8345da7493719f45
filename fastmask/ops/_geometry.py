"""The inference operators' resampling geometry, from the grid of the mask logits to the pixels of a result."""

from __future__ import annotations

import math
from dataclasses import dataclass

Size = tuple[int, int]

# The last arguments of each inference operator, as a schema and as types. An operator gets the grid's rows from in_top
# on as mask logits, and computes out_rows rows of the result, from out_top on.
GEOMETRY = (
    "SymInt[] grid, SymInt[]? padded_size, SymInt[]? valid_size, SymInt[] size, SymInt in_top, SymInt out_top, "
    "SymInt out_rows"
)
GeometryArguments = tuple[Size, Size | None, Size | None, Size, int, int, int]


def result_size(geometry: GeometryArguments) -> Size:
    """(rows, columns) of an operator's result."""
    _, _, _, (_, width), _, _, out_rows = geometry
    return out_rows, width


# Logits are clamped to -LOGIT_BOUND..LOGIT_BOUND, and NaN becomes -LOGIT_BOUND: arithmetic stays finite, a query never
# wins where it reads a NaN, and other pixels and queries are not affected.
LOGIT_BOUND = 1e30


@dataclass(frozen=True)
class Geometry:
    """Up to two bilinear steps (align_corners=False, no antialiasing), each separable into rows and columns.

    The grid is upsampled to ``padded_size`` and cropped to its top left ``valid_size``, which is resized to ``size``.
    In a step from ``inputs`` to ``outputs`` samples, output i interpolates at max((i + 1/2) inputs / outputs - 1/2, 0),
    in float64, between the input at or before this coordinate and the next (or the last) one. Both steps together have
    up to four taps per axis, whose weights are products, rounded to float32 once; taps of weight 0 are not read.

    Args:
        grid: (h, w) of the whole grid of mask logits.
        padded_size: (height, width) of the padded network input; None means the size of the grid.
        valid_size: (height, width) of the image within the padded input; None means all of it.
        size: (H, W) of the result.
    """

    grid: Size
    padded_size: Size | None
    valid_size: Size | None
    size: Size

    def arguments(self, in_top: int = 0, out_top: int = 0, out_rows: int | None = None) -> GeometryArguments:
        """The operators' last arguments, by default for the whole result."""
        rows = self.size[0] if out_rows is None else out_rows
        return self.grid, self.padded_size, self.valid_size, self.size, in_top, out_top, rows

    def input_rows(self, out_top: int, out_rows: int) -> tuple[int, int]:
        """The range [first, end) of grid rows that the result's rows [out_top, out_top + out_rows) read."""
        padded = self.grid[0] if self.padded_size is None else self.padded_size[0]
        valid = padded if self.valid_size is None else self.valid_size[0]
        first, last = out_top, out_top + out_rows - 1
        for inputs, outputs, limit in ((valid, self.size[0], valid), (self.grid[0], padded, self.grid[0])):
            first = _tap_range(first, inputs, outputs, limit)[0]
            last = _tap_range(last, inputs, outputs, limit)[1]
        return first, last + 1


def _tap_range(index: int, inputs: int, outputs: int, limit: int) -> tuple[int, int]:
    """The first and last input that one output of a step reads."""
    coordinate = max((index + 0.5) * (inputs / outputs) - 0.5, 0.0)
    first = min(math.floor(coordinate), limit - 1)
    return first, min(first + (coordinate > first), limit - 1)
