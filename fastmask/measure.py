"""Time and peak extra memory of calls, their results included; for benchmarks and demonstrations."""

from __future__ import annotations

import ctypes
import gc
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

# Kineto, beneath the profiler, reports each of its starts and stops on stderr unless it is told not to.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")

LEAST_ROUNDS = 3


class Clock:
    """Splits the time of a call into parts. On CUDA it waits for the device when the seconds are read, not before."""

    def __init__(self, device: torch.device):
        self._device = device
        self._on_gpu = device.type == "cuda"
        if self._on_gpu:
            torch.cuda.synchronize(device)
        self._parts: list[str] = []
        self._marks = [self._now()]

    def mark(self, part: str) -> None:
        """What ran since the last mark, or since the beginning, belongs to the part."""
        self._parts.append(part)
        self._marks.append(self._now())

    def seconds(self) -> dict[str, float]:
        """By part; those that have one name are added up."""
        if self._on_gpu:
            self._marks[-1].synchronize()
        total: dict[str, float] = {}
        for part, start, end in zip(self._parts, self._marks[:-1], self._marks[1:], strict=True):
            elapsed = start.elapsed_time(end) / 1000 if self._on_gpu else end - start
            total[part] = total.get(part, 0.0) + elapsed
        return total

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


@dataclass(frozen=True)
class Measurement:
    """What :func:`take_turns` found out about a call.

    Attributes:
        rounds: the seconds of each part, for each round.
        memory: as :func:`peak_memory` gives it.
        result: what the call returned.
        failure: why it could not run, and then there is nothing else; or None.
    """

    rounds: list[dict[str, float]] = field(default_factory=list)
    memory: dict[str, int | None] = field(default_factory=dict)
    result: Any = None
    failure: str | None = None

    @property
    def seconds(self) -> list[float]:
        """Of each round, all parts together."""
        return [sum(parts.values()) for parts in self.rounds]

    def percentiles(self, *percents: float) -> list[float]:
        """Seconds of a round."""
        return np.percentile(self.seconds, percents).tolist()

    def parts(self) -> dict[str, float]:
        """The median seconds of each part."""
        return {part: float(np.median([parts[part] for parts in self.rounds])) for part in self.rounds[0]}

    def ratio(self, other: Measurement) -> float:
        """How many times as long the other call took: the median over the rounds."""
        return float(np.median([theirs / own for own, theirs in zip(self.seconds, other.seconds, strict=True)]))


def take_turns(
    calls: Mapping[str, Callable[[Clock], Any]], device: torch.device, seconds: float
) -> dict[str, Measurement]:
    """Times several calls round by round, A B C A B C ..., so that whatever else the machine does hits all alike.

    A call before that measures its memory and warms up. Then there are at least three rounds, and more until
    ``seconds`` are used up; but one only, if that takes more than half of them. All calls have the same rounds: a quick
    call that ran on alone would find its caches warm, and look quicker than beside the other.

    Args:
        calls: by name; each is given a clock on which it marks its parts, the last one at its end.
        device: that they run on.
        seconds: for the rounds of all of them together.
    """
    share = seconds / max(1, len(calls))
    result: dict[str, Measurement] = {}
    for name, call in calls.items():
        start = time.perf_counter()
        try:
            value, memory = peak_memory(lambda call=call: call(Clock(device)), device)
            if time.perf_counter() - start < share:  # the first call may have compiled, and filled caches
                value, memory = peak_memory(lambda call=call: call(Clock(device)), device)
            result[name] = Measurement(memory=memory, result=value)
        except torch.OutOfMemoryError:
            result[name] = Measurement(failure="out of memory")
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        running = {name: call for name, call in calls.items() if result[name].failure is None}
        rounds: list[float] = []
        while running and _needs_more(rounds, seconds):
            for name, call in running.items():
                clock = Clock(device)
                call(clock)
                result[name].rounds.append(clock.seconds())
            rounds.append(sum(result[name].seconds[-1] for name in running))
    finally:
        if collecting:
            gc.enable()
    return result


def _needs_more(rounds: list[float], seconds: float) -> bool:
    if not rounds:
        return True
    return rounds[0] <= seconds / 2 and (len(rounds) < LEAST_ROUNDS or sum(rounds) < seconds)


def peak_memory(call: Callable[[], Any], device: torch.device) -> tuple[Any, dict[str, int | None]]:
    """Runs the call; what it returned, and the largest memory it held beyond what was there before.

    Returns:
        (result, bytes): on CUDA {"allocator"}. On the CPU "allocator" is what PyTorch's allocator handed out, which
        does not see scratch of C++ code, and "resident" the growth of the process's resident memory, which does,
        but is coarse (pages that the process kept from earlier count as free); None where the system does not tell.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
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
