"""Timing: providers take turns round by round, so that whatever else the machine does hits them all alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from fastmask.measure import Clock, in_turns

Call = Callable[[], Any]


@dataclass(frozen=True)
class TimeBudget:
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


class Timer:
    """Times calls on a device; on CUDA each by itself, its inputs evicted from the L2 cache before."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        on_gpu = device.type == "cuda"
        self._evict = torch.empty(256 << 20, dtype=torch.uint8, device=device) if on_gpu else None

    def seconds(self, call: Call, repeats: int) -> float:
        """Seconds that one call takes, the mean of ``repeats``."""
        clock = Clock(self._device)
        for i in range(repeats):
            if self._evict is not None:
                self._evict.zero_()
                clock.mark("eviction")
            call()
            if self._evict is not None or i == repeats - 1:
                clock.mark("call")
        return clock.seconds()["call"] / repeats


def warm_up(call: Call, timer: Timer, first_seconds: float, budget: TimeBudget) -> float:
    """Calls until it has run ``budget.warm_up_seconds``; the seconds of its last call.

    ``first_seconds`` is what a call took before. A slow one needs no more warm-up than that.
    """
    latest, spent = first_seconds, 0.0
    while spent < budget.warm_up_seconds and first_seconds < 1:
        latest = timer.seconds(call, 1)
        spent += max(latest, 1e-6)
    return latest


def interleave(
    calls: Mapping[str, Call],
    estimates: Mapping[str, float],
    timer: Timer,
    budget: TimeBudget,
    on_sample: Callable[[str], None] = lambda name: None,
) -> dict[str, list[float]]:
    """Seconds of one call in each round, for each provider: A B C A B C ...; round i of all lies side by side.

    Args:
        calls: by provider.
        estimates: seconds that a call takes, by provider.
        on_sample: told after each turn whose it was.
    """
    repeats = {name: max(1, min(1000, math.ceil(budget.sample_seconds / max(estimates[name], 1e-7)))) for name in calls}
    least = {
        name: budget.least_rounds if budget.least_rounds * estimates[name] <= budget.seconds else 2 for name in calls
    }
    share = budget.seconds / max(1, len(calls))

    def turn(name: str) -> float:
        seconds = timer.seconds(calls[name], repeats[name])
        on_sample(name)
        return seconds

    def next_round(samples: dict[str, list[float]]) -> list[str]:
        number = max(map(len, samples.values()), default=0)
        if number >= budget.rounds:
            return []
        within = {name: number < least[name] or sum(own) * repeats[name] <= share for name, own in samples.items()}
        return [name for name, own in samples.items() if len(own) == number and within[name]]

    return in_turns({name: partial(turn, name) for name in calls}, next_round)


def speedup(samples: Sequence[float], baseline: Sequence[float]) -> dict[str, float | int]:
    """How many times faster than the baseline: the median over the rounds that both were in."""
    ratios = [theirs / ours for ours, theirs in zip(samples, baseline, strict=False)]
    low, median, high = np.percentile(ratios, (20, 50, 80)).tolist()
    return {"speedup": median, "speedup_p20": low, "speedup_p80": high, "speedup_rounds": len(ratios)}
