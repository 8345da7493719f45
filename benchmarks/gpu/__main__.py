"""``python -m benchmarks.gpu`` runs all stages in order, each in a separate process with a time limit.

Needs only the standard library; a stage reports what it lacks. After each stage the summary is written again, so that
nothing is lost if the run is stopped. Lists failures at the end, and exits with 1 if there are any.
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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.gpu.processes import ROOT, run_limited
from benchmarks.gpu.summary import NETWORKS, TRAINING, read_json, write_summary

TOTAL_SECONDS = 530.0
MIN_SECONDS = 12.0  # a stage with less time is skipped
# The cases of each measuring stage, by operation, in order of importance.
MATCHER = {"assign": ("early, 96 of 300x100", "random, 96 of 300x100", "early, 96 of 100x(5..40)",
                      "random, 96 of 100x(5..40)")}  # fmt: skip
MASK_OPERATORS = {"mask_cost": (TRAINING,), "mask_loss": (TRAINING,)}
KERNELS = {"criterion": (TRAINING,), "semantic": ("B8 512x512 K150, noise",),
           "masked_attention": ("B16 64x64, blobs", "B16 32x32, blobs", "B16 16x16, blobs")}  # fmt: skip
PATCHED = {"hf_training_step": ("MaskFormer Swin-B, B2, 512x512, 6 auxiliary layers",
                                "Mask2Former Swin-B, B2, 512x512")}  # fmt: skip
OWN_NETWORKS = {"training_step": NETWORKS, "label_maps": NETWORKS}


@dataclass(frozen=True)
class Session:
    """The options that all stages share.

    Args:
        device: "cuda" or "cpu".
        quick: use small shapes and few tests, to try the script itself.
        folder: the folder for logs and for files that one stage leaves to the next.
    """

    device: str
    quick: bool
    folder: Path

    @property
    def name(self) -> str:
        """The name of the machine, once the stage that finds it has run."""
        return read_json(self.folder / "environment.json").get("name", "gpu" if self.device == "cuda" else "cpu")

    @property
    def results(self) -> Path:
        folder = self.folder if self.quick else ROOT / "benchmarks" / "results"
        return folder / f"{self.name}.json"

    @property
    def summary(self) -> Path:
        return self.results.with_name(f"{self.name}-summary.md")


Command = list[str] | str  # a command, or the reason why there is none


@dataclass(frozen=True)
class Stage:
    """A part of the session.

    Args:
        seconds: its share of the total time; time that earlier stages left is added.
        command: returns the command for a session and its seconds, or the reason why the stage is skipped.
        optional: whether running out of time does not count as a failure.
        extra: whether it runs only if it is named.
    """

    name: str
    seconds: float
    command: Callable[[Session, float], Command]
    environment: Callable[[Session], dict[str, str]] = lambda session: {}
    optional: bool = False
    extra: bool = False


def module(name: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", f"benchmarks.gpu.{name}", *map(str, arguments)]


def build(session: Session, seconds: float) -> Command:
    if session.device == "cpu":
        return "the CPU form runs what is built"
    return [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--editable", str(ROOT)]


def build_for_this_gpu(session: Session) -> dict[str, str]:
    """Builds only for the device's architecture, as each one takes nvcc the same time again, and CPU kernels of only
    one SIMD level: 135 core-seconds, whereas a build for all machines takes 310."""
    if session.device == "cpu" or "FASTMASK_CUDA_ARCHS" in os.environ or shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    architectures = ";".join(sorted({capability.replace(".", "") for capability in answer}))
    return {"FASTMASK_CUDA_ARCHS": architectures, "FASTMASK_PORTABLE": "1"}


def environment(session: Session, seconds: float) -> Command:
    return module("environment", "--device", session.device, "--output", session.folder / "environment.json")


OPERATORS = "tests/gpu/test_operators_cuda.py"


def suite(session: Session, seconds: float, name: str, *tests: str) -> Command:
    if find_spec("pytest") is None:
        return "pytest is not installed"
    options = () if session.device == "cuda" else ("--marker", "not cuda", "--shards", "1")
    return module("suite", "--seconds", seconds - 5, "--folder", session.folder / name, *options, *tests)


def smoke(session: Session, seconds: float) -> Command:
    """Every operator in every dtype against the reference."""
    return suite(session, seconds, "smoke", f"{OPERATORS}::test_the_values_are_those_of_the_reference")


def battery(session: Session, seconds: float) -> Command:
    """All GPU tests; on a CPU, some tests that earlier stages have not run."""
    on_cpu = f"{OPERATORS}::test_results_are_written_and_the_same_each_time"
    return suite(session, seconds, "battery", *([on_cpu] if session.device == "cpu" else []))


def sanitizer(session: Session, seconds: float) -> Command:
    return module(
        "sanitize", "--device", session.device, "--seconds", seconds - 5, "--folder", session.folder / "sanitizer"
    )


def benchmarks(session: Session, seconds: float, cases: Mapping[str, Sequence[str]], *options: str) -> Command:
    if missing := [name for name in ("typer", "tqdm") if find_spec(name) is None]:
        return f"{' and '.join(missing)} not installed"
    first = next(iter(cases))
    command = module("isolated", "--device", session.device, "--results", session.results, "--seconds", seconds - 5)
    command += ["--allocator", "default", "--log", str(session.folder / f"measure-{first}.log")]
    if session.quick:
        return [*command, "--op", first, "--budget", "0.1", "--no-compiled", "--quick"]
    names = dict.fromkeys(name for group in cases.values() for name in group)
    command += [word for name in cases for word in ("--op", name)]
    return [*command, *options, *(word for name in names for word in ("--case", name))]


def matcher(session: Session, seconds: float) -> Command:
    return benchmarks(session, seconds, MATCHER, "--budget", "2", "--no-compiled")


def mask_operators(session: Session, seconds: float) -> Command:
    """With torch.compile, whose compilation takes most of the time."""
    return benchmarks(session, seconds, MASK_OPERATORS, "--budget", "3", "--dtype", "bfloat16")


def kernels(session: Session, seconds: float) -> Command:
    return benchmarks(session, seconds, KERNELS, "--budget", "3", "--dtype", "bfloat16", "--no-compiled")


def patched(session: Session, seconds: float) -> Command:
    """A training step of transformers' networks, plain and patched."""
    return benchmarks(session, seconds, PATCHED, "--budget", "6", "--no-compiled")


def end_to_end(session: Session, seconds: float) -> Command:
    """Whole networks of fastmask against those of transformers, also compiled; takes minutes."""
    return benchmarks(session, seconds, OWN_NETWORKS, "--budget", "6")


def counters(session: Session, seconds: float) -> Command:
    return module("profile", "--device", session.device, "--seconds", seconds - 5, "--folder", session.folder)


def plots(session: Session, seconds: float) -> Command:
    return module("charts", session.results)


# In order of importance, because the last stages are cut off when the time is up.
STAGES = (
    Stage("build", 40, build, build_for_this_gpu),
    Stage("environment", 20, environment),
    Stage("smoke", 45, smoke),
    Stage("battery", 130, battery),
    Stage("matcher", 30, matcher),
    Stage("mask operators", 75, mask_operators),
    Stage("kernels", 50, kernels),
    Stage("patched networks", 45, patched),
    Stage("sanitizer", 45, sanitizer, optional=True),
    Stage("counters", 40, counters, optional=True),
    Stage("plots", 10, plots),
    Stage("end to end", 120, end_to_end, extra=True),
)


def run_stage(stage: Stage, session: Session, seconds: float) -> dict[str, Any]:
    """ "name", "outcome", "seconds", "failures" and "note" of a stage, after it ran; its output is in a log."""
    start = time.monotonic()
    result: dict[str, Any] = {"name": stage.name, "outcome": "skipped", "failures": [], "note": ""}
    log = session.folder / f"{stage.name.replace(' ', '-')}.log"
    command = stage.command(session, seconds)
    if seconds < MIN_SECONDS:
        result |= {"outcome": "not run", "note": "no time was left"}
        if not stage.optional:
            result["failures"] = ["no time was left"]
    elif isinstance(command, str):
        result["note"] = command
    else:
        status = run_limited(command, seconds, log, cwd=ROOT, environment=stage.environment(session))
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
    parser.add_argument("--quick", action="store_true", help="use small shapes and few tests, to try the script")
    parser.add_argument(
        "--stage", action="append", choices=names, default=[], help="repeatable; by default all stages that fit"
    )
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="for everything")
    parser.add_argument("--folder", type=Path, help="folder for logs; by default out/gpu")
    options = parser.parse_args()
    folder = options.folder or ROOT / "out" / ("gpu-quick" if options.quick else "gpu")
    session = Session(options.device, options.quick, folder.resolve())
    session.folder.mkdir(parents=True, exist_ok=True)
    chosen = [stage for stage in STAGES if (stage.name in options.stage if options.stage else not stage.extra)]
    deadline = time.monotonic() + options.seconds
    # A stage's time is its share of the total; later stages may use what it leaves.
    scale = options.seconds / sum(stage.seconds for stage in chosen)
    # Results of an earlier run in the folder are kept for stages that are not run again.
    results: list[dict[str, Any]] = []
    if options.stage:
        earlier = read_json(session.folder / "stages.json").get("stages", [])
        results = [stage for stage in earlier if stage["name"] not in options.stage]
    else:
        for name in ("environment.json", "kernels.json"):
            (session.folder / name).unlink(missing_ok=True)
    failures: list[str] = []
    for i, stage in enumerate(chosen):
        later = sum(other.seconds * scale for other in chosen[i + 1 :])
        seconds = max(0.0, deadline - time.monotonic() - later)
        print(f"--- {stage.name} (at most {seconds:.0f} s)", flush=True)
        result = run_stage(stage, session, seconds)
        results.append(result)
        (session.folder / "stages.json").write_text(json.dumps({"stages": results}, indent=1) + "\n")
        if stage.name != "build":  # the next stage finds the name of the machine, which the page has, too
            failures = write_summary(session.summary, session.folder, session.results, results)
        print(f"    {result['outcome']}, {result['seconds']:.0f} s; {result['note']}", flush=True)
    print(f"summary: {session.summary}\nlogs: {session.folder}")
    for line in failures:
        print(f"FAILED {line}")
    print(f"{len(failures)} failures" if failures else "nothing failed")
    return 1 if failures else 0


if __name__ == "__main__":
    # SIGTERM stops the stage; results so far are still written.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
