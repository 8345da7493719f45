"""Mixed precision by name, for training, evaluation and prediction."""

from __future__ import annotations

import torch

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_precision(precision: str) -> None:
    """Raises a ValueError for an unknown name."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} is unknown; expected one of {', '.join(PRECISIONS)}")


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """A context in which operators on the device compute in this precision; parameters keep their dtype."""
    dtype = PRECISIONS[precision]
    return torch.autocast(device.type, dtype, enabled=dtype is not None)
