"""The loss curve that the demo draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import ndimage


def plot_losses(history: Sequence[Mapping[str, float]], path: str | Path, *, total: str = "loss") -> None:
    """Writes the loss curve: at the left the total, each step and smoothed, at the right its components, smoothed.

    Args:
        history: the losses of each step by name, every step with the same names.
        path: the picture to write; its suffix chooses the format.
        total: the name of the total among them.

    Raises:
        ValueError: an empty history, or one without the total.
    """
    if len(history) == 0 or total not in history[0]:
        raise ValueError(f"history has {len(history)} steps; expected at least one, each with {total!r}")
    curves = {name: np.array([step[name] for step in history], float) for name in history[0]}
    steps = np.arange(1, len(history) + 1)
    figure = Figure(figsize=(10.5, 4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.plot(steps, curves[total], color="#4285f4", alpha=0.25, linewidth=0.8)
    left.plot(steps, _smoothed(curves[total]), color="#1a56c4", linewidth=2)
    left.set_title("total loss", loc="left", fontweight="bold")
    colors = ("#ef5350", "#26a67b", "#7e57c2", "#f59f1a", "#00acc1", "#d55ccb")
    components = [name for name in curves if name != total]
    for i, name in enumerate(components):
        right.plot(steps, _smoothed(curves[name]), color=colors[i % len(colors)], linewidth=2, label=name)
    right.set_title("its components", loc="left", fontweight="bold")
    if components:
        right.legend(frameon=False)
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.set_xlim(1, max(len(history), 2))
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", color="#e3e6ea", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def _smoothed(values: np.ndarray) -> np.ndarray:
    """The values averaged over about a twentieth of the curve, without lag."""
    return ndimage.gaussian_filter1d(values, max(len(values) / 60, 1e-3), mode="nearest")
