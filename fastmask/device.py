"""Checks that a device can be used."""

from __future__ import annotations

import torch


def usable_device(device: str | torch.device) -> torch.device:
    """The device of this name, after allocating on it to check that it works.

    Raises:
        ValueError: there is no such device, or PyTorch cannot use it on this machine.
    """
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={str(device)!r} cannot be used: {str(error).partition(chr(10))[0]}") from error
    return found
