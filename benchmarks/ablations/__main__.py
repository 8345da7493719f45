"""Reproduces the papers' findings on a small scale: ``python -m benchmarks.ablations --help``.

Trains structures (a) per-pixel, (b) per-pixel+, (c) masks with fixed and (d) with bipartite matching, several numbers
of queries and of decoder layers, and (e) sound events, with equal steps, batches, samples and seeds; compares the two
rules of semantic inference; and tells, by an interval over the seeds, which of the papers' orderings the runs show.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from benchmarks.ablations.sounds import CLIPS
from benchmarks.ablations.training import Bench
from benchmarks.ablations.variants import (
    CLASS_WEIGHT,
    COMPARISONS,
    LAYERS,
    QUERIES,
    STRUCTURES,
    TUNING_SEED,
    Choice,
    Run,
    Settings,
    Variant,
    main_metric,
    plan,
    tuning_plan,
)
from benchmarks.harness.machine import ROOT, commit, default_name, describe_machine, use_device
from benchmarks.harness.results import read_results, write_results
from fastmask.data.open import COMPOSED_SCENES

RESULTS = ROOT / "benchmarks" / "results"
SOUND_MODEL = "tiny"
CLIP_SECONDS = 2


def main(
    data: Annotated[
        str, typer.Option(help='"composed:scenes", "composed:icons-K", or the folder of a data set.')
    ] = COMPOSED_SCENES,
    only: Annotated[list[str], typer.Option(help=f"{', '.join(COMPARISONS)}; repeatable. All by default.")] = [],  # noqa: B006
    structure: Annotated[
        list[str], typer.Option(help=f"Of those to compare: {', '.join(STRUCTURES)}; repeatable. All by default.")
    ] = [],  # noqa: B006
    model: Annotated[
        str, typer.Option(help="Preset of MaskFormer, Mask2Former or EoMT; gives the settings not compared.")
    ] = "tiny",
    pretrained: Annotated[
        str,
        typer.Option(
            help="Backbone weights that transformers reads; for tiny, a file of benchmarks.ablations.backbone."
        ),
    ] = "",
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps of each run.")] = None,
    tuning_steps: Annotated[int, typer.Option(min=0, help="The same of runs that tune; by default as many.")] = 0,
    minutes: Annotated[float, typer.Option(help="Without --steps: time for all runs, by the slowest variant.")] = 40,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds; more may be added later.")] = 3,
    size: Annotated[int, typer.Option(min=32, help="Side of scenes and crops, short side of images, in pixels.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per step.")] = 8,
    learning_rate: Annotated[
        list[float],
        typer.Option(help="Peak learning rate; repeatable: each structure takes its best, on a seed apart."),
    ] = [1e-3],  # noqa: B006
    class_weight: Annotated[
        list[float], typer.Option(help="Weight of the classes' loss in mask classification; repeatable likewise.")
    ] = [CLASS_WEIGHT],  # noqa: B006
    masked_attention: Annotated[bool, typer.Option(help="Mask2Former's decoder for mask classification.")] = False,
    val_samples: Annotated[int, typer.Option(min=1, help="The most validation samples to use.")] = 256,
    queries: Annotated[list[int], typer.Option(help="Numbers to compare; repeatable.")] = list(QUERIES),  # noqa: B006
    layers: Annotated[
        list[int],
        typer.Option(help="Numbers to compare; repeatable. Of an EoMT, blocks with queries, at most its encoder's."),
    ] = list(LAYERS),  # noqa: B006
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    precision: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    workers: Annotated[int, typer.Option(min=0, help="Processes that read samples.")] = 0,
    threads: Annotated[int | None, typer.Option(help="CPU threads of PyTorch.")] = None,
    output: Annotated[Path | None, typer.Option(help="Result file; by default one per machine.")] = None,
) -> None:
    """Trains the runs that the result file lacks, and writes the file, its tables (.md) and its plots.

    Each run is saved when it ends, and has checkpoints until then, in a folder beside the file. After an interruption,
    the same command continues. More seeds or comparisons are added to the existing runs, with the same number of steps.
    """
    rates, weights = tuple(learning_rate), tuple(class_weight)
    images = Settings(data, model, pretrained, size, val_samples, batch_size, steps or 1, rates, weights, precision)
    images = replace(images, tuning_steps=tuning_steps, masked_attention=masked_attention)
    sound = replace(images, data=CLIPS, model=SOUND_MODEL, pretrained="", size=CLIP_SECONDS, masked_attention=False)
    try:
        bench = Bench(images, sound, use_device(device, threads), workers)
        variants = choose_structures(bench.comparisons(queries, layers), structure)
        runs = plan(variants, only, seeds)
        runs = tuning_plan(variants, runs, bench.choices) + runs
    except (ValueError, FileNotFoundError) as error:
        raise typer.BadParameter(str(error)) from error
    path = output or RESULTS / f"ablation-{default_name(describe_machine(bench.device))}.json"
    if steps is None:
        bench = bench.with_steps(earlier_steps(bench, path, minutes) or bench.affordable_steps(runs, minutes))
    print(f"{len(runs)} runs of {bench.image_settings.steps} steps; {len(pending(bench, runs, path))} to do")
    try:
        train(bench, runs, path, None if steps else minutes)
    except KeyboardInterrupt:
        print(f"\nstopped; the same command continues from the finished runs in {path}")
        if path.exists():
            report(path)
        raise typer.Exit(130) from None
    report(path)


def choose_structures(variants: dict[str, list[Variant]], wanted: Sequence[str]) -> dict[str, list[Variant]]:
    """The variants of each comparison, but of that of structures only the wanted ones, or all.

    Raises:
        ValueError: an unknown structure.
    """
    if unknown := [name for name in wanted if name not in STRUCTURES]:
        raise ValueError(f"no structure {', '.join(unknown)}; there are {', '.join(STRUCTURES)}")
    chosen = [variant for variant in variants.get("structures", ()) if variant.structure in (wanted or STRUCTURES)]
    return variants | ({"structures": chosen} if chosen else {})


def pending(bench: Bench, runs: Sequence[Run], path: Path) -> list[Run]:
    """The runs with these settings on this kind of device that the result file lacks."""
    done = [(row["op"], row["case"], row["device"], row["settings"]) for row in read_results(path)["rows"]]
    wanted = [(operation(bench, run), run.name, bench.device.type, bench.settings_of(run).as_row()) for run in runs]
    return [run for run, key in zip(runs, wanted, strict=True) if key not in done]


def earlier_steps(bench: Bench, path: Path, minutes: float) -> int | None:
    """The number of steps that was first derived from a budget, if the result file has runs of this budget."""
    for row in read_results(path)["rows"]:
        for settings in (bench.image_settings, bench.sound_settings):
            same = row["settings"] | {"steps": 0} == settings.as_row() | {"steps": 0}
            if same and row["minutes"] == minutes and row["device"] == bench.device.type:
                return row["settings"]["steps"]
    return None


def train(
    bench: Bench, runs: Sequence[Run], path: Path, minutes: float | None, finished: Callable[[Run], None] | None = None
) -> None:
    """Trains the pending runs and merges each run's row into the result file when it ends.

    Args:
        bench: the settings.
        runs: the runs, in order.
        path: the result file.
        minutes: the budget from which the number of steps was derived, if any.
        finished: called with each run that ended.
    """
    head, dirty = commit()
    with tqdm(total=len(runs), unit="run") as bar:
        todo = pending(bench, runs, path)
        bar.update(len(runs) - len(todo))
        for run in todo:
            bar.set_description(run.name)
            if not run.tunes:
                run = replace(run, choice=best_choice(bench, run, path))
            checkpoints = checkpoint_folder(bench, run, path)
            row = bench.train(run, lambda step, loss: bar.set_postfix(step=step, loss=f"{loss:.2f}"), checkpoints)
            settings = bench.settings_of(run)
            key = {"op": operation(bench, run), "case": run.name, "dtype": settings.precision}
            info = {
                "machine": describe_machine(bench.device),
                "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
                "commit": head,
                "dirty": dirty,
                "argv": sys.argv[1:],
            }
            write_results(path, info, [key | {"device": bench.device.type, "minutes": minutes} | row])
            shutil.rmtree(checkpoints, ignore_errors=True)
            bar.update()
            if finished:
                finished(run)


def checkpoint_folder(bench: Bench, run: Run, path: Path) -> Path:
    """Where a run has its checkpoints until it ends: its name hashes all that the run depends on."""
    settings = bench.settings_of(run).as_row() | asdict(bench.choice_of(run))
    key = json.dumps([operation(bench, run), run.name, bench.device.type, settings], sort_keys=True)
    return path.with_suffix(".unfinished") / hashlib.sha256(key.encode()).hexdigest()[:16]


def report(path: Path) -> None:
    """Writes the tables and plots of a result file to its folder."""
    from benchmarks.ablations.plots import write_plots
    from benchmarks.ablations.tables import render

    results = read_results(path)
    text = render(results)
    path.with_suffix(".md").write_text(text + "\n")
    print(f"\n{text}\n")
    for plot in write_plots(results["rows"], path.parent / "plots", path.stem):
        print(f"plot: {plot}")
    print(f"results: {path}\ntables: {path.with_suffix('.md')}")


def best_choice(bench: Bench, run: Run, path: Path) -> Choice:
    """The choice with which the structure of a run was best on the tuning seed, by mIoU, or F1 for sound."""
    tuning = replace(run, seed=TUNING_SEED)
    settings, structure = bench.settings_of(tuning), run.variant.structure
    choices = settings.choices(structure)
    if len(choices) == 1:
        return choices[0]
    found = {
        Choice(**row["choice"]): row["metrics"][main_metric(run)] or 0.0
        for row in read_results(path)["rows"]
        if row["op"] == operation(bench, tuning)
        and (row["variant"]["structure"], row["settings"]) == (structure, settings.as_row())
    }
    return max(choices, key=found.__getitem__)


def operation(bench: Bench, run: Run) -> str:
    """The name under which a run's row is stored, with the name of its data set, not its path."""
    settings = bench.settings_of(run)
    data = settings.data if settings.composed else Path(settings.data).resolve().name
    return f"{'tuning' if run.tunes else 'ablation'} on {data}"


if __name__ == "__main__":
    typer.run(main)
