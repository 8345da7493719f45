"""Measures fastmask against the field: ``python benchmarks/run.py --help``."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Collection, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":
    # So that `python benchmarks/run.py` finds the package, and the folder's own files shadow no other module.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
import typer
from tqdm import tqdm

from benchmarks.harness.allocator import allocators, current_allocator, environment_with
from benchmarks.harness.machine import ROOT, best_rates, commit, default_name, describe_machine, use_device
from benchmarks.harness.registry import Case, Operation, load_operations
from benchmarks.harness.results import read_results, write_results
from benchmarks.harness.runner import Row, measure_case
from benchmarks.harness.simd import CAPS
from benchmarks.harness.tables import markdown_table, rows_by
from benchmarks.harness.timing import TimeBudget
from fastmask.testing import cap_simd_level

RESULTS = ROOT / "benchmarks" / "results"
TRIALS = ROOT / "out" / "benchmarks"  # of the quick suite, whose shapes are too small to say anything
QUICK_BUDGET = TimeBudget(rounds=5, seconds=2.0, sample_seconds=0.005, warm_up_seconds=0.05)


def select(
    operations: dict[str, Operation], suite: str, cases: list[str], dtypes: list[str]
) -> list[tuple[Operation, Case, str]]:
    """(operation, case, dtype) of everything asked for; empty ``cases`` or ``dtypes`` take all."""
    return [
        (operation, case, dtype)
        for operation in operations.values()
        for case in operation.cases
        if (case.name in cases if cases else suite in case.suites)
        for dtype in case.dtypes
        if not dtypes or dtype in dtypes
    ]


def main(
    op: Annotated[list[str], typer.Option(help="Operation; repeatable. All by default.")] = [],  # noqa: B006
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    suite: Annotated[str, typer.Option(help="quick, cpu, gpu, or full: the one of the device.")] = "full",
    quick: Annotated[bool, typer.Option("--quick", help="Small shapes, few rounds: tries the benchmarks.")] = False,
    case: Annotated[list[str], typer.Option(help="Case, whatever its suite; repeatable.")] = [],  # noqa: B006
    dtype: Annotated[list[str], typer.Option(help="Of the logits; repeatable.")] = [],  # noqa: B006
    provider: Annotated[list[str], typer.Option(help="Provider; repeatable. All by default.")] = [],  # noqa: B006
    compiled: Annotated[bool, typer.Option(help="Also providers that take minutes to compile.")] = True,
    rounds: Annotated[int | None, typer.Option(help="Rounds of each provider.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Time budget of a case; 2 or 3 rounds are the least.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of PyTorch.")] = None,
    allocator: Annotated[
        str | None, typer.Option(help="Memory allocator: default or retaining; by default both on a CPU with glibc.")
    ] = None,
    simd: Annotated[
        str | None, typer.Option(help="avx2: as on a processor without AVX-512, into a result file of its own.")
    ] = None,
    plots: Annotated[bool, typer.Option("--plots", help="Also draw bar charts.")] = False,
    output: Annotated[Path | None, typer.Option(help="Result file; by default one for each machine.")] = None,
) -> None:
    """Checks that all providers agree, times them in turns, and merges the rows into a JSON file.

    On a CPU with glibc, one process does so with the default memory allocator, and then another one with an allocator
    that retains memory.
    """
    try:
        used = use_device(device, threads)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    operations = load_operations()
    if unknown := [name for name in op if name not in operations]:
        raise typer.BadParameter(f"no operation {', '.join(unknown)}; there are {', '.join(operations)}")
    if quick:
        suite = "quick"
    elif suite == "full":
        suite = {"cpu": "cpu", "cuda": "gpu"}[device]
    chosen = select({name: operations[name] for name in op or operations}, suite, case, dtype)
    if not chosen:
        raise typer.BadParameter(f"nothing to run: no case fits --suite {suite} --case {case} --dtype {dtype}")
    if allocator not in (None, *allocators(device)):
        raise typer.BadParameter(f"allocator must be {' or '.join(allocators(device))} here, got {allocator!r}")
    if simd not in (None, *CAPS):
        raise typer.BadParameter(f"simd must be {' or '.join(CAPS)}, got {simd!r}")
    settings = [allocator] if allocator else allocators(device)
    environments = {setting: environment_with(setting) | CAPS.get(simd or "", {}) for setting in settings}
    if len(settings) > 1 or environments[settings[0]] != os.environ:
        # One after another, as they would share the cores.
        succeeded = [run_with(setting, environment) for setting, environment in environments.items()]
        raise typer.Exit(0 if all(succeeded) else 1)
    if simd is not None:
        cap_simd_level(simd)
    budget = QUICK_BUDGET if quick else TimeBudget()
    budget = TimeBudget(
        rounds=rounds or budget.rounds,
        seconds=seconds if seconds is not None else budget.seconds,
        sample_seconds=budget.sample_seconds,
        warm_up_seconds=budget.warm_up_seconds,
    )
    folder = TRIALS if suite == "quick" else RESULTS
    names = {p.name for operation, *_ in chosen for p in operation.providers if compiled or not p.compiles}
    providers = names & set(provider) if provider else names
    rows, path = run(chosen, used, budget, providers, folder, output, simd)
    if plots:
        from benchmarks.harness.plots import write_plots

        results = read_results(path)
        machine = results["machine"]["gpu"] or f"{results['machine']['cpu']}, {results['machine']['threads']} threads"
        for plot in write_plots(results["rows"], path.parent / "plots", path.stem, machine):
            print(f"plot: {plot}")
    print(f"results: {path}")
    if any(row["status"] == "failed" for row in rows):
        raise typer.Exit(1)


def run_with(allocator: str, environment: Mapping[str, str]) -> bool:
    """Runs this program once more, in a process with this allocator and environment. Returns whether it succeeded."""
    command = [sys.executable, __file__, *sys.argv[1:], "--allocator", allocator]
    return subprocess.run(command, env=environment, check=False).returncode == 0


def run(
    chosen: list[tuple[Operation, Case, str]],
    device: torch.device,
    budget: TimeBudget,
    providers: Collection[str],
    folder: Path,
    output: Path | None,
    simd: str | None,
) -> tuple[list[Row], Path]:
    """Measures everything in ``chosen`` and prints the tables. Writes after each case, so that a run that is stopped
    keeps what it has. Returns this run's rows and the result file."""
    head, dirty = commit()
    machine = describe_machine(device) | {"simd_cap": simd}
    rates = best_rates(device)
    path = output or folder / f"{default_name(machine)}.json"
    run_info = {
        "machine": machine,
        "rates": rates.as_dict(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": head,
        "dirty": dirty,
        "argv": sys.argv[1:],
    }
    changes = " with local changes" if dirty else ""
    about = f"{machine['gpu'] or machine['cpu']}, {machine['threads']} threads, {current_allocator()} allocator"
    print(f"{about}, commit {head}{changes}")
    rows: list[Row] = []
    with tqdm(total=len(chosen), unit="case") as bar:
        for operation, case, dtype in chosen:
            bar.set_description(f"{operation.name}: {case.name}, {dtype}")
            subset = [p for p in operation.providers if p.name in providers]
            new = measure_case(
                operation, case, dtype, device, rates, budget, providers=subset, progress=bar.set_postfix_str
            )
            write_results(path, run_info, new)
            rows += new
            bar.update()
    for (name,), group in rows_by(rows, "op").items():
        print(f"\n{name}\n{markdown_table(group)}")
    return rows, path


if __name__ == "__main__":
    typer.run(main)
