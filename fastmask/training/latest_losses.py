"""Records the losses of the latest steps, which stay on the device until they are all read at once."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch import distributed as dist

from fastmask.training.distributed import together

NORM = "gradient_norm"


class LossRecord:
    """The results of :meth:`fastmask.training.Trainer.step` for each step, averaged over the processes.

    Args:
        steps: the number of steps taken before.
        values: the losses of the last of these steps, with which the record begins.
        may_overflow: whether gradients may be infinite, as in float16.
    """

    def __init__(self, steps: int = 0, values: list[dict[str, float]] | None = None, *, may_overflow: bool = False):
        self.values = list(values or [])
        self._steps = steps
        self._unread: list[Mapping[str, Tensor]] = []
        self._may_overflow = may_overflow

    def append(self, losses: Mapping[str, Tensor]) -> None:
        """Adds the losses of a step, without waiting for the device."""
        self._unread.append(losses)
        self._steps += 1

    def read(self) -> None:
        """Adds the losses since the last call to ``values``. Every process must call this.

        Raises:
            FloatingPointError: a loss or gradient is not finite; the message gives the first such step and its losses.
        """
        if not self._unread:
            return
        names = list(self._unread[0])
        table = torch.stack([torch.stack([losses[name].double() for name in names]) for losses in self._unread])
        if together():
            dist.all_reduce(table)
            table /= dist.get_world_size()
        rows = [dict(zip(names, row, strict=True)) for row in table.tolist()]
        first = self._steps - len(rows) + 1
        self._unread.clear()
        for step, row in enumerate(rows, first):
            checked = [value for name, value in row.items() if name != NORM or not self._may_overflow]
            if not all(map(math.isfinite, checked)):
                numbers = ", ".join(f"{name} {value:g}" for name, value in row.items())
                raise FloatingPointError(f"training has diverged: at step {step}, {numbers}")
        self.values += rows

    def take_mean(self) -> dict[str, float]:
        """Returns the mean over ``values`` and empties them; only finite gradient norms enter their mean."""
        rows, self.values = self.values, []
        means = {}
        for name in rows[0] if rows else ():
            column = [row[name] for row in rows if math.isfinite(row[name])]
            means[name] = sum(column) / len(column) if column else math.nan
        return means
