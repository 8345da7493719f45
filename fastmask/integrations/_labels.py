"""Checks of labels in foreign formats."""

from __future__ import annotations

import torch
from torch import Tensor


def check_binary(name: str, masks: Tensor) -> None:
    """The kernels read one bit a pixel, so anything between 0 and 1 would be lost.

    On a GPU the check does not wait: a failure shows as a device-side assertion.

    Raises:
        ValueError: ``masks``, called ``name``, lie on the CPU and hold something other than 0 and 1.
    """
    if masks.dtype == torch.bool:
        return
    binary = ((masks == 0) | (masks == 1)).all()
    if masks.device.type != "cpu":
        torch._assert_async(binary, f"{name} must hold 0 and 1 only")
    elif not torch.compiler.is_compiling() and not binary:
        value = masks[(masks != 0) & (masks != 1)][0].item()
        raise ValueError(f"{name} holds {value}; fastmask takes binary masks, 0 and 1, only")
