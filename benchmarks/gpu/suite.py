"""Runs the GPU tests in several processes: ``python -m benchmarks.gpu.suite``.

A process that crashes, breaks its CUDA context or hangs in a test is restarted after that test. The report groups
tests by test function, which names the operator; it is printed when the time is up, whatever has run by then.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.processes import ROOT, stop
from benchmarks.gpu.shard import read_log

OUTCOMES = ("passed", "failed", "skipped", "not run")
HUNG_SECONDS = 120.0  # without a line in the log
# One core per process; no plugins, which the tests do not need and which may be missing.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


@dataclass
class Process:
    """One shard: its log, its current process, and how often a process was started."""

    log: Path
    command: list[str]
    running: subprocess.Popen[bytes] | None = None
    started: int = 0
    lines: list[dict[str, Any]] = field(default_factory=list)

    def start(self) -> None:
        output = self.log.with_suffix(".out").open("ab")
        environment = os.environ | ENVIRONMENT
        self.running = subprocess.Popen(
            self.command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        output.close()
        self.started += 1

    def read(self) -> None:
        self.lines = read_log(self.log)

    @property
    def outcomes(self) -> dict[str, dict[str, Any]]:
        """The outcome by test; a test that fails twice, in its call and its teardown, counts once."""
        found: dict[str, dict[str, Any]] = {}
        for line in self.lines:
            if "test" in line and found.get(line["test"], {}).get("outcome") != "failed":
                found[line["test"]] = line
        return found

    @property
    def collected(self) -> list[str]:
        return next((line["collected"] for line in self.lines if "collected" in line), [])

    def unfinished(self) -> str | None:
        """The test that had started but not ended when the process ended."""
        started = [line["started"] for line in self.lines if "started" in line]
        return started[-1] if started and started[-1] not in self.outcomes else None

    def note(self, test: str, reason: str) -> None:
        with self.log.open("a") as file:
            file.write(json.dumps({"test": test, "outcome": "failed", "seconds": 0.0, "reason": reason}) + "\n")

    def quiet_seconds(self) -> float:
        return time.time() - (self.log if self.log.exists() else self.log.with_suffix(".out")).stat().st_mtime

    def step(self) -> bool:
        """Checks the process, and restarts it if tests are left; returns whether there is still something to do."""
        status = self.running.poll()
        if status is None:
            if self.quiet_seconds() < HUNG_SECONDS:
                return True
            stop(self.running)
            status = "hung"
        before = len(self.outcomes)
        self.read()
        if (test := self.unfinished()) is not None:
            self.note(test, f"hung for {HUNG_SECONDS:.0f} s" if status == "hung" else f"crashed with status {status}")
            self.read()
        done = self.outcomes
        if len(done) == before or all(test in done for test in self.collected):
            return False
        self.start()
        return True


def test_files(folder: Path) -> list[str]:
    """The files with tests for a GPU, so that a failing import in another file has no effect."""
    return sorted(str(path.relative_to(ROOT)) for path in folder.rglob("test_*.py") if "mark.cuda" in path.read_text())


def report(processes: Sequence[Process]) -> int:
    """Prints a line for each test function and each failure; returns 1 if any test failed or did not run."""
    collected = {test: None for process in processes for test in process.collected}
    outcomes = {test: line for process in processes for test, line in process.outcomes.items()}
    groups: dict[str, Counter[str]] = {}
    for test in collected:
        outcome = outcomes[test]["outcome"] if test in outcomes else "not run"
        groups.setdefault(test.split("[")[0].removeprefix("tests/"), Counter())[outcome] += 1
    width = max(map(len, groups), default=4)
    print(f"{'test':<{width}} " + " ".join(f"{name:>8}" for name in OUTCOMES))
    for name in sorted(groups):
        print(f"{name:<{width}} " + " ".join(f"{groups[name][outcome] or '':>8}" for outcome in OUTCOMES))
    total = sum(groups.values(), Counter())
    slowest = sorted(outcomes.values(), key=lambda line: -line["seconds"])[:5]
    print("slowest: " + "; ".join(f"{line['test'].split('::')[-1]} {line['seconds']:.1f} s" for line in slowest))
    print("total: " + ", ".join(f"{total[outcome]} {outcome}" for outcome in OUTCOMES))
    for test, line in outcomes.items():
        if line["outcome"] == "failed":
            print(f"FAILED {test}: {line['reason']}")
    if total["not run"]:
        print(f"FAILED {total['not run']} tests did not run")
    if not total["passed"]:
        print(f"FAILED none of {len(collected)} tests passed; see the .out files")
    return 1 if total["failed"] or total["not run"] or not total["passed"] else 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the GPU tests, split over processes.")
    parser.add_argument("--shards", type=int, default=max(1, min(14, (os.cpu_count() or 2) - 2)))
    parser.add_argument("--seconds", type=float, default=150.0, help="time limit; remaining tests do not run")
    parser.add_argument("--folder", type=Path, required=True, help="folder for the logs; earlier ones are deleted")
    parser.add_argument("--marker", default="cuda", help="pytest's -m")
    parser.add_argument("files", nargs="*", help="test files; by default all with GPU tests")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    options.folder.mkdir(parents=True, exist_ok=True)
    for old in options.folder.glob("shard-*"):
        old.unlink()
    files = options.files or test_files(ROOT / "tests")
    processes = []
    for i in range(options.shards):
        log = options.folder / f"shard-{i}.jsonl"
        command = [sys.executable, "-m", "pytest", "-p", "benchmarks.gpu.shard", "-m", options.marker, "-q"]
        command += ["--continue-on-collection-errors", "-p", "no:cacheprovider", "-o", "addopts="]
        command += [f"--shard={i}/{options.shards}", f"--shard-log={log}", *files]
        processes.append(Process(log, command))
    try:
        for process in processes:
            process.start()
        busy = processes
        while busy and time.monotonic() < deadline:
            time.sleep(0.2)
            busy = [process for process in busy if process.step()]
    finally:
        for process in processes:
            stop(process.running)
            process.read()
    return report(processes)


if __name__ == "__main__":
    sys.exit(main())
