"""Sizes that ``torch.export`` leaves open (dynamic dimensions).

When a program is traced for images of any size, heights and widths are symbols instead of numbers. An ``if`` that
compares two of them would restrict the exported program to the sizes that take the same branch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def is_open(size: Sequence[int]) -> bool:
    """Whether any side is left open."""
    return any(isinstance(side, torch.SymInt) for side in size)


def known(condition: bool | torch.SymBool) -> bool:
    """Whether a condition on sizes is known to hold; False if it depends on an open side."""
    if isinstance(condition, bool):
        return condition
    # Imports SymPy, which nothing else of ours needs.
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def same_size(one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two (height, width) pairs are equal; False if that depends on an open side."""
    return known(one[0] == other[0]) and known(one[1] == other[1])


def as_size(size: Sequence[int]) -> tuple[int, int]:
    """(height, width) as Python integers, from any integer type; open sides stay open."""
    height, width = (side if isinstance(side, torch.SymInt) else int(side) for side in size)
    return height, width


def ceil_div(length: int, divisor: int) -> int:
    """``length / divisor`` rounded up, for positive numbers. ONNX rounds integer quotients toward zero, so that the
    usual ``-(-length // divisor)`` would be one too small.
    """
    return (length + divisor - 1) // divisor
