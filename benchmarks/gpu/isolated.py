"""Runs benchmarks in one process, and in another one after a crash: ``python -m benchmarks.gpu.isolated``.

A kernel that breaks the CUDA context makes all later operations of its process fail. They run in another process.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from benchmarks.gpu.processes import ROOT, run_limited
from benchmarks.gpu.summary import read_json


def rows_of(results: Path, operation: str) -> list[object]:
    return [row for row in read_json(results).get("rows", []) if row["op"] == operation]


def main() -> int:
    parser = argparse.ArgumentParser(description="Run benchmarks; restart after a crash.")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--budget", required=True, help="seconds per case")
    parser.add_argument("--op", action="append", required=True)
    options, others = parser.parse_known_args()
    deadline = time.monotonic() + options.seconds
    left, failed = list(options.op), False
    while left:
        before = {name: rows_of(options.results, name) for name in left}
        command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), "--output", str(options.results), *others]
        command += ["--seconds", options.budget, *(word for name in left for word in ("--op", name))]
        status = run_limited(command, max(0.0, deadline - time.monotonic()), options.log, cwd=ROOT)
        print(options.log.read_text(errors="replace"), flush=True)
        failed |= status != 0
        untouched = [name for name in left if rows_of(options.results, name) == before[name]]
        if status in (0, None) or not untouched:
            break
        # Operations run in their own order: the one that crashed without a row would crash again.
        if len(untouched) == len(left):
            print(f"FAILED {untouched[0]}: status {status}, and nothing was measured")
            untouched = untouched[1:]
        left = untouched
    else:
        untouched = []
    if status is None:
        print(f"FAILED out of time; not measured: {', '.join(untouched) or 'some cases of the last operation'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
