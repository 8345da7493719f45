"""Peak extra memory of one call, its results included."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler writes a line at each start and stop

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def peak_memory(call: Callable[[], Any], device: torch.device) -> tuple[Any, dict[str, int | None]]:
    """Runs the call; what it returned, and the largest memory it held beyond what was there before.

    Returns:
        (result, bytes): on CUDA {"allocator"}. On the CPU "allocator" is what PyTorch's allocator handed out, which
        does not see scratch of C++ code, and "resident" the growth of the process's resident memory, which does,
        but is coarse (pages that the process kept from earlier count as free); None where the system does not tell.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize()
        return result, {"allocator": torch.cuda.max_memory_allocated(device) - before, "resident": None}
    _return_free_pages()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        before = _restart_resident_peak()
        result = call()
        resident = None if before is None else max(0, _status_bytes("VmHWM") - before)
    return result, {"allocator": _allocation_peak(recorded), "resident": resident}


def _allocation_peak(recorded: profile) -> int:
    changes = [
        (event.start_ns(), event.nbytes())
        for event in recorded.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    held = peak = 0
    for _, change in sorted(changes, key=lambda at: at[0]):
        held += change
        peak = max(peak, held)
    return peak


def _return_free_pages() -> None:
    """Gives pages that malloc keeps back to the system, so that their reuse shows as growth."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):  # not glibc
        return


def _restart_resident_peak() -> int | None:
    """Sets the peak of resident memory to the present value; that value, or None where the system cannot."""
    try:
        _CLEAR_REFS.write_text("5")
        return _status_bytes("VmRSS")
    except OSError:
        return None


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no {field}")
