"""Work that process 0 does for all processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import distributed as dist

from fastmask.training.distributed import together

Result = TypeVar("Result")


def in_main(call: Callable[[], Result]) -> Result:
    """Calls a function in process 0 only. Every process must call this; each returns the result or raises the error."""
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
