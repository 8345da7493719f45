"""From the grid of the mask logits to the pixels of a result: what the inference operators share."""

from __future__ import annotations

import math
from dataclasses import dataclass

Size = tuple[int, int]

# The last arguments of each operator, and their types. The mask logits are the rows of the grid from in_top on, the
# result the out_rows rows of the whole from out_top on.
GEOMETRY = (
    "SymInt[] grid, SymInt[]? padded_size, SymInt[]? valid_size, SymInt[] size, SymInt in_top, SymInt out_top, "
    "SymInt out_rows"
)
GeometryArguments = tuple[Size, Size | None, Size | None, Size, int, int, int]


def result_size(geometry: GeometryArguments) -> Size:
    """(rows, columns) of an operator's result."""
    _, _, _, (_, width), _, _, out_rows = geometry
    return out_rows, width


# Logits beyond these bounds, also infinite ones, count as the bound, and NaN as the lower one: arithmetic stays finite,
# a query never wins where it reads a NaN, and other pixels and queries are not affected.
LOGIT_BOUND = 1e30


@dataclass(frozen=True)
class Geometry:
    """Up to two bilinear steps (align_corners=False, no antialiasing), each a product of rows and columns.

    The grid is upsampled to ``padded_size`` and cropped to its top left ``valid_size``, which is resized to ``size``.
    In both, output i of ``outputs`` from ``inputs`` reads the coordinate max((i + 1/2) inputs / outputs - 1/2, 0), in
    float64, between the input at or before it and the next one (the last one where there is none). The composition has
    up to four taps a side, whose weights are products, rounded to float32 once; taps of weight 0 are not read.

    Args:
        grid: (h, w) of the whole grid of mask logits.
        padded_size: (height, width) of the padded network input; None: the grid.
        valid_size: (height, width) of the image within it; None: all of it.
        size: (H, W) of the result.
    """

    grid: Size
    padded_size: Size | None
    valid_size: Size | None
    size: Size

    def arguments(self, in_top: int = 0, out_top: int = 0, out_rows: int | None = None) -> GeometryArguments:
        """The operators' last arguments, by default for all of the result."""
        rows = self.size[0] if out_rows is None else out_rows
        return self.grid, self.padded_size, self.valid_size, self.size, in_top, out_top, rows

    def input_rows(self, out_top: int, out_rows: int) -> tuple[int, int]:
        """(first, end) of the grid's rows that the rows [out_top, out_top + out_rows) of the result read."""
        padded = self.grid[0] if self.padded_size is None else self.padded_size[0]
        valid = padded if self.valid_size is None else self.valid_size[0]
        first, last = out_top, out_top + out_rows - 1
        for inputs, outputs, limit in ((valid, self.size[0], valid), (self.grid[0], padded, self.grid[0])):
            first = _taps(first, inputs, outputs, limit)[0]
            last = _taps(last, inputs, outputs, limit)[1]
        return first, last + 1


def _taps(index: int, inputs: int, outputs: int, limit: int) -> tuple[int, int]:
    """The first and last input that one output of a step reads."""
    coordinate = max((index + 0.5) * (inputs / outputs) - 0.5, 0.0)
    first = min(math.floor(coordinate), limit - 1)
    return first, min(first + (coordinate > first), limit - 1)
