"""The benchmarks' own machinery, on providers that sleep, lie and break; and one quick run from end to end."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import typer

from benchmarks import report, run
from benchmarks.harness import allocator
from benchmarks.harness.agreement import ErrorBudget
from benchmarks.harness.chart import speedup_chart
from benchmarks.harness.machine import Rates, Work, commit, default_name
from benchmarks.harness.registry import Case, Operation, Provider, Unavailable, load_operations
from benchmarks.harness.results import merge_rows, read_results, write_results
from benchmarks.harness.runner import measure_case
from benchmarks.harness.tables import markdown_table, number, speedups
from benchmarks.harness.timing import TimeBudget, Timer, interleave, speedup
from benchmarks.ops import inputs as benchmark_inputs
from fastmask import measure
from fastmask.measure import peak_memory, summary

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
RATES = Rates(bytes=1e9, specials=1e9, flops=1e12, operations=1e10, source="made up")
RUN = {
    "machine": {
        "cpu": "Some Processor",
        "cores": 2,
        "threads": 2,
        "simd": "avx2",
        "gpu": None,
        "python": "3.11",
        "packages": {"torch": "2.13.0", "transformers": "5.0", "scipy": None, "triton": None},
    },
    "rates": RATES.as_dict(),
    "date": "2026-01-02 03:04 UTC",
    "commit": "abc",
    "dirty": False,
    "argv": [],
}


class FakeTimer:
    """Counts instead of waiting: each provider's calls take the seconds that its script says, one after the other."""

    def __init__(self, scripts):
        self.scripts = {name: iter(script) for name, script in scripts.items()}
        self.order = []

    def seconds(self, call, repeats):
        name = call()
        self.order.append(name)
        return next(self.scripts[name])


def double(inputs):
    return lambda: {"double": inputs * 2}


def missing(inputs):
    raise Unavailable("not on this machine")


def breaks(inputs):
    def call():
        raise RuntimeError("out of\nmemory")

    return call


def make_operation(*providers):
    return Operation(
        name="double",
        title="Twice the input",
        cases=(
            Case("small", {"count": 5}, ("quick",)),
            Case("large", {"count": 50}, ("cpu",), ("float32", "bfloat16")),
        ),
        providers=providers,
        baseline=providers[0].name,
        make_inputs=lambda sizes, dtype, device: torch.arange(sizes["count"], dtype=dtype, device=device),
        oracle=lambda inputs: ErrorBudget({"double": inputs.double() * 2}, {"double": inputs * 2}),
        work=lambda inputs: Work(bytes=2 * inputs.nbytes),
    )


def test_percentiles_lie_between_neighbors():
    expected = {"median_ms": 3e3, "p20_ms": 1.8e3, "p80_ms": 4.2e3, "rounds": 5}
    assert summary([5.0, 1.0, 3.0, 2.0, 4.0]) == pytest.approx(expected)
    assert summary([7.0])["p80_ms"] == 7e3


def test_speedup_is_the_median_of_ratios_of_the_same_round():
    # The second round was disturbed for both alike, which the ratio of medians would show and the pairs do not.
    ours, baseline = [1.0, 10.0, 1.0, 1.0], [3.0, 30.0, 3.0]
    result = speedup(ours, baseline)
    assert result["speedup"] == result["speedup_p20"] == result["speedup_p80"] == 3
    assert result["speedup_rounds"] == 3


def test_the_floor_is_the_scarcest_resource():
    assert RATES.floor(Work(bytes=2_000_000_000, specials=1_000_000_000)) == (2, "memory")
    assert RATES.floor(Work(bytes=1) + Work(bytes=0, specials=10**9, flops=10**9)) == (1, "special functions")
    assert RATES.floor(Work(bytes=0, flops=3 * 10**12)) == (3, "matrix products")
    assert RATES.floor(Work(bytes=0, operations=10**10)) == (1, "vector operations")


def test_providers_take_turns_and_slow_ones_drop_out():
    scripts = {"a": [0.1] * 9, "slow": [2.0] * 9, "slower": [9.0] * 9}
    timer = FakeTimer(scripts)
    calls = {name: lambda name=name: name for name in scripts}
    estimates = {name: script[0] for name, script in scripts.items()}
    samples = interleave(calls, estimates, timer, TimeBudget(rounds=5, seconds=6.0, least_rounds=3))
    assert timer.order == ["a", "slow", "slower", "a", "slow", "slower", "a", "slow", "a", "a"]
    assert {name: len(values) for name, values in samples.items()} == {"a": 5, "slow": 3, "slower": 2}


def test_a_short_call_is_repeated_within_its_turn():
    repeats = []

    class OneMillisecond:
        def seconds(self, call, count):
            repeats.append(count)
            return 0.001

    interleave({"a": lambda: None}, {"a": 0.001}, OneMillisecond(), TimeBudget(rounds=2, sample_seconds=0.02))
    assert repeats == [20, 20]


def test_the_cpu_timer_gives_the_mean_of_its_calls(monkeypatch):
    seconds, now = iter([0.25, 0.5, 1.5]), [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: sum(now))
    assert Timer(torch.device("cpu")).seconds(lambda: now.append(next(seconds)), 3) == 0.75


def test_providers_that_disagree_break_or_are_missing_are_never_timed():
    called = []

    def wrong(inputs):
        def call():
            called.append("wrong")
            return {"double": inputs * 2 + 1}

        return call

    def nan(inputs):
        return lambda: {"double": inputs * float("nan")}

    def other_shape(inputs):
        return lambda: {"double": inputs[:-1] * 2}

    def unprepared(inputs):
        return inputs.no_such

    prepares = (double, wrong, nan, other_shape, missing, breaks, unprepared)
    operation = make_operation(*(Provider(f.__name__, f, partial=f is wrong) for f in prepares))
    rows = measure_case(operation, operation.cases[0], "float32", CPU, RATES, TimeBudget(rounds=2))
    by_name = {row["provider"]: row for row in rows}
    assert {name: row["status"] for name, row in by_name.items()} == {
        "double": "ok",
        "wrong": "failed",
        "nan": "failed",
        "other_shape": "failed",
        "missing": "missing",
        "breaks": "failed",
        "unprepared": "failed",
    }
    assert called == ["wrong"], "called to be checked, and not again"
    assert "off by 1.00e+00" in by_name["wrong"]["reason"]
    assert "nan" in by_name["nan"]["reason"]
    assert by_name["other_shape"]["reason"] == "double has shape (4,); expected (5,)"
    assert by_name["missing"]["reason"] == "not on this machine"
    assert by_name["breaks"]["reason"] == "RuntimeError: out of"
    assert by_name["unprepared"]["reason"].startswith("AttributeError: ")
    assert [name for name, row in by_name.items() if "median_ms" in row] == ["double"]
    assert [name for name, row in by_name.items() if row.get("partial")] == ["wrong"]
    row = by_name["double"]
    assert row["rounds"] == 2
    assert row["speedup"] == 1
    assert row["floor_ms"] == pytest.approx(4e-5)
    assert row["times_floor"] == pytest.approx(row["median_ms"] / row["floor_ms"])


def test_the_budget_scales_with_the_references_error_and_the_providers_factor():
    exact = torch.tensor([1.0, 100.0], dtype=torch.float64)
    budget = ErrorBudget({"x": exact}, {"x": (exact + 1e-3).float()})
    within, beyond = (exact + 1.9e-3).float(), (exact + 3e-3).float()
    assert budget.disagreement({"x": within}, 2.0) is None
    assert budget.disagreement({"x": beyond}, 2.0).startswith("x is off by 3.0")
    assert budget.disagreement({"x": beyond}, 4.0) is None
    assert budget.disagreement({"y": within}, 2.0) == "gives y; expected x"


def test_peak_memory_counts_temporaries_and_the_result():
    def call():
        temporary = torch.ones(2 << 20)  # 8 MiB
        return temporary[: 1 << 20] + 1

    call()
    result, memory = peak_memory(call, CPU)
    assert result.shape == (1 << 20,)
    assert 12 << 20 <= memory["allocator"] < 13 << 20
    assert memory["resident"] is None or memory["resident"] > 8 << 20


def test_an_operation_names_its_cases_and_providers_once():
    with pytest.raises(ValueError, match="two providers have the same name"):
        make_operation(Provider("a", double), Provider("a", double))
    with pytest.raises(ValueError, match="baseline 'b' is none of its providers"):
        replace(make_operation(Provider("a", double)), baseline="b")


def test_selection_by_suite_case_and_dtype():
    operations = {"double": make_operation(Provider("a", double))}

    def names(*arguments):
        return [(case.name, dtype) for _, case, dtype in run.select(operations, *arguments)]

    assert names("quick", [], []) == [("small", "float32")]
    assert names("cpu", [], []) == [("large", "float32"), ("large", "bfloat16")]
    assert names("quick", ["large"], ["bfloat16"]) == [("large", "bfloat16")]
    assert names("gpu", [], []) == []


def make_row(**changes):
    row = {"op": "double", "case": "small", "dtype": "float32", "device": "cpu", "allocator": "default"}
    row |= {"provider": "a", "status": "ok"}
    timing = {"median_ms": 2.0, "p20_ms": 1.5, "p80_ms": 2.5, "rounds": 3, "baseline": "b", "speedup": 4.0}
    spread = {"speedup_p20": 3.5, "speedup_p80": 4.5, "speedup_rounds": 3}
    floor = {"floor_ms": 1.0, "floor_of": "memory", "times_floor": 2.0}
    return row | timing | spread | floor | {"memory_bytes": {"allocator": 5_000_000, "resident": None}} | changes


def test_a_run_replaces_what_it_measured_and_keeps_the_rest(tmp_path):
    path = tmp_path / "results" / "machine.json"
    first = [make_row(), make_row(provider="b"), make_row(case="large"), make_row(device="cuda")]
    write_results(path, RUN, first)
    write_results(path, RUN | {"date": "later", "commit": "def"}, [make_row(median_ms=9.0), make_row(op="other")])
    results = read_results(path)
    found = [(row["op"], row["case"], row["device"], row["provider"], row["commit"]) for row in results["rows"]]
    assert found == [
        ("double", "small", "cpu", "a", "def"),
        ("double", "large", "cpu", "a", "abc"),
        ("double", "small", "cuda", "a", "abc"),
        ("other", "small", "cpu", "a", "def"),
    ]
    assert results["rows"][0]["median_ms"] == 9
    assert results["date"] == "later"
    assert [p.name for p in path.parent.iterdir()] == ["machine.json"], "no temporary file is left"


def test_a_case_is_one_group_for_each_allocator(tmp_path):
    path = tmp_path / "machine.json"
    old = [{name: value for name, value in make_row(case=case).items() if name != "allocator"} for case in "xy"]
    path.write_text(json.dumps({"schema": 1, "rows": old}))  # as files were before rows named the allocator
    assert [row["allocator"] for row in read_results(path)["rows"]] == ["default", "default"]
    write_results(path, RUN, [make_row(case="x", allocator="retaining", median_ms=1.0)])
    write_results(path, RUN, [make_row(case="x", median_ms=3.0)])
    found = [(row["case"], row["allocator"], row["median_ms"]) for row in read_results(path)["rows"]]
    assert found == [("x", "default", 3.0), ("x", "retaining", 1.0), ("y", "default", 2.0)]


def test_files_that_are_no_results_are_not_overwritten(tmp_path):
    for text in ("{", "[]", '{"schema": 99, "rows": []}'):
        path = tmp_path / "x.json"
        path.write_text(text)
        with pytest.raises(ValueError, match=r"x\.json is no"):
            write_results(path, RUN, [make_row()])
        assert path.read_text() == text
    assert merge_rows([], []) == []


def test_tables_show_every_provider(tmp_path):
    rows = [
        make_row(),
        make_row(provider="b", median_ms=123.4, speedup=1.0, memory_bytes={"allocator": 1e9, "resident": 2e9}),
        make_row(provider="c", status="missing", reason="not installed"),
        make_row(provider="d", status="failed", reason="cost is off"),
    ]
    lines = markdown_table(rows).splitlines()
    assert lines[0].startswith("| case | provider | median ms (p20–p80) | × vs b |")
    assert lines[2] == "| small, float32 | a | 2.00 (1.50–2.50) | 4.00 | 5.00 | 2.00 |"
    assert lines[3] == "|  | b | 123 (1.50–2.50) | 1.00 | 1000 / 2000 | 2.00 |"
    assert lines[5] == "Not run: c (not installed) on small, float32.  "
    assert lines[6] == "Failed: d (cost is off) on small, float32."
    assert [number(value) for value in (0, 0.0123, 0.5, 12.34, 1234.5)] == ["0.00", "0.012", "0.50", "12.3", "1234"]


def with_both_allocators():
    """Rows of one case: with the retaining allocator, the baseline gains more time than fastmask."""
    rows = [make_row(provider="fastmask"), make_row(provider="b", median_ms=8.0, speedup=1.0)]
    rows += [make_row(provider="c", status="missing", reason="not installed")]
    return rows + [
        row | {"allocator": "retaining", "median_ms": ms, "speedup": speedup}
        for row, ms, speedup in zip(rows, (1.5, 4.5, 0.0), (3.0, 1.0, 0.0), strict=True)
    ]


def test_tables_show_both_allocators_and_headlines_the_smaller_ratio():
    rows = with_both_allocators()
    text = markdown_table(rows)
    assert "| small, float32 | fastmask | 2.00 (1.50–2.50) | 4.00 |" in text
    assert "| small, float32, retaining | fastmask | 1.50 (1.50–2.50) | 3.00 |" in text
    assert text.endswith("\nNot run: c (not installed) on small, float32.")
    assert "| small, float32, retaining | – | 1.50 ms | 3.00× (b) |" in report.operator_table(rows, "page.md")
    assert speedups(rows) == [3.0]
    part = make_row(provider="fastmask, a part of it", speedup=0.5, partial=True)
    assert speedups([*rows, part]) == [3.0]
    assert "| small, float32 | fastmask, a part of it |" in markdown_table([part])
    assert ">3.00×</text>" in speedup_chart(rows, {"double": "Twice"}, "a machine")


def make_results(folder):
    """Rows for every headline of the README, and the README and a page that show them."""
    rows = []
    for line in report.HEADLINES:
        about = {"op": line.op, "case": line.case}
        rows += [make_row(**about, provider=line.provider), make_row(**about, provider="b", median_ms=8.0, speedup=1.0)]
        rows.append(make_row(**about, provider="c", median_ms=4.0, speedup=2.0))
    rows += [row | {"allocator": "retaining", "median_ms": 1.0, "speedup": 2 * row["speedup"]} for row in rows]
    write_results(folder / "results" / f"{report.MACHINE}.json", RUN, rows)
    blocks = {"README.md": "headlines", "docs/operators/assign.md": "assign", "docs/guides/cpu.md": "allocators"}
    for name, block in blocks.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"before\n<!-- generated: {block} -->\nold\n<!-- end -->\nafter\n")
    return rows


def test_report_writes_every_page_and_check_notices_a_stale_one(tmp_path, capsys):
    make_results(tmp_path)
    readme = tmp_path / "README.md"
    with pytest.raises(typer.Exit) as stale:
        report.main(tmp_path, tmp_path / "results", check=True)
    assert stale.value.exit_code == 1
    assert "old" in readme.read_text()
    report.main(tmp_path, tmp_path / "results", check=False)
    text = readme.read_text()
    assert text.startswith("before\n<!-- generated: headlines -->\n| operation | allocator | before |")
    assert text.endswith("\n<!-- end -->\nafter\n")
    assert "| default | 8.00 ms (b) | 2.00 ms | 4.00× | 2.00× (c) |" in text
    assert "The smallest ratio of all [measured cases]" in text
    page = (tmp_path / f"docs/benchmarks/{report.MACHINE}.md").read_text()
    assert page.startswith("# Some Processor\n")
    assert "Measured 2026-01-02 03:04 UTC at abc, torch 2.13.0, 2 threads." in page
    assert "4.00× (b)" in (tmp_path / "docs/operators/assign.md").read_text()
    gains = (tmp_path / "docs/guides/cpu.md").read_text()
    assert f"| `assign`: {report.HEADLINES[-1].case} | b | 8.00 ms | 1.00 ms | 8.00× |" in gains
    chart = ElementTree.fromstring((tmp_path / "docs/images/speedups.svg").read_text())
    assert [element.text for element in chart.iter() if (element.text or "").startswith("4.00×")] == ["4.00×"] * 5
    capsys.readouterr()
    report.main(tmp_path, tmp_path / "results", check=True)
    assert "up to date" in capsys.readouterr().out


def test_report_names_what_is_missing(tmp_path):
    with pytest.raises(typer.BadParameter, match=r"has no .*\.json; run benchmarks/run"):
        report.main(tmp_path, tmp_path / "results", check=False)
    rows = make_results(tmp_path)
    with pytest.raises(ValueError, match=r"no row of 'fastmask\.patch' for hf_training_step"):
        report.headlines([row for row in rows if row["op"] != report.HEADLINES[0].op], "page.md")
    with pytest.raises(ValueError, match="no table is called 'b'; there are a"):
        report.fill("<!-- generated: b -->\n<!-- end -->", {"a": ""})
    with pytest.raises(ValueError, match="has no <!-- end -->"):
        report.fill("<!-- generated: a -->\n", {"a": ""})


def test_what_is_committed_shows_the_committed_results():
    report.main(ROOT, ROOT / "benchmarks" / "results", check=True)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("size", [(128, 128), (50, 117)])
def test_scenes_hold_every_segment_as_a_coherent_region(seed, size):
    generator = torch.Generator().manual_seed(seed)
    scene = benchmark_inputs.make_scene(20, size, generator)
    assert scene.shape == size
    assert set(range(20)) <= set(scene.unique().tolist()) <= {*range(20), benchmark_inputs.VOID}
    changes = (scene[:, 1:] != scene[:, :-1]).float().mean()
    assert changes < 0.2, "segments are blobs, not noise"


def test_inputs_are_the_same_each_time_and_in_both_forms():
    segments, again, masks = (
        benchmark_inputs.make_inputs(benchmark_inputs.QUICK | {"form": form}, torch.float32, CPU)
        for form in ("segments", "segments", "masks")
    )
    assert torch.equal(segments.mask_logits, again.mask_logits)
    assert torch.equal(segments.targets.dense_masks(), masks.targets.dense_masks())
    assert torch.equal(segments.assignment >= 0, (segments.targets.labels >= 0).expand_as(segments.assignment))
    pieces = list(benchmark_inputs.single_images(masks))
    assert [(layer, image) for layer, image, _ in pieces] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert torch.equal(pieces[1][2].mask_logits[0, 0], masks.mask_logits[1, 0])


def test_machine_names():
    assert (
        default_name({"gpu": None, "cpu": "AMD EPYC 9654 96-Core Processor"}) == "cpu-amd-epyc-9654-96-core-processor"
    )
    assert default_name({"gpu": "NVIDIA H200", "cpu": "x"}) == "nvidia-h200"
    assert default_name({"gpu": None, "cpu": "x", "simd_cap": None}) == "cpu-x"
    assert default_name({"gpu": None, "cpu": "x", "simd_cap": "avx2"}) == "cpu-x-avx2"
    head, dirty = commit()
    assert isinstance(dirty, bool)
    assert head is None or len(head) >= 7


@pytest.mark.slow
@pytest.mark.parametrize("name", load_operations())
def test_every_operation_agrees_on_its_quick_case(name):
    """All providers that need no compiler, so that a benchmark cannot rot unseen."""
    operation = load_operations()[name]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for case in operation.cases:
            if "quick" in case.suites:
                providers = [provider for provider in operation.providers if not provider.compiles]
                budget = TimeBudget(rounds=1, least_rounds=1, seconds=0, sample_seconds=0, warm_up_seconds=0)
                for dtype in case.dtypes:
                    rows = measure_case(operation, case, dtype, CPU, RATES, budget, providers=providers)
                    assert [row["reason"] for row in rows if row["status"] == "failed"] == []
                    assert operation.baseline in [row["provider"] for row in rows if row["status"] == "ok"]
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
def test_a_quick_run_from_end_to_end(tmp_path):
    output = tmp_path / "results.json"
    command = [
        sys.executable,
        "benchmarks/run.py",
        "--quick",
        "--op",
        "mask_cost",
        "--seconds",
        "0.2",
        "--threads",
        "1",
        "--simd",
        "avx2",
    ]
    command += ["--provider", "fastmask native", "--provider", "fastmask triton", "--provider", "transformers"]
    done = subprocess.run(
        [*command, "--plots", "--output", str(output)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())
    assert results["machine"]["threads"] == 1
    assert results["machine"]["simd_cap"] == "avx2"
    assert results["machine"]["simd"] != "avx512"
    assert results["machine"]["torch_simd"] != "AVX512"
    assert results["argv"][0] == "--quick"
    rows = {(row["allocator"], row["provider"]): row for row in results["rows"]}
    assert len(rows) == len(results["rows"]) == 3 * len(allocator.allocators("cpu"))
    for name in allocator.allocators("cpu"):
        assert rows[name, "fastmask native"]["status"] == "ok"
        assert rows[name, "fastmask native"]["baseline"] == "transformers"
        assert rows[name, "fastmask native"]["rounds"] >= 3
        assert rows[name, "fastmask triton"]["status"] == "missing"
    assert (tmp_path / "plots" / "results-mask-cost.png").read_bytes().startswith(b"\x89PNG")
    assert "fastmask native" in done.stdout


def test_options_that_fit_nothing_are_named():
    for options, message in (
        ({"op": ["no_such"]}, "no operation no_such; there are"),
        ({"device": "tpu"}, "device must be cpu or cuda, got 'tpu'"),
        ({"suite": "no such"}, "nothing to run"),
        ({"op": ["mask_cost"], "dtype": ["int8"]}, "nothing to run"),
        ({"allocator": "no_such"}, "allocator must be default.* here, got 'no_such'"),
        ({"simd": "no_such"}, "simd must be avx2, got 'no_such'"),
    ):
        with pytest.raises(typer.BadParameter, match=message):
            run.main(**options)
