"""Pictures of the curves of training runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmask.files import replace_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = ("#1a56c4", "#ef5350", "#26a67b", "#7e57c2", "#f59f1a")


def draw_curves(records: Sequence[Mapping[str, Any]], path: Path, measured: Sequence[str]) -> None:
    """Writes a picture of the losses and of the scores in evaluation, over the steps.

    Args:
        records: the lines of metrics.jsonl: dicts with "step" and either "loss" and its kinds, or "evaluation".
        path: the picture to write; its suffix chooses the format.
        measured: the scores to draw, such as "mIoU".

    Raises:
        ImportError: matplotlib is missing.
    """
    from matplotlib.ticker import MaxNLocator

    training = [record for record in records if "loss" in record]
    evaluations = [record for record in records if "evaluation" in record]
    figure = _figure(10.5)
    left, right = figure.subplots(1, 2)
    kinds = ["loss", *sorted({name for record in training for name in record if name.startswith("loss_")})]
    for i, kind in enumerate(kinds):
        _plot(left, [(record["step"], record.get(kind)) for record in training], kind, i)
    for i, name in enumerate(measured):
        points = [(record["step"], record["evaluation"].get(name)) for record in evaluations]
        _plot(right, [(step, None if value is None else 100 * value) for step, value in points], name, i, marker="o")
    left.set_title("training", loc="left", fontweight="bold")
    right.set_title("evaluation, %", loc="left", fontweight="bold")
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        _finish(axes, "step")
    _save(figure, path)


def draw_race(runs: Mapping[str, Sequence[tuple[float, float]]], path: Path) -> None:
    """Writes a picture of the losses of several runs over the time that each took.

    Args:
        runs: by name, points of (seconds, loss), none of them empty.
        path: the picture to write; its suffix chooses the format.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure = _figure(7.5)
    axes = figure.subplots()
    for i, (name, points) in enumerate(runs.items()):
        _plot(axes, points, name, i)
        seconds, loss = points[-1]
        axes.plot(seconds, loss, "o", color=COLORS[i])
        axes.annotate(f"{seconds:.0f} s", (seconds, loss), (0, -14), textcoords="offset points", ha="center")
    axes.set_title("training loss", loc="left", fontweight="bold")
    _finish(axes, "seconds of training")
    _save(figure, path)


def _figure(width: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _finish(axes: Any, label: str) -> None:
    axes.set_xlabel(label)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color="#e3e6ea", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False)


def _save(figure: Figure, path: Path) -> None:
    replace_file(path, lambda temporary: figure.savefig(temporary, format=path.suffix.removeprefix(".")))


def _plot(axes: Any, points: Sequence[tuple[float, float | None]], label: str, i: int, marker: str = "") -> None:
    points = [(step, value) for step, value in points if value is not None]
    if points:
        marker = marker or ("o" if len(points) == 1 else "")  # a line of one point does not show
        axes.plot(*zip(*points, strict=True), color=COLORS[i % len(COLORS)], linewidth=1.8, label=label, marker=marker)
