"""The divisors of losses when several processes each have a part of the batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, distributed


def across_processes(totals: Sequence[Tensor], least: Sequence[float]) -> list[Tensor]:
    """Averages each total over the processes, in one all-reduce; a single process keeps its totals.

    Data-parallel training averages gradients, and reports average losses, over W processes. To divide a sum over the
    joined batch by T, a total over all processes, each process must therefore divide its own sum by T / W. The average
    then equals that of one process with the joined batch, however unevenly the targets are distributed.

    All processes must call this together, whatever their batches hold. The host does not wait for a GPU.

    Args:
        totals: totals over this process's batch, on one device, with the same shapes and dtypes in all processes.
        least: a lower bound for each total over all processes.

    Returns:
        max(sum over processes, least) / W for each total, in the shape of the total.
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
