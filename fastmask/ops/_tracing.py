"""Sizes that ``torch.export`` leaves open.

When a program is traced for images of any size, sides are symbols instead of numbers. An ``if`` on whether two of them
are equal would restrict the exported program to the sizes that take the same branch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def is_open(size: Sequence[int]) -> bool:
    """Whether any side is left open."""
    return any(isinstance(side, torch.SymInt) for side in size)


def known(condition: bool | torch.SymBool) -> bool:
    """A condition on sizes; False where it depends on an open side."""
    if isinstance(condition, bool):
        return condition
    # Imports SymPy, which nothing else of ours needs.
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def same_size(one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two (height, width) are equal; False where that depends on an open side."""
    return known(one[0] == other[0]) and known(one[1] == other[1])


def as_size(size: Sequence[int]) -> tuple[int, int]:
    """(height, width) as Python integers, also from NumPy's or tensors; open sides stay open."""
    height, width = (side if isinstance(side, torch.SymInt) else int(side) for side in size)
    return height, width


def ceil_div(length: int, divisor: int) -> int:
    """``length / divisor`` rounded up, both positive. ONNX rounds quotients of integers towards zero, which would make
    the usual ``-(-length // divisor)`` one too small there.
    """
    return (length + divisor - 1) // divisor
