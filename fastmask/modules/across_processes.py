"""What a loss is divided by when several processes have a share of the batch each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, distributed


def across_processes(totals: Sequence[Tensor], least: Sequence[float]) -> list[Tensor]:
    """The average of each total over the processes, in one exchange; alone, the totals themselves.

    Data-parallel training averages gradients (and whoever reports them, losses) over W processes. A sum over the batch
    that is divided by T, a total over all processes, must therefore be divided by T / W in each: then the average is
    what one process gives for the batches joined, however unevenly targets lie in them.

    All processes must call this together, whatever their batches hold. Nothing waits for a GPU.

    Args:
        totals: of this process's batch, on one device, of the same shapes and dtypes in all processes.
        least: for each total over all processes, what it counts at least.

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
