"""Timing: providers take turns round by round, so that whatever else the machine does hits them all alike."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol

import torch

Call = Callable[[], Any]


@dataclass(frozen=True)
class Plan:
    """How long to measure.

    Args:
        rounds: how often each provider has its turn,
        seconds: unless the providers together have had this long: each has an equal share, and drops out once it is
            used up,
        least_rounds: but not before this many rounds, or two if those alone would take all of ``seconds``.
        sample_seconds: a turn repeats the call until it takes about this long.
        warm_up_seconds: of calls before the first round.
    """

    rounds: int = 20
    seconds: float = 20.0
    least_rounds: int = 3
    sample_seconds: float = 0.02
    warm_up_seconds: float = 0.2


class Timer(Protocol):
    def seconds(self, call: Call, repeats: int) -> float:
        """Seconds that one call takes, the mean of ``repeats``."""


class CpuTimer:
    def seconds(self, call: Call, repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats


class CudaTimer:
    """Times each call between two events, its inputs evicted from the L2 cache before."""

    def __init__(self, device: torch.device) -> None:
        self._evict = torch.empty(256 << 20, dtype=torch.uint8, device=device)

    def seconds(self, call: Call, repeats: int) -> float:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        torch.cuda.synchronize()
        for start, end in events:
            self._evict.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in events) / (1000 * repeats)


def make_timer(device: torch.device) -> Timer:
    return CudaTimer(device) if device.type == "cuda" else CpuTimer()


def warm_up(call: Call, timer: Timer, first_seconds: float, plan: Plan) -> float:
    """Calls until it has run ``plan.warm_up_seconds``; the seconds of its last call.

    ``first_seconds`` is what a call took before. A slow one needs no more warm-up than that.
    """
    latest, spent = first_seconds, 0.0
    while spent < plan.warm_up_seconds and first_seconds < 1:
        latest = timer.seconds(call, 1)
        spent += max(latest, 1e-6)
    return latest


def interleave(
    calls: Mapping[str, Call],
    estimates: Mapping[str, float],
    timer: Timer,
    plan: Plan,
    on_sample: Callable[[str], None] = lambda name: None,
) -> dict[str, list[float]]:
    """Seconds of one call in each round, for each provider: A B C A B C ...; round i of all lies side by side.

    Args:
        calls: by provider.
        estimates: seconds that a call takes, by provider.
        on_sample: told after each turn whose it was.
    """
    repeats = {name: max(1, min(1000, math.ceil(plan.sample_seconds / max(estimates[name], 1e-7)))) for name in calls}
    least = {name: plan.least_rounds if plan.least_rounds * estimates[name] <= plan.seconds else 2 for name in calls}
    share = plan.seconds / max(1, len(calls))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    spent = dict.fromkeys(calls, 0.0)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for number in range(plan.rounds):
            for name, call in calls.items():
                dropped_out = len(samples[name]) < number
                if dropped_out or (number >= least[name] and spent[name] > share):
                    continue
                samples[name].append(timer.seconds(call, repeats[name]))
                spent[name] += samples[name][-1] * repeats[name]
                on_sample(name)
    finally:
        if collecting:
            gc.enable()
    return samples


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which ``percent`` percent lie, linear between neighbors."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def summary(samples: Sequence[float]) -> dict[str, float | int]:
    """Median, 20th and 80th percentile in milliseconds, and how many rounds there were."""
    return {
        "median_ms": median(samples) * 1e3,
        "p20_ms": percentile(samples, 20) * 1e3,
        "p80_ms": percentile(samples, 80) * 1e3,
        "rounds": len(samples),
    }


def speedup(samples: Sequence[float], baseline: Sequence[float]) -> dict[str, float | int]:
    """How many times faster than the baseline: the median over the rounds that both were in."""
    ratios = [theirs / ours for ours, theirs in zip(samples, baseline, strict=False)]
    return {
        "speedup": median(ratios),
        "speedup_p20": percentile(ratios, 20),
        "speedup_p80": percentile(ratios, 80),
        "speedup_rounds": len(ratios),
    }
