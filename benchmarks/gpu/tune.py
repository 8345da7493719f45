"""Times a kernel with other tuning: ``python -m benchmarks.gpu.tune mask_cost``.

Each variant of a configuration is checked like a provider of the benchmark, then all are timed in turns. Nothing is
changed in the sources; the winner is for a person to write there, with its number in NOTES.md.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.harness.registry import load_operations
from benchmarks.harness.timing import TimeBudget, Timer, interleave
from fastmask.measure import summary

Variant = Mapping[str, int]


@dataclass(frozen=True)
class Tuning:
    """Where a configuration is, and what to try in its place.

    Args:
        case: of the operation's benchmark.
        configs: the module of ``fastmask.kernels`` and the name of its dict of configurations.
        keys: into nested dicts; one that is missing stands for None, the key of all other devices.
    """

    operation: str
    case: str
    configs: tuple[str, str]
    keys: tuple[int | str | None, ...]
    variants: tuple[Variant, ...]
    dtype: str = "bfloat16"

    @contextmanager
    def using(self, variant: Variant) -> Iterator[None]:
        module, name = self.configs
        found = getattr(importlib.import_module(f"fastmask.kernels.{module}"), name)
        keys = []
        for key in self.keys:
            keys.append(key if key in found else None)
            owner, found = found, found[keys[-1]]
        owner[keys[-1]] = replace(found, **variant)
        try:
            yield
        finally:
            owner[keys[-1]] = found


TRAINING = "B16 L6 M20, segment map"
TUNINGS = {
    "mask_cost": Tuning("mask_cost", TRAINING, ("mask_cost", "CONFIGS"), (None,), (
        {"num_stages": 2}, {"num_stages": 3}, {"num_warps": 8}, {"rows": 128, "num_warps": 8},
        {"rows": 128, "num_warps": 8, "num_stages": 2}, {"rows": 128, "num_warps": 8, "block": 64},
        {"programs": 1024}, {"programs": 4096}, {"least": 512},
    )),
    "mask_loss": Tuning("mask_loss", TRAINING, ("mask_loss", "CONFIGS"), (None,), (
        {"cells_per_warp": 64}, {"cells_per_warp": 128}, {"programs": 4096}, {"programs": 8192}, {"pixels": 512},
        {"pixels": 2048}, {"blocks": 1}, {"blocks": 16},
    )),
    "semantic": Tuning("semantic", "B8 512x512 K150, noise", ("semantic", "CONFIGS"), ("one part, fours", None), (
        {"tile_columns": 16}, {"tile_rows": 8, "tile_columns": 16}, {"tile_columns": 64, "num_warps": 8},
        {"num_warps": 8},
    )),
    "masked_attention": Tuning("masked_attention", "B16 64x64, blobs", ("masked_attention", "FORWARD_CONFIGS"),
        ("half", 9, 32), ({"keys": 64}, {"queries": 128}, {"num_stages": 2}, {"num_stages": 4}, {"warp_queries": 32},
                  {"programs": 528})),
    "masked_attention_backward": Tuning("masked_attention", "B16 64x64, blobs",
        ("masked_attention_backward", "BACKWARD_CONFIGS"), ("half", 9, 32), (
        {"queries": 128, "warp_queries": 16}, {"keys": 32}, {"num_stages": 2}, {"num_stages": 1}, {"programs": 528},
    )),
    "deformable_attention": Tuning("deformable_attention", "B16 levels 64, 32, 16, forward",
        ("deformable_attention", "CONFIGS"), (None,), (
        {"queries": 32}, {"queries": 32, "num_warps": 2}, {"queries": 128}, {"queries": 128, "num_warps": 8},
    )),
    "deformable_attention_backward": Tuning("deformable_attention", "B16 levels 64, 32, 16",
        ("deformable_attention_backward", "CONFIGS"), (None,), ({"chunks": 4}, {"chunks": 16, "chunk": 1024})),
}  # fmt: skip


def run(tuning: Tuning, case: str, device: torch.device, budget: TimeBudget) -> list[tuple[float, str]]:
    """(median milliseconds, variant in words), fastest first; what is wrong or cannot run is printed and left out."""
    operation = load_operations()[tuning.operation]
    sizes = next(c.sizes for c in operation.cases if c.name == case)
    inputs = operation.make_inputs(sizes, getattr(torch, tuning.dtype), device)
    oracle = operation.oracle(inputs)
    kind = "triton" if device.type == "cuda" else "native"
    provider = next(p for p in operation.providers if p.name == f"fastmask {kind}")
    timer, calls, estimates = Timer(device), {}, {}
    for variant in ({}, *tuning.variants):
        name = ", ".join(f"{key}={value}" for key, value in variant.items()) or "as it is"
        call = with_variant(tuning, variant, provider.prepare(inputs))
        reason = attempt(lambda call=call: oracle.disagreement(provider.result(call(), inputs), provider.error_factor))
        if reason is not None:
            print(f"left out: {name}: {reason}", flush=True)
            continue
        calls[name], estimates[name] = call, timer.seconds(call, 1)
    samples = interleave(calls, estimates, timer, budget)
    return sorted((summary(values)["median_ms"], name) for name, values in samples.items())


def with_variant(tuning: Tuning, variant: Variant, call: Callable[[], Any]) -> Callable[[], Any]:
    def run_with_variant() -> Any:
        with tuning.using(variant):
            return call()

    return run_with_variant


def attempt(judge: Callable[[], str | None]) -> str | None:
    """What is wrong with a result, or why there is none: too many registers, too much shared memory."""
    try:
        return judge()
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).splitlines()[:1])}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Time kernels with other tuning.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(TUNINGS)}; all by default")
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--seconds", type=float, default=10.0, help="for the times of each kernel")
    parser.add_argument("--quick", action="store_true", help="the small case")
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in TUNINGS]:
        parser.error(f"no tuning {', '.join(unknown)}; there are {', '.join(TUNINGS)}")
    for name in options.names or TUNINGS:
        tuning = TUNINGS[name]
        case = "quick" if options.quick else tuning.case
        budget = TimeBudget(rounds=2 if options.quick else 20, seconds=options.seconds)
        print(f"{name}: {case}, {tuning.dtype}", flush=True)
        for milliseconds, variant in run(tuning, case, torch.device(options.device), budget):
            print(f"  {1e3 * milliseconds:9.1f} us  {variant}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
