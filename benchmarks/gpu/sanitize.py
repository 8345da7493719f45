"""Runs compute-sanitizer on every operator: ``python -m benchmarks.gpu.sanitize``.

memcheck finds reads and writes out of bounds, as each tensor has its own allocation; racecheck finds hazards in shared
memory. Both work on machine code, from Triton as well as from nvcc. Triton's kernels are compiled first, in a run
without the checker. Operators without a kernel of fastmask are left out.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.gpu.processes import ROOT, run_limited

TOOLS = ("memcheck", "racecheck")
ERROR_STATUS = 99
# No caching, so that each tensor is a separate allocation with its own bounds.
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"}
OF_TORCH = ("class_loss", "embeddings")


def operators() -> list[str]:
    from benchmarks.gpu.operators import MAKERS

    return [name for name in MAKERS if name not in OF_TORCH]


def command_of(device: str, *names: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu.operators", "--device", device, *names]


def check(tool: str, name: str, folder: Path, deadline: float) -> tuple[bool | None, str]:
    """Whether the tool found nothing (None if it did not finish), and a line about it."""
    log = folder / f"{tool}-{re.sub(r'[^a-z_]+', '-', name)}.log"
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(ERROR_STATUS), *command_of("cuda", name)]
    start = time.monotonic()
    if start > deadline:
        return None, f"{tool} {name}: not started"
    status = run_limited(command, deadline - start, log, cwd=ROOT, environment=ENVIRONMENT)
    took = f"{time.monotonic() - start:.0f} s"
    text = log.read_text(errors="replace")
    found = re.findall(r"(?:ERROR SUMMARY: \d+ error|RACECHECK SUMMARY: \d+ hazard)[^\n]*", text)
    summary = found[-1] if found else "no summary"
    if status is None:
        return None, f"{tool} {name}: not finished, {took}"
    if status == 0 and re.search(r"SUMMARY: 0 ", summary):
        return True, f"ok {tool} {name}: {summary}, {took}"
    details = [line for line in text.splitlines() if "=========" in line and ("Invalid" in line or "Error:" in line)]
    return False, f"FAILED {tool} {name}: status {status}, {summary}; {' | '.join(details[:2])}; see {log.name}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Run every operator once under compute-sanitizer.")
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--seconds", type=float, default=75.0)
    parser.add_argument("--folder", type=Path, required=True, help="for the logs")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    options.folder.mkdir(parents=True, exist_ok=True)
    names = operators()
    log = options.folder / "plain.log"
    status = run_limited(command_of(options.device, *names), options.seconds, log, cwd=ROOT)
    print(log.read_text(errors="replace"), flush=True)
    if status != 0:
        print(f"FAILED operators without a checker: {'not finished' if status is None else f'status {status}'}")
        return 1
    if options.device == "cpu" or shutil.which("compute-sanitizer") is None:
        why = "for GPUs" if options.device == "cpu" else "not on the PATH"
        print(f"compute-sanitizer is {why}: the operators ran without it")
        return 0
    workers = max(1, min(14, (os.cpu_count() or 2) - 2))
    passed = unfinished = 0
    # The hand-written CUDA kernel comes first.
    jobs = sorted(((tool, name) for tool in TOOLS for name in names), key=lambda job: job[1] != "assign")
    with ThreadPoolExecutor(workers) as pool:
        for outcome, line in pool.map(lambda job: check(*job, options.folder, deadline), jobs):
            print(line, flush=True)
            passed += outcome is True
            unfinished += outcome is None
    print(f"{passed} of {len(jobs)} checks found nothing, {unfinished} did not finish")
    if unfinished:
        print(f"FAILED {unfinished} of {len(jobs)} checks did not finish")
    return 0 if passed == len(jobs) else 1


if __name__ == "__main__":
    sys.exit(main())
