"""``make gpu`` without a GPU: its stages in their CPU form, and what they do when something crashes or is missing."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as script
from benchmarks.gpu import sanitize, tune
from benchmarks.gpu.isolated import rows_of
from benchmarks.gpu.processes import run_limited
from benchmarks.gpu.profile import parse
from benchmarks.gpu.summary import TARGETS, write_summary
from benchmarks.harness.registry import load_operations
from benchmarks.harness.timing import TimeBudget

ROOT = Path(__file__).resolve().parents[2]
FLOORS = {"memory": 0.1, "special functions": 0.2, "matrix products": 0.0}


def run_module(*arguments: object, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if path is not None:
        environment["PATH"] = f"{path}:{environment['PATH']}"
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_cpu_form_from_end_to_end(tmp_path):
    done = run_module("benchmarks.gpu", "--device", "cpu", "--quick", "--seconds", 3000, "--folder", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    stages = json.loads((tmp_path / "stages.json").read_text())["stages"]
    assert {stage["name"]: stage["outcome"] for stage in stages} == {
        stage.name: "skipped" if stage.name == "build" else "ok" for stage in script.STAGES if not stage.extra
    }
    notes = {stage["name"]: stage["note"] for stage in stages}
    assert "63 passed, 0 failed, 0 skipped, 0 not run" in notes["smoke"]  # 21 calls in three dtypes
    assert "21 passed, 0 failed, 0 skipped, 0 not run" in notes["battery"]
    (summary,) = tmp_path.glob("*-summary.md")
    text = summary.read_text()
    for part in (
        "## Stages",
        "## Targets",
        "## Rooflines",
        "## End to end",
        "hf_training_step: quick, Mask2Former | fastmask.patch |",
    ):
        assert part in text
    assert text.endswith("## Failures\n\nNone.\n")


def test_the_whole_fits_nine_minutes_and_names_what_exists():
    assert sum(stage.seconds for stage in script.STAGES if not stage.extra) <= script.TOTAL_SECONDS < 540
    operations = load_operations()
    for stage in (script.MATCHER, script.MASK_OPERATORS, script.KERNELS, script.PATCHED, script.OWN_NETWORKS):
        for name, cases in stage.items():
            assert set(cases) <= {case.name for case in operations[name].cases if "gpu" in case.suites}
    for target in TARGETS:
        operation = operations[target.op]
        (case,) = (case for case in operation.cases if case.name == target.case)
        assert target.dtype in case.dtypes
        names = [provider.name for provider in operation.providers]
        assert target.provider in names and target.against in ("", *names)


def test_every_stage_comes_by_worth():
    names = [stage.name for stage in script.STAGES if not stage.extra]
    first = ["build", "environment", "smoke", "battery", "matcher", "mask operators", "kernels", "patched networks"]
    assert names[: len(first)] == first
    assert names.index("counters") > names.index("patched networks")


@pytest.mark.slow
def test_a_crash_a_failure_and_a_hang_cost_one_test_each(tmp_path):
    tests = tmp_path / "test_things.py"
    tests.write_text(
        "import os, pytest\n"
        "@pytest.mark.parametrize('n', range(4))\n"
        "def test_numbers(n):\n    assert n != 2, 'two'\n"
        "def test_crash():\n    os._exit(3)\n"
        "@pytest.mark.parametrize('n', range(3))\n"
        "def test_more(n):\n    if n == 1: pytest.skip('not here')\n"
    )
    (tmp_path / "test_broken.py").write_text("import no_such_package\n")
    for shards in (1, 2):
        folder = tmp_path / str(shards)
        files = (tests, tmp_path / "test_broken.py")
        options = ("--shards", shards, "--folder", folder, "--marker", "", "--seconds", 600)
        done = run_module("benchmarks.gpu.suite", *options, *files)
        assert done.returncode == 1
        assert "total: 5 passed, 2 failed, 1 skipped, 0 not run" in done.stdout, done.stdout
        assert "test_things.py::test_crash: crashed with status 3" in done.stdout
        assert "test_numbers[2]: AssertionError: two" in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "1" / "shard-0.jsonl").read_text().splitlines()]
    started = [line["started"].split("::")[1] for line in lines if "started" in line]
    assert started[:4] == ["test_numbers[0]", "test_crash", "test_more[0]", "test_numbers[1]"]


@pytest.mark.slow
def test_a_run_that_is_out_of_time_says_what_did_not_run(tmp_path):
    tests = tmp_path / "test_slow.py"
    tests.write_text("import time\ndef test_slow():\n    time.sleep(3600)\ndef test_never():\n    pass\n")
    options = ("--shards", 1, "--folder", tmp_path, "--marker", "", "--seconds", 8)
    done = run_module("benchmarks.gpu.suite", *options, tests)
    assert done.returncode == 1
    assert "FAILED 2 tests did not run" in done.stdout


def test_what_a_process_said_is_kept_when_its_time_is_up(tmp_path):
    log = tmp_path / "log"
    assert (
        run_limited([sys.executable, "-c", "import time; print('half'); time.sleep(60)"], 2, log, cwd=tmp_path) is None
    )
    assert log.read_text() == "half\n"


def test_a_process_out_of_time_ends_with_its_children(tmp_path):
    log = tmp_path / "log"
    command = ["bash", "-c", "sleep 100 & echo $!; wait"]
    assert run_limited(command, 2, log, cwd=tmp_path) is None
    child = Path("/proc", log.read_text().strip())
    for _ in range(600):
        if not child.exists() or "Z" in (child / "stat").read_text().split()[2]:
            break
        time.sleep(0.1)
    else:
        pytest.fail("the child is still there")
    assert run_limited(["bash", "-c", "echo said; exit 4"], 60, log, cwd=tmp_path) == 4
    assert log.read_text() == "said\n"


@pytest.mark.parametrize(
    ("output", "status", "outcome"),
    [
        ("========= ERROR SUMMARY: 0 errors", 0, True),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0, True),
        ("========= Invalid __global__ read of size 4 bytes\n========= ERROR SUMMARY: 1 error", 99, False),
        ("========= RACECHECK SUMMARY: 2 hazards displayed (0 errors, 2 warnings)", 0, False),
        ("Segmentation fault", 139, False),
    ],
)
def test_what_the_memory_checker_says(output, status, outcome, tmp_path, monkeypatch):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\necho '{output}'\nexit {status}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found, line = sanitize.check("memcheck", "mask_cost, masks", tmp_path, time.monotonic() + 600)
    assert found is outcome
    assert line.startswith("ok " if outcome else "FAILED ")
    assert sanitize.check("memcheck", "assign", tmp_path, time.monotonic() - 1)[0] is None


def test_counters_of_the_last_launch_of_each_kernel():
    text = (
        "==PROF== Connected\n"
        '"ID","Kernel Name","gpu__time_duration.sum","smsp__inst_executed.sum","launch__registers_per_thread"\n'
        '"","","ns","inst","register/thread"\n'
        '"0","_mask_cost_fwd_kernel","900,000","5","128"\n'
        '"1","_other_kernel","1500","7","32"\n'
        '"2","_mask_cost_fwd_kernel","230,000","1,000","128"\n'
    )
    assert parse(text) == {
        "_mask_cost_fwd_kernel": {"time_us": pytest.approx(230), "instructions": 1000, "registers": 128},
        "_other_kernel": {"time_us": pytest.approx(1.5), "instructions": 7, "registers": 32},
    }
    assert parse("==ERROR== no counters\n") == {}


def make_row(op, case, provider, median_ms, memory=1, **changes):
    row = {"op": op, "case": case, "dtype": "bfloat16", "provider": provider, "status": "ok", "median_ms": median_ms}
    floor = {"floor_ms": 0.2, "floors_ms": FLOORS, "floor_of": "special functions", "times_floor": median_ms / 0.2}
    return row | floor | {"memory_bytes": {"allocator": memory, "resident": None}, "speedup": 1.0} | changes


def test_the_summary_says_what_was_met_and_what_was_not(tmp_path):
    network = "R50, B16, 512x512"
    rows = [
        make_row("mask_cost", "B16 L6 M20, segment map", "fastmask triton", 0.25),
        make_row("mask_cost", "B16 L6 M20, segment map", "PyTorch reference", 10.0),
        make_row("training_step", network, "fastmask", 100.0, memory=5 * 10**9),
        make_row("training_step", network, "transformers", 250.0, memory=10**10),
        make_row("assign", "x", "fastmask native", 0.0) | {"status": "failed", "reason": "it is off"},
    ]
    results = tmp_path / "gpu.json"
    results.write_text(json.dumps({"rows": rows}))
    stages = [{"name": "tests", "outcome": "failed", "seconds": 3.0, "failures": ["test_x"], "note": "a | b"}]
    failures = write_summary(tmp_path / "summary.md", tmp_path, results, stages)
    assert failures == ["tests: test_x", "benchmarks: assign, fastmask native: it is off (1 of its cases)"]
    text = (tmp_path / "summary.md").read_text()
    assert "| mask_cost: B16 L6 M20, segment map | times floor ≤ 1.3 | 1.25 | met |" in text
    assert "| speedup ≥ 50 against PyTorch reference | 40.0 | **missed** |" in text
    assert "| speedup ≥ 5 against torch.compile | – | not measured |" in text
    assert f"| training_step: {network} | speedup ≥ 1.5 against transformers | 2.50 | met |" in text
    assert f"| training_step: {network} | memory ≤ 0.6 against transformers | 0.50 | met |" in text
    assert "| fastmask triton | 250 | 100 | 200 | 0.00 | – | special functions | 80 % |" in text
    assert f"| training_step: {network} | fastmask | 100 | 160 | 5.00 |" in text
    assert "| tests | failed | 3 | a / b |" in text
    assert len(rows_of(results, "mask_cost")) == 2


def test_a_stage_that_fails_or_has_no_time_is_listed_last(tmp_path, monkeypatch, capsys):
    def stage(name, code, **options):
        return script.Stage(name, 20, lambda run, seconds: [sys.executable, "-c", code], **options)

    stages = (
        stage("fails", "print('FAILED one thing'); print('FAILED another'); exit(1)"),
        stage("breaks", "raise KeyError('x')"),
        script.Stage("lacks", 20, lambda run, seconds: "no such tool"),
        stage("waits", "import time; time.sleep(3600)"),
        stage("waits too", "import time; time.sleep(3600)", optional=True),
    )

    def hurried(command, seconds, *arguments, **options):
        return run_limited(command, 0.5 if "sleep" in command[-1] else seconds, *arguments, **options)

    monkeypatch.setattr(script, "run_limited", hurried)
    monkeypatch.setattr(script, "STAGES", stages)
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu", "--quick", "--folder", str(tmp_path)])
    assert script.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "4 failures"
    assert lines[-5:-3] == ["FAILED fails: one thing", "FAILED fails: another"]
    assert lines[-3].startswith("FAILED breaks: status 1: KeyError")
    assert lines[-2].startswith("FAILED waits: out of time after")
    outcomes = [stage["outcome"] for stage in json.loads((tmp_path / "stages.json").read_text())["stages"]]
    assert outcomes == ["failed", "failed", "skipped", "out of time", "out of time"]


def test_tuning_tries_fields_that_exist_and_leaves_nothing_changed():
    for tuning in tune.TUNINGS.values():
        module, name = tuning.configs
        configs = getattr(importlib.import_module(f"fastmask.kernels.{module}"), name)
        before = repr(configs)
        for variant in tuning.variants:
            with tuning.using(variant):
                assert repr(configs) != before, variant
            assert repr(configs) == before
        assert any(tuning.case == case.name for case in load_operations()[tuning.operation].cases)


def test_tuning_times_what_is_right_and_leaves_out_the_rest(capsys, monkeypatch):
    plan = TimeBudget(rounds=1, least_rounds=1, seconds=0.0, sample_seconds=0.0)
    tuning = replace(tune.TUNINGS["mask_cost"], variants=({"num_stages": 1},))
    times = tune.run(tuning, "quick", torch.device("cpu"), plan)
    assert sorted(name for _, name in times) == ["as it is", "num_stages=1"]
    monkeypatch.setattr(tune, "attempt", lambda judge: "too many registers")
    assert tune.run(tuning, "quick", torch.device("cpu"), plan) == []
    assert "left out: num_stages=1: too many registers" in capsys.readouterr().out


def test_only_the_devices_own_architecture_is_built(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 9.0\necho 9.0\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("FASTMASK_CUDA_ARCHS", raising=False)
    quick_build = {"FASTMASK_CUDA_ARCHS": "90", "FASTMASK_PORTABLE": "1"}
    assert script.build_for_this_gpu(script.Session("cuda", False, tmp_path)) == quick_build
    assert script.build_for_this_gpu(script.Session("cpu", False, tmp_path)) == {}
    monkeypatch.setenv("FASTMASK_CUDA_ARCHS", "80")
    assert script.build_for_this_gpu(script.Session("cuda", False, tmp_path)) == {}
