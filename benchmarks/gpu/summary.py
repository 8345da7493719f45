"""The summary of a run: stages, rooflines, targets, end-to-end numbers, counters, failures."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.tables import markdown_lines, number, rows_by

Row = dict[str, Any]
RESOURCES = ("memory", "special functions", "matrix products", "vector operations")
END_TO_END = ("hf_training_step", "training_step", "label_maps")
TRAINING = "B16 L6 M20, segment map"
NETWORKS = ("R50, B16, 512x512", "Swin-B, B16, 512x512")


@dataclass(frozen=True)
class Target:
    """A number to reach on an H200.

    Args:
        measure: "times floor", "ms", "speedup" or "memory" (a share), the last two compared with ``against``.
        bound: the maximum, or for a speedup the minimum.
    """

    op: str
    case: str
    dtype: str
    provider: str
    measure: str
    bound: float
    against: str = ""

    def value(self, rows: Mapping[tuple[str, ...], Row]) -> float | None:
        """The measured value; None if it was not measured."""
        own = rows.get((self.op, self.case, self.dtype, self.provider))
        other = rows.get((self.op, self.case, self.dtype, self.against))
        if own is None or (self.against and other is None):
            return None
        if self.measure == "times floor":
            return own["times_floor"]
        if self.measure == "ms":
            return own["median_ms"]
        if self.measure == "speedup":
            return other["median_ms"] / own["median_ms"]
        return own["memory_bytes"]["allocator"] / other["memory_bytes"]["allocator"]

    def met(self, value: float) -> bool:
        return value >= self.bound if self.measure == "speedup" else value <= self.bound

    def words(self) -> str:
        sign = "≥" if self.measure == "speedup" else "≤"
        return f"{self.measure} {sign} {self.bound:g}" + (f" against {self.against}" if self.against else "")


TARGETS = (
    Target("mask_cost", TRAINING, "bfloat16", "fastmask triton", "times floor", 1.3),
    Target("mask_cost", TRAINING, "bfloat16", "fastmask triton", "speedup", 50, "PyTorch reference"),
    Target("mask_cost", TRAINING, "bfloat16", "fastmask triton", "speedup", 5, "torch.compile"),
    Target("mask_loss", TRAINING, "bfloat16", "fastmask triton", "speedup", 20, "PyTorch reference"),
    Target("criterion", TRAINING, "bfloat16", "fastmask", "speedup", 20, "transformers"),
    Target("assign", "early, 96 of 100x(5..40)", "float32", "fastmask native", "ms", 0.05),
    Target("assign", "random, 96 of 100x(5..40)", "float32", "fastmask native", "ms", 0.05),
    Target("assign", "random, 96 of 300x100", "float32", "fastmask native", "ms", 0.15),
    Target("assign", "early, 96 of 300x100", "float32", "fastmask native", "ms", 0.5),
    Target("assign", "early, 96 of 300x100", "float32", "fastmask native", "speedup", 10, "SciPy"),
    Target("semantic", "B8 512x512 K150, noise", "bfloat16", "fastmask triton", "times floor", 2),
    Target("semantic", "B8 512x512 K150, noise", "bfloat16", "fastmask triton", "speedup", 10, "PyTorch original"),
    *(
        Target("masked_attention", f"B16 {side}x{side}, blobs", "bfloat16", "fastmask triton", "speedup", bound, other)
        for side in (16, 32, 64)
        for bound, other in ((2, "SDPA, dense mask"), (1.3, "FlexAttention"))
    ),
    *(
        target
        for case in NETWORKS
        for target in (
            Target("training_step", case, "bfloat16", "fastmask", "speedup", 1.5, "transformers"),
            Target("training_step", case, "bfloat16", "fastmask", "memory", 0.6, "transformers"),
            Target("label_maps", case, "bfloat16", "fastmask", "speedup", 2, "transformers"),
            Target("label_maps", case, "bfloat16", "fastmask", "memory", 0.6, "transformers"),
        )
    ),
)


def read_json(path: Path | None) -> dict[str, Any]:
    return json.loads(path.read_text()) if path is not None and path.exists() else {}


def timed(results: Mapping[str, Any]) -> list[Row]:
    return [row for row in results.get("rows", []) if row["status"] == "ok"]


def rooflines(rows: Sequence[Row]) -> list[str]:
    """A line for each of fastmask's kernels: its time, each floor, the largest one, and the share achieved."""
    lines = []
    for row in rows:
        if row["op"] in END_TO_END or not row["provider"].startswith("fastmask") or "floors_ms" not in row:
            continue
        known = row["floors_ms"]
        floors = [number(1e3 * known[name]) if name in known else "–" for name in RESOURCES]
        measured, share = number(1e3 * row["median_ms"]), f"{100 / row['times_floor']:.0f} %"
        lines.append([f"{row['op']}: {row['case']}, {row['dtype']}", row["provider"], measured, *floors,
                      row["floor_of"], share])  # fmt: skip
    header = ("kernel", "provider", "measured µs", *(f"{name} µs" for name in RESOURCES), "binds", "achieved")
    return ["## Rooflines", "", *markdown_lines(header, lines)] if lines else []


def targets(rows: Sequence[Row]) -> list[str]:
    known = {(row["op"], row["case"], row["dtype"], row["provider"]): row for row in rows}
    lines = []
    for target in TARGETS:
        value = target.value(known)
        outcome = "not measured" if value is None else "met" if target.met(value) else "**missed**"
        shown = "–" if value is None else number(value)
        lines.append([f"{target.op}: {target.case}", target.words(), shown, outcome])
    return ["## Targets", "", *markdown_lines(("operation", "target", "measured", ""), lines)]


def end_to_end(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in rows:
        if row["op"] in END_TO_END:
            images = re.search(r"\bB(\d+)\b", row["case"])
            rate = number(1e3 * int(images[1]) / row["median_ms"]) if images else "–"
            memory = row["memory_bytes"]["allocator"]
            speedup = number(row["speedup"]) if "speedup" in row else "–"
            lines.append([f"{row['op']}: {row['case']}", row["provider"], number(row["median_ms"]), rate,
                          "–" if memory is None else number(memory / 1e9), speedup])  # fmt: skip
    header = ("network", "provider", "ms", "images/s", "peak GB", "× vs transformers")
    return ["## End to end", "", *markdown_lines(header, lines)] if lines else []


def counters(kernels: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    found = [(case, kernel, values) for case, group in kernels.items() for kernel, values in group.items()]
    names = list(dict.fromkeys(name for _, _, values in found for name in values))
    lines = [
        [case, f"`{kernel[:40]}`", *(f"{values[name]:.4g}" if name in values else "–" for name in names)]
        for case, kernel, values in found
    ]
    header = ("case", "kernel", *(name.replace("_", " ") for name in names))
    return ["## Counters (ncu)", "", *markdown_lines(header, lines)] if lines else []


def failed_rows(results: Mapping[str, Any]) -> list[str]:
    """The rows that the benchmarks refused to time, one line for each reason."""
    failed = [row for row in results.get("rows", []) if row["status"] == "failed"]
    return [
        f"{op}, {provider}: {reason} ({len(group)} of its cases)"
        for (op, provider, reason), group in rows_by(failed, "op", "provider", "reason").items()
    ]


def write_summary(path: Path, folder: Path, results: Path | None, stages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Writes the page to ``path``; returns a line for each failure.

    Args:
        folder: the folder of this run, with environment.json and kernels.json if their stages have run.
        results: the benchmarks' result file.
        stages: "name", "outcome", "seconds", "failures" and "note" of each that has run.
    """
    environment, measured = read_json(folder / "environment.json"), read_json(results)
    rows = timed(measured)
    machine = environment.get("machine", {})
    failures = [f"{stage['name']}: {line}" for stage in stages for line in stage["failures"]]
    failures += [f"benchmarks: {line}" for line in failed_rows(measured)]
    lines = [f"# {machine.get('gpu') or machine.get('cpu') or 'GPU'}", ""]
    if machine:
        packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items() if version)
        changes = " with local changes" if environment["dirty"] else ""
        lines += [f"Commit {environment['commit']}{changes}; Python {machine['python']}, {packages}."]
    if "copy_bytes_per_second" in environment:
        lines += [
            f"A copy on the device moves {environment['copy_bytes_per_second'] / 1e12:.2f} TB/s; the floors below are "
            f"by {environment['rates']['source']}: {environment['rates']['bytes'] / 1e12:.2f} TB/s, "
            f"{environment['rates']['specials'] / 1e12:.2f} T special functions/s, "
            f"{environment['rates']['flops'] / 1e12:.0f} TFLOP/s."
        ]
    stage_lines = [
        [stage["name"], stage["outcome"], f"{stage['seconds']:.0f}", stage["note"].replace("|", "/")]
        for stage in stages
    ]
    lines += ["", "## Stages", "", *markdown_lines(("stage", "outcome", "seconds", ""), stage_lines)]
    for section in (targets(rows), rooflines(rows), end_to_end(rows), counters(read_json(folder / "kernels.json"))):
        lines += ["", *section] if section else []
    lines += ["", "## Failures", "", *([f"- {line}" for line in failures] or ["None."])]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return failures
