"""``make demo``: what fastmask is good for, in a few minutes and one HTML page.

The network that comes with the package segments held-out scenes; :mod:`fastmask.cli.pretrain` trained it. Then a
smaller network is trained from random weights twice, with fastmask's criterion and with the PyTorch reference, as a
race.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from tqdm import trange

from fastmask.cli._tables import aligned
from fastmask.cli.pretrain import METRICS, MODEL, THRESHOLD, make_model
from fastmask.cli.segment_namer import RECIPE
from fastmask.data import CLASS_NAMES, PALETTE, ComposedScenes, Sample, SceneDataset, collate_scenes
from fastmask.models import MaskFormer
from fastmask.prediction import contact_sheet, page, side_by_side
from fastmask.prediction.evaluation_page import figure
from fastmask.training import Evaluation, Recipe, Trainer, evaluate
from fastmask.training.benchmark import BACKENDS, OWN, REFERENCE
from fastmask.training.curves import draw_race

PICTURED_SCENES = 6
SCENES_ON_PAGE = 24
RACE_BACKBONE = "tiny"
POINTS = 50  # of each curve of the race
LAST_STEPS = 10  # whose mean is the loss at the end

Rows = Sequence[Sequence[str]]  # of a table, the header first
Prediction = tuple[Sample, Mapping[str, Any]]  # a scene, and by task what the network finds in it

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Lap(NamedTuple):
    """A step of the race: the seconds of training up to its end, and its loss."""

    seconds: float
    loss: float


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the page and the pictures.")] = Path("out/demo"),
    val_scenes: Annotated[int, typer.Option(min=1, help="Held-out scenes to evaluate on.")] = 200,
    race_steps: Annotated[int, typer.Option(min=1, help="Training steps of each side of the race.")] = 150,
    batch_size: Annotated[int, typer.Option(min=1, help="Scenes in a step.")] = 8,
    size: Annotated[int, typer.Option(min=32, help="Height and width of the scenes, in pixels.")] = 128,
    seed: Annotated[int, typer.Option(help="Seed of the race's weights and scenes.")] = 0,
) -> None:
    """Segment held-out scenes, race fastmask against the PyTorch reference in training, and write an HTML page."""
    output.mkdir(parents=True, exist_ok=True)
    network = MaskFormer.from_pretrained(MODEL)
    print(
        f"MaskFormer with {sum(p.numel() for p in network.parameters()) / 1e6:.2f} million parameters, "
        f"threads: {torch.get_num_threads()}; scenes of {size} x {size} pixels, {len(CLASS_NAMES)} classes"
    )
    held_out = SceneDataset("val", val_scenes, (size, size))
    predictions: list[Prediction] = []
    evaluation = evaluate(
        network,
        held_out,
        batch_size=batch_size,
        options={"panoptic": {"threshold": THRESHOLD}},
        boundary_share=None,
        progress=True,
        each=lambda sample, results, _: predictions.append((sample, results)),
    )
    draw_scenes(predictions[:PICTURED_SCENES], output / "scenes.png")
    laps = race(ComposedScenes("train", race_steps * batch_size, (size, size), seed), race_steps, batch_size, seed)
    draw_race({name: means(run, max(1, race_steps // POINTS)) for name, run in laps.items()}, output / "race.png")
    percents = [f"{100 * evaluation.numbers[name]:.1f} %" for name in METRICS]
    scores = [(f"{val_scenes} held-out scenes", *METRICS), ("the network of the package", *percents)]
    times = race_table(laps)
    figures = [figure(sample, results, held_out.info) for sample, results in predictions[:SCENES_ON_PAGE]]
    write_page(output / "index.html", evaluation, figures, output / "race.png", scores, times)
    print(f"\n{aligned(scores)}\n\n{aligned(times)}\n\npage: {output / 'index.html'}; pictures: {output}/*.png")


def race(scenes: ComposedScenes, steps: int, batch_size: int, seed: int) -> dict[str, list[Lap]]:
    """Trains a small network from the same random weights with each backend of the criterion.

    The sides take turns at each step, on the same batch, so that whatever else the machine does slows both. Time counts
    whole training steps, without the composition of the scenes.

    Args:
        scenes: at least ``steps * batch_size``.
        steps: of each side.
        batch_size: B.
        seed: of the weights.
    """
    recipe = Recipe(**RECIPE, learning_rate=1e-3, warmup_steps=steps // 20, steps=steps, batch_size=batch_size)
    sides = {}
    for name, backend in BACKENDS.items():
        torch.manual_seed(seed)
        model = make_model(RACE_BACKBONE).train()
        criterion: Any = model.criterion
        criterion.backend = criterion.matcher.backend = backend
        sides[name] = Trainer(model, recipe)
    laps: dict[str, list[Lap]] = {name: [] for name in sides}
    with trange(steps, desc="race") as bar:
        for step in bar:
            batch = collate_scenes([scenes[step * batch_size + i] for i in range(batch_size)])
            for name, trainer in sides.items():
                start = time.perf_counter()
                loss = float(trainer.step([batch])["loss"])
                before = laps[name][-1].seconds if step else 0.0
                laps[name].append(Lap(before + time.perf_counter() - start, loss))
            bar.set_postfix({name: f"{run[-1].seconds:.0f} s" for name, run in laps.items()})
    return laps


def means(laps: Sequence[Lap], every: int) -> list[Lap]:
    """The mean loss of every so many steps, at the time of the last of them."""
    groups = [laps[i : i + every] for i in range(0, len(laps), every)]
    return [Lap(group[-1].seconds, sum(lap.loss for lap in group) / len(group)) for group in groups]


def race_table(laps: Mapping[str, Sequence[Lap]]) -> Rows:
    """A line for each side; the ratio is the reference's time over fastmask's."""
    steps = len(laps[OWN])
    rows = [(f"{steps} training steps", "time", "a step", "loss at the end", "ratio")]
    for name, run in laps.items():
        seconds, (last,) = run[-1].seconds, means(run[-LAST_STEPS:], LAST_STEPS)
        ratio = f"{seconds / laps[OWN][-1].seconds:.2f} x" if name == REFERENCE else ""
        rows.append((name, f"{seconds:.1f} s", f"{1e3 * seconds / steps:.0f} ms", f"{last.loss:.2f}", ratio))
    return rows


def draw_scenes(predictions: Sequence[Prediction], path: Path) -> None:
    """Writes a sheet of scenes beside their truth and both results."""
    rows = []
    for i, (sample, results) in enumerate(predictions):
        assert sample.segments is not None  # the truth is panoptic
        truth, found = (sample.segments, sample.labels), (results["semantic"], results["panoptic"])
        rows.append(side_by_side(sample.image / 255, *truth, *found, CLASS_NAMES, PALETTE, captions=i == 0))
    contact_sheet(rows, CLASS_NAMES, PALETTE, title="fastmask demo: held-out scenes").save(path)


def write_page(
    path: Path, evaluation: Evaluation, figures: Sequence[str], race_picture: Path, scores: Rows, times: Rows
) -> None:
    """Writes the page: the scores, the race, and the figures of scenes."""
    large = dict(zip(scores[0][1:], scores[1][1:], strict=True)) | {"times faster in training": times[-1][-1]}
    blocks = [
        page.numbers(large),
        page.heading("A race in training"),
        page.paragraph(
            "One network, trained twice from the same random weights and on the same scenes: with fastmask's "
            "criterion, and with the PyTorch reference. The two take turns at each step. Time counts whole training "
            "steps."
        ),
        page.picture(race_picture, "training loss over time"),
        page.table(times),
        page.heading("Each class on held-out scenes"),
        page.paragraph(
            "These are the scores of the network that comes with fastmask. It was trained on the training split alone; "
            "no garment and no part of a texture is in both splits. The scenes are composed by a program, so the "
            "scores say nothing about photographs."
        ),
        page.bars(CLASS_NAMES, {name: evaluation.per_class[name] for name in ("IoU", "PQ")}, PALETTE),
        page.heading("The first held-out scenes"),
        page.mask_slider(),
        *figures,
    ]
    lead = "Mask classification on scenes of garments and textures, and what its training costs."
    page.write_page(path, "fastmask demo", lead, blocks)


if __name__ == "__main__":
    app()
