"""Sizes that have no value yet, while a model is traced for images of any size."""

from __future__ import annotations

import torch


def known(condition: bool | torch.SymBool) -> bool:
    """A condition on sizes; False where it depends on sizes that ``torch.export`` leaves open.

    Asking such a condition by ``if`` would export a program for the sizes alone of which it has the same answer.
    """
    if isinstance(condition, bool):
        return condition
    # Imports SymPy, which nothing else of ours needs.
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def same_size(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two (height, width) are equal; False where sizes that are left open decide."""
    return known(one[0] == other[0]) and known(one[1] == other[1])


def ceil_div(length: int, divisor: int) -> int:
    """``length / divisor`` rounded up, both positive. ONNX rounds the quotient of integers towards zero, so the usual
    ``-(-length // divisor)`` would come out of an export one too small.
    """
    return (length + divisor - 1) // divisor
