"""Bar charts of result rows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.tables import case_words, number, rows_by

Row = dict[str, Any]
BARS = {True: "#2a6f97", False: "#9aa5b1"}  # fastmask and the others
FLOOR = "#d1495b"


def write_plots(rows: Sequence[Row], folder: Path, name: str, subtitle: str) -> list[Path]:
    """One PNG for each operation: how many times faster than the baseline each provider is, and where the floor lies,
    on a logarithmic axis.

    Args:
        name: start of the files' names.
        subtitle: the machine, in words.
    """
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    timed = [row for row in rows if row["status"] == "ok" and "speedup" in row]
    paths = []
    for (op,), group in rows_by(timed, "op").items():
        path = folder / f"{name}-{re.sub(r'[^a-z0-9]+', '-', op)}.png"
        _plot_operation(op, group, path, subtitle)
        paths.append(path)
    return paths


def _plot_operation(op: str, rows: Sequence[Row], path: Path, subtitle: str) -> None:
    from matplotlib import pyplot as plt

    sections = rows_by(rows, "case", "dtype", "allocator").values()
    figure, axes = plt.subplots(
        len(sections), 1, figsize=(8, 0.8 + sum(0.36 * len(group) + 0.9 for group in sections)), squeeze=False
    )
    for axis, group in zip(axes[:, 0], sections, strict=True):
        group = group[::-1]
        speedups = [row["speedup"] for row in group]
        at_floor = max(row["median_ms"] / row["floor_ms"] for row in group if row["provider"] == row["baseline"])
        spread = [
            [row["speedup"] - row["speedup_p20"] for row in group],
            [row["speedup_p80"] - row["speedup"] for row in group],
        ]
        colors = [BARS[row["provider"].startswith("fastmask")] for row in group]
        axis.barh([row["provider"] for row in group], speedups, color=colors, xerr=spread, ecolor="#444444", capsize=2)
        for position, row in enumerate(group):
            label = f" {number(row['speedup'])}×  ({number(row['median_ms'])} ms)"
            axis.text(row["speedup_p80"], position, label, va="center", fontsize=8)
        axis.axvline(at_floor, color=FLOOR, linestyle="--", linewidth=1)
        axis.text(at_floor, len(group) - 0.45, f"floor ({group[0]['floor_of']})", color=FLOOR, fontsize=8, ha="center")
        axis.set_xscale("log")
        axis.set_xlim(0.5 * min(speedups), 3 * max(at_floor, *speedups))
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_title(case_words(group[0]), loc="left", fontsize=9, pad=14)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel(f"times faster than {rows[0]['baseline']}", fontsize=8)
    figure.suptitle(f"{op} on {subtitle}", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
