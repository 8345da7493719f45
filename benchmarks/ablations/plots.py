"""Plots of the comparisons and of the classes that queries predict."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from benchmarks.ablations.groups import Group, groups_of
from benchmarks.ablations.growth import Growth, growths
from benchmarks.ablations.query_classes import classes_per_query, histogram, shared_pairs
from benchmarks.ablations.tables import METRICS
from benchmarks.ablations.variants import TITLES, Variant

COLORS = ("#2a6f97", "#e07a5f", "#81b29a")
LABELS = {"PQ_st": "PQ$^{St}$"}
PLOTTED_PAIRS = 12
SEED_OFFSET = 0.07  # of the points of single seeds beside the mean


def write_plots(rows: Sequence[dict[str, Any]], folder: Path, name: str) -> list[Path]:
    """PNGs of each group of comparable rows: a figure of its comparisons, and one of its queries' classes.

    Args:
        rows: the rows of a result file.
        folder: the folder to write to.
        name: the beginning of the files' names.
    """
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    groups = groups_of(rows)
    paths: list[Path] = []
    for number, group in enumerate(groups):
        title = group.title.removeprefix("ablation on ")
        again = sum(other.title == group.title for other in groups[:number])
        slug = f"{title} {again + 1}" if again else title
        start = folder / f"{name}-{re.sub(r'[^a-z0-9]+', '-', slug.lower())}"
        if panels := {name: variants for name, variants in group.comparisons().items() if name in METRICS}:
            paths.append(_plot_comparisons(group, panels, Path(f"{start}.png")))
        if curves := {v: c for v in group.comparisons().get("structures", ()) if len(c := group.curve(v)) > 1}:
            paths.append(_plot_curves(group, curves, Path(f"{start}-curves.png")))
        if answering := group.answering():
            paths.append(_plot_queries(group, answering, Path(f"{start}-query-classes.png")))
    for number, found in enumerate(growths(groups)):
        paths.append(_plot_growth(found, folder / f"{name}-growth{f'-{number + 1}' if number else ''}.png"))
    return paths


def _plot_growth(found: Growth, path: Path) -> Path:
    """(d) - (b) against the number of classes or steps: the mean with its 95% interval, and each seed as a point."""
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    gains = found.gains
    for number, gain in gains.items():
        width = gain.half_width if len(gain.differences) > 1 else 0
        axis.errorbar([number], [gain.mean], [width], fmt="o", color=COLORS[0], capsize=3)
        axis.plot([number * 1.04] * len(gain.differences), gain.differences, ".", color=COLORS[0], alpha=0.5)
    axis.plot(list(gains), [gain.mean for gain in gains.values()], color=COLORS[0], alpha=0.4)
    axis.axhline(0, color="gray", linewidth=0.8)
    axis.set_xscale("log")
    axis.set_xticks(list(gains), [str(number) for number in gains])
    axis.minorticks_off()
    axis.set_xlabel(found.quantity)
    axis.set_ylabel("(d) - (b), points of mIoU")
    axis.set_title(found.title, fontsize=10)
    axis.grid(axis="y", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    return _save(figure, path)


def _plot_curves(group: Group, curves: Mapping[Variant, Sequence[tuple[int, float]]], path: Path) -> Path:
    """The mean mIoU of each structure while it trained."""
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for (variant, curve), style in zip(curves.items(), (":", "-.", "--", "-"), strict=False):
        axis.plot(*zip(*curve, strict=True), style, marker="o", markersize=4, label=TITLES[variant.structure])
    axis.set_xlabel("optimizer steps")
    axis.set_ylabel("mIoU on held-out images, %")
    axis.set_title(group.title, fontsize=10)
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    return _save(figure, path)


def _plot_comparisons(group: Group, panels: Mapping[str, Sequence[Variant]], path: Path) -> Path:
    """A panel for each comparison: the mean of each metric with its spread, and each seed as a point."""
    from matplotlib import pyplot as plt

    widths = [1 + len(variants) for variants in panels.values()]
    figure, axes = plt.subplots(
        1,
        len(panels),
        figsize=(max(7, 1 + 0.9 * sum(widths)), 4.2),
        squeeze=False,
        layout="constrained",
        gridspec_kw={"width_ratios": widths},
    )
    for axis, (name, variants) in zip(axes[0], panels.items(), strict=True):
        metrics = [metric for metric in METRICS[name] if any(group.values(v, metric) for v in variants)]
        for number, metric in enumerate(metrics):
            offset = 0.22 * (number - (len(metrics) - 1) / 2)
            _plot_metric(axis, group, variants, metric, offset, COLORS[number])
        axis.set_xticks(range(len(variants)), [_tick(name, variant) for variant in variants], fontsize=8)
        axis.set_xlim(-0.6, len(variants) - 0.4)
        axis.set_title(name, fontsize=10)
        axis.legend(fontsize=8)
        axis.grid(axis="y", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("%", fontsize=9)
    settings = group.settings
    figure.suptitle(
        f"{group.title}: {settings.steps} steps of {settings.batch_size}; mean ± standard deviation over seeds",
        fontsize=10,
    )
    return _save(figure, path)


def _plot_metric(axis: Any, group: Group, variants: Sequence[Variant], metric: str, offset: float, color: str) -> None:
    """A metric of the variants that have it, one place on the x axis each."""
    places = [(place + offset, values) for place, v in enumerate(variants) if (values := group.values(v, metric))]
    spreads = [stdev(values) if len(values) > 1 else 0 for _, values in places]
    means = [mean(values) for _, values in places]
    axis.errorbar(
        [x for x, _ in places], means, spreads, fmt="o", color=color, capsize=3, label=LABELS.get(metric, metric)
    )
    for x, values in places:
        axis.plot([x + SEED_OFFSET] * len(values), values, ".", color=color, alpha=0.5, markersize=4)


def _tick(comparison: str, variant: Variant) -> str:
    if comparison == "queries":
        return f"{variant.queries}"
    if comparison == "layers":
        return f"{variant.layers}\n{variant.task}"
    return TITLES[variant.structure].replace(", ", ",\n").replace(" × ", "\n× ").replace(" without ", "\nwithout ")


def _plot_queries(group: Group, variants: Sequence[Variant], path: Path) -> Path:
    """For each number of queries: classes of each query, sorted; how many queries have how many; most shared pairs."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        len(variants), 3, figsize=(12, 2.4 * len(variants)), squeeze=False, layout="constrained"
    )
    names = group.class_names
    for row, variant in zip(axes, variants, strict=True):
        counts, _ = group.query_classes(variant)
        per_query = classes_per_query(counts)
        row[0].bar(range(len(per_query)), per_query, width=1.0, color=COLORS[0])
        row[0].set_ylabel(f"{variant.queries} queries\nclasses", fontsize=8)
        bins = histogram(counts)
        last = max(number for number, share in enumerate(bins) if share)
        row[1].bar(range(last + 1), bins[: last + 1], color=COLORS[1])
        row[1].set_xticks(range(last + 1))
        row[1].set_ylabel("queries", fontsize=8)
        pairs = shared_pairs(counts)[:PLOTTED_PAIRS][::-1]
        labels = [" + ".join(names[c] for c in pair.classes) for pair in pairs]
        row[2].barh(np.arange(len(pairs)), [pair.images for pair in pairs], color=COLORS[2])
        row[2].set_yticks(np.arange(len(pairs)), labels, fontsize=6)
        if not pairs:
            row[2].set_axis_off()
            row[2].text(
                0.5, 0.5, "no query answers for two classes", fontsize=8, ha="center", transform=row[2].transAxes
            )
        for axis in row:
            axis.tick_params(labelsize=7)
            if axis is not row[2]:
                axis.yaxis.get_major_locator().set_params(integer=True)
            axis.spines[["top", "right"]].set_visible(False)
    titles = "classes of each query (all seeds), sorted", "queries by their number of classes", "images of shared pairs"
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=9)
    figure.suptitle(f"{group.title}: which classes the queries of (d) answer for", fontsize=10)
    return _save(figure, path)


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot as plt

    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
