"""Run-length encoding of binary masks, in the compressed format of the COCO tools."""

from __future__ import annotations

import torch
from torch import Tensor


def rle_encode(masks: Tensor) -> list[dict[str, list[int] | bytes]]:
    """Encodes as ``pycocotools.mask.encode``: lengths of runs of equal pixels, column by column, background first.

    From the fourth on, a run is stored as its difference from the run two before it. A number is stored in two's
    complement, in as many 5-bit digits as it takes, lowest first; a sixth bit says that more follow, and 48 is added.

    Args:
        masks: ``(R, H, W)`` bool.

    Returns:
        For each mask {"size": [H, W], "counts": bytes}.
    """
    return [{"size": list(mask.shape), "counts": compress(run_lengths(mask))} for mask in masks]


def run_lengths(mask: Tensor) -> list[int]:
    """The run lengths of an ``(H, W)`` mask, column by column; the first run is background and may be empty."""
    pixels = mask.t().flatten().to(torch.int8)
    changes = pixels.diff(prepend=pixels.new_zeros(1)).nonzero().flatten()
    ends = torch.cat([changes, changes.new_tensor([len(pixels)])])
    return ends.diff(prepend=ends.new_zeros(1)).tolist()


def compress(lengths: list[int]) -> bytes:
    """The digits of a mask's run lengths, as characters."""
    characters = bytearray()
    for i, length in enumerate(lengths):
        rest = length - lengths[i - 2] if i > 2 else length
        while True:
            digit, rest = rest & 31, rest >> 5
            more = rest != (-1 if digit & 16 else 0)
            characters.append(48 + digit + 32 * more)
            if not more:
                break
    return bytes(characters)
