"""A device by name, checked before it is used."""

from __future__ import annotations

import torch


def usable_device(device: str | torch.device) -> torch.device:
    """A device by name, if this machine has it.

    Raises:
        ValueError: no such device, or PyTorch cannot use it here.
    """
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={str(device)!r} cannot be used: {str(error).partition(chr(10))[0]}") from error
    return found
