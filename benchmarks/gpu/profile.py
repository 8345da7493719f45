"""Finds the bottleneck of each kernel by Nsight Compute's counters: ``python -m benchmarks.gpu.profile``.

Each case comes from the benchmark suite. ncu runs this module again with ``--once``, which calls fastmask's provider
twice, so that Triton compiles before the launches that count; the last launch of each kernel is reported.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import shutil
import sys
import time
from pathlib import Path

from benchmarks.gpu.processes import ROOT, run_limited

# (operation, case, dtype); cases with a target in the summary come first.
CASES = (
    ("mask_cost", "B16 L6 M20, segment map", "bfloat16"),
    ("mask_loss", "B16 L6 M20, segment map", "bfloat16"),
    ("semantic", "B8 512x512 K150, noise", "bfloat16"),
    ("masked_attention", "B16 64x64, blobs", "bfloat16"),
    ("deformable_attention", "B16 levels 64, 32, 16", "bfloat16"),
    ("assign", "early, 96 of 300x100", "float32"),
    ("panoptic", "B8 800x1216, 30 of 100 kept", "bfloat16"),
    ("instance", "B8 800x1216, masks", "bfloat16"),
)
KERNELS = r"regex:^_.*_kernel$|assign"
SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "SchedulerStats", "Occupancy",
            "WarpStateStats", "InstructionStats", "LaunchStats")  # fmt: skip
# By the end of ncu's name: across versions, the ends of metric names are the same, their beginnings are not.
METRICS = {
    "time_us": r"gpu__time_duration\.sum$",
    "dram_percent": r"dram__throughput\.avg\.pct_of_peak_sustained_elapsed$",
    "dram_bytes": r"dram__bytes\.sum$|dram__bytes_read\.sum$",
    "compute_percent": r"sm__throughput\.avg\.pct_of_peak_sustained_elapsed$",
    "issue_percent": r"sm(sp)?__(issue_active|inst_issued)\.avg\.pct_of_peak_sustained_active$|issue_slot_utilization",
    "xu_percent": r"sm__inst_executed_pipe_xu\.avg\.pct_of_peak_sustained_active$",
    "fma_percent": r"sm__inst_executed_pipe_fma\w*\.avg\.pct_of_peak_sustained_active$",
    "tensor_percent": r"sm__(inst_executed_pipe_tensor|pipe_tensor)\w*\.avg\.pct_of_peak_sustained_active$",
    "instructions": r"smsp?__inst_executed\.sum$",
    "registers": r"launch__registers_per_thread$",
    "warps_percent": r"sm__warps_active\.avg\.pct_of_peak_sustained_active$",
}
UNITS = {"ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0, "ms": 1e3, "msecond": 1e3, "s": 1e6, "second": 1e6,
         "byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}  # fmt: skip


def run_once(operation: str, case: str, dtype: str, device: str) -> None:
    """Runs a case for ncu."""
    import torch

    from benchmarks.harness.registry import load_operations

    benchmark = load_operations()[operation]
    sizes = next(c.sizes for c in benchmark.cases if c.name == case)
    inputs = benchmark.make_inputs(sizes, getattr(torch, dtype), torch.device(device))
    kind = "native" if operation == "assign" or device == "cpu" else "triton"
    names = [p.name for p in benchmark.providers if p.name.startswith("fastmask") and kind in p.name]
    call = next(p for p in benchmark.providers if p.name == names[0]).prepare(inputs)
    for _ in range(2):
        call()
    if device == "cuda":
        torch.cuda.synchronize()


def parse(text: str) -> dict[str, dict[str, float]]:
    """The last launch of each kernel from ncu's raw page: a line of names, one of units, then one for each launch."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    if len(lines) < 3:
        return {}
    names, units, *launches = csv.reader(lines)
    kernels: dict[str, dict[str, float]] = {}
    for launch in launches:
        values = dict(zip(names, launch, strict=False))
        found = {}
        for short, pattern in METRICS.items():
            name = next((name for name in names if re.search(pattern, name)), None)
            value = values.get(name or "", "").replace(",", "")
            if re.fullmatch(r"-?\d+(\.\d+)?([eE][-+]?\d+)?", value):
                found[short] = float(value) * UNITS.get(units[names.index(name)], 1.0)
        kernels[values.get("Kernel Name", "?")] = found
    return kernels


def main() -> int:
    parser = argparse.ArgumentParser(description="Read the hardware counters of the main kernels.")
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--seconds", type=float, default=45.0)
    parser.add_argument("--folder", type=Path, help="folder for the logs and kernels.json")
    parser.add_argument("--once", nargs=3, metavar=("OPERATION", "CASE", "DTYPE"))
    parser.add_argument("--only", action="append", default=[], help="operation; repeatable")
    options = parser.parse_args()
    if options.once:
        run_once(*options.once, options.device)
        return 0
    if options.device == "cpu" or shutil.which("ncu") is None:
        print(f"no counters: ncu is {'for GPUs' if options.device == 'cpu' else 'not on the PATH'}")
        return 0
    deadline = time.monotonic() + options.seconds
    options.folder.mkdir(parents=True, exist_ok=True)
    counters: dict[str, dict[str, dict[str, float]]] = {}
    for operation, case, dtype in CASES:
        if (options.only and operation not in options.only) or time.monotonic() > deadline:
            continue
        log = options.folder / f"ncu-{operation}.csv"
        command = ["ncu", "--clock-control", "none", "--csv", "--page", "raw", "--kernel-name", KERNELS]
        command += [word for section in SECTIONS for word in ("--section", section)]
        command += [sys.executable, "-m", "benchmarks.gpu.profile", "--once", operation, case, dtype]
        status = run_limited(command, deadline - time.monotonic(), log, cwd=ROOT)
        kernels = parse(log.read_text(errors="replace"))
        if not kernels:
            outcome = "not finished" if status is None else f"status {status}"
            print(f"{operation}: no counters, {outcome}; see {log.name}", flush=True)
            continue
        counters[f"{operation}: {case}, {dtype}"] = kernels
        (options.folder / "kernels.json").write_text(json.dumps(counters, indent=1) + "\n")
        for name, values in kernels.items():
            print(f"{operation} {name}: " + ", ".join(f"{k} {v:.4g}" for k, v in values.items()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
