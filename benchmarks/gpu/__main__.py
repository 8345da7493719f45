"""``python -m benchmarks.gpu``: all stages, one after the other, each in a process of its own with a time limit.

Needs the standard library alone; what a stage lacks, it says. After each stage the summary is written again, so that
nothing is lost when the whole is stopped. Exits with 1 if anything failed, and lists it last.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.gpu.processes import ROOT, run_limited
from benchmarks.gpu.summary import END_TO_END, read_json, write_summary

TOTAL_SECONDS = 530.0
LEAST_SECONDS = 12.0  # a stage that has less is left out
KERNEL_BENCHMARKS = ("mask_cost", "mask_loss", "criterion", "semantic", "masked_attention", "assign", "panoptic",
                     "instance", "point_criterion", "mask_head")  # fmt: skip
# Those with a target against compiled code, which takes a minute to compile.
COMPILED_BENCHMARKS = ("masked_attention", "mask_cost", "mask_loss", "label_maps", "training_step")


@dataclass(frozen=True)
class Run:
    """What the stages share.

    Args:
        device: "cuda" or "cpu".
        quick: small shapes and few tests: tries the script itself.
        folder: for logs and what one stage leaves to the next.
    """

    device: str
    quick: bool
    folder: Path

    @property
    def name(self) -> str:
        """Of the machine, once its stage has run."""
        return read_json(self.folder / "environment.json").get("name", "gpu" if self.device == "cuda" else "cpu")

    @property
    def results(self) -> Path:
        folder = self.folder if self.quick else ROOT / "benchmarks" / "results"
        return folder / f"{self.name}.json"

    @property
    def summary(self) -> Path:
        return self.results.with_name(f"{self.name}-summary.md")


Command = list[str] | str  # or why there is none


@dataclass(frozen=True)
class Stage:
    """A part of the run.

    Args:
        seconds: of the total that are its own; what earlier stages leave over comes on top.
        command: from the run and its seconds to the command, or to the reason why the stage is skipped.
        optional: whether running out of time is no failure.
    """

    name: str
    seconds: float
    command: Callable[[Run, float], Command]
    environment: Callable[[Run], dict[str, str]] = lambda run: {}
    optional: bool = False


def module(name: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", f"benchmarks.gpu.{name}", *map(str, arguments)]


def build(run: Run, seconds: float) -> Command:
    if run.device == "cpu":
        return "the CPU form runs what is built"
    return [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--editable", str(ROOT)]


def architecture(run: Run) -> dict[str, str]:
    """The device's own alone, as each takes nvcc as long again; unset, the extension is built for all."""
    if run.device == "cpu" or "FASTMASK_CUDA_ARCHS" in os.environ or shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    return {"FASTMASK_CUDA_ARCHS": ";".join(sorted({capability.replace(".", "") for capability in answer}))}


def environment(run: Run, seconds: float) -> Command:
    return module("environment", "--device", run.device, "--output", run.folder / "environment.json")


def tests(run: Run, seconds: float) -> Command:
    if find_spec("pytest") is None:
        return "pytest is not installed"
    command = module("suite", "--seconds", seconds - 5, "--folder", run.folder)
    if run.device == "cpu":
        command += ["--marker", "not cuda", "--shards", "1", "tests/test_operators_cuda.py"]
    return command


def sanitizer(run: Run, seconds: float) -> Command:
    return module("sanitize", "--device", run.device, "--seconds", seconds - 5, "--folder", run.folder / "sanitizer")


def benchmarks(run: Run, seconds: float, operations: Sequence[str], *options: str) -> Command:
    if missing := [name for name in ("typer", "tqdm") if find_spec(name) is None]:
        return f"{' and '.join(missing)} not installed"
    log = run.folder / f"measure-{operations[0]}.log"
    command = module("measure", "--device", run.device, "--results", run.results, "--log", log)
    command += ["--seconds", str(seconds - 5), *(word for name in operations for word in ("--op", name)), *options]
    return [*command, "--quick"] if run.quick else command


def kernel_benchmarks(run: Run, seconds: float) -> Command:
    operations = ("assign",) if run.quick else KERNEL_BENCHMARKS
    return benchmarks(run, seconds, operations, "--budget", "0.1" if run.quick else "1.5", "--no-compiled")


def end_to_end(run: Run, seconds: float) -> Command:
    return benchmarks(run, seconds, END_TO_END, "--budget", "0.1" if run.quick else "6", "--no-compiled")


def compiled(run: Run, seconds: float) -> Command:
    return "takes minutes" if run.quick else benchmarks(run, seconds, COMPILED_BENCHMARKS, "--budget", "4")


def counters(run: Run, seconds: float) -> Command:
    return module("profile", "--device", run.device, "--seconds", seconds - 5, "--folder", run.folder)


def plots(run: Run, seconds: float) -> Command:
    return module("plots", run.results)


STAGES = (
    Stage("build", 60, build, architecture),
    Stage("environment", 20, environment),
    Stage("tests", 170, tests),
    Stage("sanitizer", 60, sanitizer),
    Stage("benchmarks", 90, kernel_benchmarks),
    Stage("end to end", 60, end_to_end),
    Stage("counters", 40, counters, optional=True),
    Stage("plots", 15, plots),
    Stage("compiled", 15, compiled, optional=True),
)


def run_stage(stage: Stage, run: Run, seconds: float) -> dict[str, Any]:
    """ "name", "outcome", "seconds", "failures" and "note" of a stage, after it ran; its output is in a log."""
    start = time.monotonic()
    result: dict[str, Any] = {"name": stage.name, "outcome": "skipped", "failures": [], "note": ""}
    log = run.folder / f"{stage.name.replace(' ', '-')}.log"
    command = stage.command(run, seconds)
    if seconds < LEAST_SECONDS:
        result |= {"outcome": "not run", "note": "no time was left"}
        if not stage.optional:
            result["failures"] = ["no time was left"]
    elif isinstance(command, str):
        result["note"] = command
    else:
        status = run_limited(command, seconds, log, cwd=ROOT, environment=stage.environment(run))
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        result["failures"] = [line.removeprefix("FAILED ") for line in lines if line.startswith("FAILED ")]
        result["note"] = lines[-1][:200] if lines else ""
        result["outcome"] = "ok" if status == 0 else "failed"
        if status is None:
            result["outcome"] = "out of time"
            if not stage.optional:
                result["failures"].append(f"out of time after {seconds:.0f} s")
        elif status != 0 and not result["failures"]:
            result["failures"] = [f"status {status}: {result['note']}"]
    result["seconds"] = time.monotonic() - start
    return result


def main() -> int:
    names = [stage.name for stage in STAGES]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="small shapes and few tests: tries the script")
    parser.add_argument("--stage", action="append", choices=names, default=[], help="repeatable; all by default")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="for everything")
    parser.add_argument("--folder", type=Path, help="for logs; out/gpu by default")
    options = parser.parse_args()
    folder = options.folder or ROOT / "out" / ("gpu-quick" if options.quick else "gpu")
    run = Run(options.device, options.quick, folder.resolve())
    run.folder.mkdir(parents=True, exist_ok=True)
    chosen = [stage for stage in STAGES if not options.stage or stage.name in options.stage]
    deadline = time.monotonic() + options.seconds
    # A stage's own time is its share of the total; what it leaves, later ones may take.
    scale = options.seconds / sum(stage.seconds for stage in chosen)
    # What an earlier run left in the folder stands where its stage is not run again.
    results: list[dict[str, Any]] = []
    if options.stage:
        earlier = read_json(run.folder / "stages.json").get("stages", [])
        results = [stage for stage in earlier if stage["name"] not in options.stage]
    else:
        for name in ("environment.json", "kernels.json"):
            (run.folder / name).unlink(missing_ok=True)
    failures: list[str] = []
    for i, stage in enumerate(chosen):
        later = sum(other.seconds * scale for other in chosen[i + 1 :])
        seconds = max(0.0, deadline - time.monotonic() - later)
        print(f"--- {stage.name} (at most {seconds:.0f} s)", flush=True)
        result = run_stage(stage, run, seconds)
        results.append(result)
        (run.folder / "stages.json").write_text(json.dumps({"stages": results}, indent=1) + "\n")
        if stage.name != "build":  # the next one says what the machine, and so the page, is called
            failures = write_summary(run.summary, run.folder, run.results, results)
        print(f"    {result['outcome']}, {result['seconds']:.0f} s; {result['note']}", flush=True)
    print(f"summary: {run.summary}\nlogs: {run.folder}")
    for line in failures:
        print(f"FAILED {line}")
    print(f"{len(failures)} failures" if failures else "nothing failed")
    return 1 if failures else 0


if __name__ == "__main__":
    # An end from outside stops the stage and still writes what there is.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
