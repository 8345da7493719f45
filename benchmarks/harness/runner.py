"""Measures the providers of one operation on one case: agreement first, then memory, then time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.harness.allocator import RETAINING, current_allocator
from benchmarks.harness.machine import Rates
from benchmarks.harness.registry import Case, Operation, Provider, Unavailable
from benchmarks.harness.timing import TimeBudget, Timer, interleave, speedup, warm_up
from fastmask.measure import peak_memory, summary

SLOW_SECONDS = 3.0
Row = dict[str, Any]


def measure_case(
    operation: Operation,
    case: Case,
    dtype: str,
    device: torch.device,
    rates: Rates,
    budget: TimeBudget,
    *,
    providers: Sequence[Provider] | None = None,
    timer: Timer | None = None,
    progress: Callable[[str], None] = lambda doing: None,
) -> list[Row]:
    """One row for each provider, whether it ran ("ok"), disagreed or broke ("failed"), or cannot run ("missing").

    Args:
        dtype: name of the logits' dtype, one of the case's.
        providers: those to measure; all by default.
        progress: told what happens now, in a few words.

    Returns:
        Rows with "op", "case", "dtype", "device", "allocator", "provider", "status", and "partial" if it is so;
        "reason" unless ok; else median_ms, p20_ms, p80_ms, rounds; memory_bytes by kind; floor_ms, floor_of, floors_ms
        by resource and times_floor; and, where the baseline ran, baseline, speedup, speedup_p20, speedup_p80 and
        speedup_rounds. A provider that is not "ok" was never timed.
    """
    timer = timer or Timer(device)
    progress("inputs")
    inputs = operation.make_inputs(case.sizes, getattr(torch, dtype), device)
    progress("oracle")
    oracle = operation.oracle(inputs)
    least = operation.work(inputs)
    floor_seconds, floor_of = rates.floor(least)
    floors = {name: seconds * 1e3 for name, seconds in rates.floors(least).items()}

    about = {"op": operation.name, "case": case.name, "dtype": dtype, "device": device.type}
    about["allocator"] = current_allocator()
    rows: dict[str, Row] = {}
    calls, estimates = {}, {}
    for provider in operation.providers if providers is None else providers:
        progress(f"checks {provider.name}")
        rows[provider.name] = about | {"provider": provider.name} | ({"partial": True} if provider.partial else {})
        try:
            call = provider.prepare(inputs)
            seconds, memory, reason = _first_calls(call, provider, inputs, oracle, device)
            if reason is None:
                estimates[provider.name] = warm_up(call, timer, seconds, budget)
        except (Unavailable, ImportError) as error:
            rows[provider.name] |= {"status": "missing", "reason": str(error)}
            continue
        except Exception as error:  # whatever a provider raises, the others still have their turn
            reason = ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
        if reason is not None:
            rows[provider.name] |= {"status": "failed", "reason": reason}
            continue
        calls[provider.name] = call
        rows[provider.name] |= {"status": "ok", "memory_bytes": memory}

    if about["allocator"] == RETAINING:
        for name, call in calls.items():  # as measuring memory has returned free pages to the system
            progress(f"warms up {name}")
            call()
    samples = interleave(calls, estimates, timer, budget, on_sample=lambda name: progress(f"times {name}"))
    for name, values in samples.items():
        rows[name] |= summary(values)
        rows[name] |= {"floor_ms": floor_seconds * 1e3, "floor_of": floor_of, "floors_ms": floors}
        rows[name]["times_floor"] = rows[name]["median_ms"] / rows[name]["floor_ms"]
        if operation.baseline in samples:
            rows[name] |= {"baseline": operation.baseline, **speedup(values, samples[operation.baseline])}
    return list(rows.values())


def _first_calls(
    call: Callable[[], Any], provider: Provider, inputs: Any, oracle: Any, device: torch.device
) -> tuple[float, dict[str, int | None], str | None]:
    """(seconds of a call, its peak memory by kind, what is wrong with its result or None).

    A first call compiles and fills caches, so memory is measured on a second one, unless the first was slow.
    """
    start = time.perf_counter()
    raw, memory = peak_memory(call, device)
    seconds = time.perf_counter() - start
    reason = oracle.disagreement(provider.result(raw, inputs), provider.error_factor)
    del raw
    if reason is None:
        start = time.perf_counter()
        if seconds < SLOW_SECONDS or provider.compiles:
            _, again = peak_memory(call, device)
            memory = memory if provider.keeps_memory else again
            seconds = time.perf_counter() - start
    return seconds, memory, reason
