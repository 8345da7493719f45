"""What one process does for all: its result, or its error, reaches every process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import distributed as dist

from fastmask.training.distributed import together

Result = TypeVar("Result")


def in_main(call: Callable[[], Result]) -> Result:
    """Runs something in process 0 alone. Every process must ask for it, gets the result, or raises the exception."""
    if not together():
        return call()
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = call()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, 0, device=torch.device("cpu"))
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
