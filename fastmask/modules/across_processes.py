"""The divisors of losses where several processes each have a part of the batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, distributed


def across_processes(totals: Sequence[Tensor], least: Sequence[float]) -> list[Tensor]:
    """The average of each total over the processes, in one exchange; alone, the totals themselves.

    Data-parallel training averages gradients, and reports average losses, over W processes. To divide a sum over the
    joined batch by T, a total over all processes, each process must therefore divide its own sum by T / W. The average
    then is that of one process with the joined batch, however unevenly the targets are distributed.

    All processes must call this together, whatever their batches hold. Nothing waits for a GPU.

    Args:
        totals: of this process's batch, on one device, of the same shapes and dtypes in all processes.
        least: lower bound of each total over all processes.

    Returns:
        tensors of the shapes of ``totals``: max(sum over processes, least) / W.
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return [total.clamp(min=floor) for total, floor in zip(totals, least, strict=True)]
    joined = torch.cat([total.detach().flatten() for total in totals])
    distributed.all_reduce(joined)
    parts = joined.split([total.numel() for total in totals])
    return [
        part.view(total.shape).clamp(min=floor) / distributed.get_world_size()
        for part, total, floor in zip(parts, totals, least, strict=True)
    ]
