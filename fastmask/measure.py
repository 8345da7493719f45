"""Measures the time and the peak extra memory of calls, including their results, for benchmarks."""

from __future__ import annotations

import ctypes
import gc
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

# Otherwise Kineto, the profiler's backend, reports each start and stop on stderr.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")

MIN_ROUNDS = 3

Sample = TypeVar("Sample")


def in_turns(
    turns: Mapping[str, Callable[[], Sample]], next_round: Callable[[dict[str, list[Sample]]], Iterable[str]]
) -> dict[str, list[Sample]]:
    """Takes samples round by round, A B C A B C ..., so that other load on the machine affects all alike. Garbage
    collection is off during the rounds.

    Args:
        turns: maps each name to a function that takes one sample.
        next_round: gets all samples so far, and returns the names to sample in the next round; no names end the rounds.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in turns}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        while names := list(next_round(samples)):
            for name in names:
                samples[name].append(turns[name]())
    finally:
        if collecting:
            gc.enable()
    return samples


def summary(seconds: Sequence[float]) -> dict[str, float | int]:
    """The median, 20th and 80th percentile in milliseconds, and the number of rounds."""
    low, median, high = (1e3 * np.percentile(seconds, (20, 50, 80))).tolist()
    return {"median_ms": median, "p20_ms": low, "p80_ms": high, "rounds": len(seconds)}


class Clock:
    """Splits the time of a call into parts. On CUDA, only :meth:`seconds` waits for the device."""

    def __init__(self, device: torch.device):
        self._device = device
        self._on_gpu = device.type == "cuda"
        if self._on_gpu:
            torch.cuda.synchronize(device)
        self._parts: list[str] = []
        self._marks = [self._now()]

    def mark(self, part: str) -> None:
        """Adds the time since the previous mark, or since the start, to a part."""
        self._parts.append(part)
        self._marks.append(self._now())

    def seconds(self) -> dict[str, float]:
        """The seconds of each part, summed over its marks."""
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
    """The result of :func:`take_turns` for one call.

    Attributes:
        rounds: for each round, the seconds of each part.
        memory: bytes, as :func:`peak_memory` returns them.
        result: the result of the call.
        failure: why the call could not run (the other attributes are then empty), or None.
    """

    rounds: list[dict[str, float]] = field(default_factory=list)
    memory: dict[str, int | None] = field(default_factory=dict)
    result: Any = None
    failure: str | None = None

    @property
    def seconds(self) -> list[float]:
        """The seconds of each round, all parts together."""
        return [sum(parts.values()) for parts in self.rounds]

    def parts(self) -> dict[str, float]:
        """The median seconds of each part."""
        return {part: float(np.median([parts[part] for parts in self.rounds])) for part in self.rounds[0]}

    def ratio(self, other: Measurement) -> float:
        """The time of the other call divided by the time of this one: the median over rounds."""
        return float(np.median([theirs / ours for ours, theirs in zip(self.seconds, other.seconds, strict=True)]))


def take_turns(
    calls: Mapping[str, Callable[[Clock], Any]], device: torch.device, seconds: float
) -> dict[str, Measurement]:
    """Times several calls :func:`in_turns`.

    First, each call runs once or twice to measure its memory and to warm up. At least three rounds follow, and more
    until ``seconds`` are used up; but only one if it takes more than half of ``seconds``. All calls run in all rounds:
    a quick call that continued alone would find its caches warm.

    Args:
        calls: maps each name to a call, which gets a clock to mark the end of each of its parts.
        device: the device that the calls run on.
        seconds: the time for all rounds together.
    """
    share = seconds / max(1, len(calls))
    first: dict[str, Measurement] = {}
    for name, call in calls.items():
        start = time.perf_counter()
        try:
            value, memory = peak_memory(partial(_run, call, device), device)
            if time.perf_counter() - start < share:  # the first call may have compiled code and filled caches
                value, memory = peak_memory(partial(_run, call, device), device)
            first[name] = Measurement(memory=memory, result=value)
        except torch.OutOfMemoryError:
            first[name] = Measurement(failure="out of memory")
    turns = {name: partial(_seconds, call, device) for name, call in calls.items() if first[name].failure is None}
    totals: list[float] = []  # of each round

    def next_round(samples: dict[str, list[dict[str, float]]]) -> Iterable[str]:
        if any(samples.values()):
            totals.append(sum(sum(rounds[-1].values()) for rounds in samples.values()))
        return samples if _needs_more(totals, seconds) else ()

    samples = in_turns(turns, next_round)
    return {name: replace(one, rounds=samples.get(name, [])) for name, one in first.items()}


def _run(call: Callable[[Clock], Any], device: torch.device) -> Any:
    return call(Clock(device))


def _seconds(call: Callable[[Clock], Any], device: torch.device) -> dict[str, float]:
    clock = Clock(device)
    call(clock)
    return clock.seconds()


def _needs_more(rounds: list[float], seconds: float) -> bool:
    if not rounds:
        return True
    return rounds[0] <= seconds / 2 and (len(rounds) < MIN_ROUNDS or sum(rounds) < seconds)


def peak_memory(call: Callable[[], Any], device: torch.device) -> tuple[Any, dict[str, int | None]]:
    """Runs a call and measures its peak of extra memory.

    Returns:
        (result of the call, bytes). "allocator" is the memory that PyTorch's allocator handed out. On the CPU it
        excludes scratch memory of C++ code; "resident", the growth of the process's resident memory, includes it but is
        coarse (pages that the process already held count as free). "resident" is None on CUDA, and where the system
        does not report it.
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
        start = _restart_resident_peak()
        result = call()
        resident = None if start is None else max(0, _status_bytes("VmHWM") - start)
    return result, {"allocator": _allocation_peak(recorded), "resident": resident}


def _allocation_peak(recorded: profile) -> int:
    found: Any = recorded.profiler  # None before it has run
    events = found.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda at: at[0]):
        held += change
        peak = max(peak, held)
    return peak


def _return_free_pages() -> None:
    """Gives free pages that malloc has kept back to the system, so that their reuse shows as growth."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):  # not glibc
        return


def _restart_resident_peak() -> int | None:
    """Resets the peak of resident memory to the current value and returns it; None if the system cannot."""
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
