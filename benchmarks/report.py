"""Renders the result files: ``python benchmarks/report.py``; ``--check`` only compares.

For each machine's file a page of tables in ``docs/benchmarks``; from the file of ``MACHINE``, the README's chart and
table, and a short table in each operator's page; from any, one about the memory allocator in the guide to CPUs.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

if __name__ == "__main__":
    # So that `python benchmarks/report.py` finds the package, and the folder's own files shadow no other module.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import typer

from benchmarks.harness.allocator import DEFAULT, RETAINING
from benchmarks.harness.chart import speedup_chart
from benchmarks.harness.machine import ROOT
from benchmarks.harness.registry import load_operations
from benchmarks.harness.results import read_results
from benchmarks.harness.tables import Row, case_words, markdown_lines, markdown_table, number, rows_by, speedups

MACHINE = "cpu-intel-xeon-processor"  # whose numbers the README and the operators' pages show
CHART = {
    "hf_training_step": "Training step, Hugging Face models",
    "criterion": "Criterion: matching and losses, all layers",
    "mask_head": "Mask head and criterion",
    "point_criterion": "Criterion at points (Mask2Former)",
    "mask_cost": "Matching cost",
    "assign": "Assignment",
    "mask_loss": "Mask losses, forward and backward",
    "masked_attention": "Masked attention",
    "deformable_attention": "Deformable attention",
    "semantic": "Semantic inference",
    "panoptic": "Panoptic inference",
    "instance": "Instance inference",
}


class Headline(NamedTuple):
    """A row of the README's table: what is measured, the page about it, and which row of the results it is."""

    title: str
    page: str
    op: str
    case: str
    provider: str


HEADLINES = (
    Headline(
        "Training step of Hugging Face's MaskFormer with Swin-B, after `fastmask.patch(model)`",
        "docs/guides/patch.md",
        "hf_training_step",
        "MaskFormer Swin-B, B2, 512x512, 6 auxiliary layers",
        "fastmask.patch",
    ),
    Headline(
        "Criterion: matching and losses of 7 decoder layers, forward and backward",
        "docs/guides/criterion.md",
        "criterion",
        "B2 L7 M20, segment map",
        "fastmask",
    ),
    Headline(
        "Masked attention, 32 x 32 keys, forward and backward",
        "docs/operators/masked_attention.md",
        "masked_attention",
        "B2 32x32, noise",
        "fastmask native",
    ),
    Headline(
        "Semantic inference, 512 x 512, 150 classes",
        "docs/operators/semantic_inference.md",
        "semantic",
        "512x512 K150, noise",
        "fastmask native",
    ),
    Headline(
        "Assignment: 96 problems of 100 x 20, early in training",
        "docs/operators/assign.md",
        "assign",
        "early, 96 of 100x20",
        "fastmask native",
    ),
)


def page(results: Mapping[str, Any], titles: Mapping[str, str]) -> str:
    """One machine's page: what it is, then a table for each operation.

    Args:
        results: a result file's content.
        titles: a line for each operation, by name; others stand under their name alone.
    """
    machine, rates, rows = results["machine"], results["rates"], results["rows"]
    packages = machine["packages"]
    versions = ", ".join(
        f"{name} {packages[name]}" for name in ("transformers", "scipy", "triton") if packages.get(name)
    )
    kinds = {"specials": "special functions", "operations": "vector operations"}
    per_second = [f"{rates[kind] / 1e9:.3g} G {name}/s" for kind, name in kinds.items() if rates.get(kind)]
    floor = ", ".join([f"{rates['bytes'] / 1e9:.3g} GB/s", *per_second]) + f" ({rates['source']})"
    host = f"{machine['cpu']}, {machine['cores']} cores, SIMD {machine['simd'] or 'unknown'}"
    capped = f", as if it had no more than {machine['simd_cap']}" if machine.get("simd_cap") else ""
    lines = [
        f"# {machine['gpu'] or machine['cpu']}{capped}",
        "",
        f"{'Host: ' if machine['gpu'] else ''}{host}; Python {machine['python']}, {versions}.",
        f"Floors: {floor}. [How to read the tables](index.md).",
    ]
    for (op,), group in rows_by(rows, "op").items():
        lines += ["", f"## {op}", "", *([f"{titles[op]}.", ""] if op in titles else [])]
        lines += [markdown_table(group), "", measured(group)]
    return "\n".join(lines) + "\n"


def measured(rows: Sequence[Mapping[str, Any]]) -> str:
    """When, from which commit and with what these rows were measured."""
    runs = {
        f"{row['date']} at {row['commit'] or 'an unknown commit'}{' with local changes' if row['dirty'] else ''}, "
        f"torch {row['torch']}, {row['threads']} threads": None
        for row in rows
    }
    return f"Measured {'; '.join(runs)}."


def fastest_other(case: Sequence[Row]) -> Row:
    """The fastest row of a case that is not fastmask's."""
    return min((row for row in case if not row["provider"].startswith("fastmask")), key=lambda row: row["median_ms"])


def headlines(rows: Sequence[Row], results_page: str) -> str:
    """The README's table: our time and the baseline's, and the ratio to the fastest other provider; and where the
    ratios are smallest. Of a case that was measured with two allocators, each ratio is the smaller one.

    Raises:
        ValueError: a row is missing.
    """
    timed = rows_by([row for row in rows if row["status"] == "ok"], "op", "case", "dtype", "allocator")

    def alternatives(row: Row) -> list[Row]:
        return timed[row["op"], row["case"], row["dtype"], row["allocator"]]

    def to_fastest_other(row: Row) -> tuple[float, str]:
        best = fastest_other(alternatives(row))
        return row["speedup"] / best["speedup"], best["provider"]

    lines = []
    for headline in HEADLINES:
        ours = list(timed_rows(rows, headline, headline.provider).values())
        if not ours:
            raise ValueError(f"no row of {headline.provider!r} for {headline.op}, {headline.case}")
        least = min(ours, key=lambda row: row["speedup"])
        (before,) = (row for row in alternatives(least) if row["provider"] == least["baseline"])
        ratio, other = min(map(to_fastest_other, ours))
        lines.append(
            [
                f"[{headline.title}]({headline.page})",
                least["allocator"],
                f"{number(before['median_ms'])} ms ({least['baseline']})",
                f"{number(least['median_ms'])} ms",
                f"{number(least['speedup'])}×",
                f"{number(ratio)}× ({other})",
            ]
        )
    header = ["operation", "allocator", "before", "fastmask", "ratio", "to the fastest other"]
    least = min((row for row in rows if speedups([row])), key=lambda row: row["speedup"])
    (before,) = (row for row in alternatives(least) if row["provider"] == least["baseline"])
    best = fastest_other(alternatives(least))
    others = [before] if best is before else [before, best]
    times = ", ".join(f"{row['provider']} takes {number(row['median_ms'])} ms" for row in others)
    note = (
        f"The smallest ratio of all [measured cases]({results_page}) is {number(least['speedup'])}× "
        f"(`{least['op']}`: {case_words(least)}; there {times} and "
        f"fastmask {number(least['median_ms'])} ms)."
    )
    return "\n".join([*markdown_lines(header, lines, words=("operation", "allocator")), "", note])


def timed_rows(rows: Sequence[Row], headline: Headline, provider: str) -> dict[str, Row]:
    """The rows of a provider in a headline's case, by allocator."""
    wanted = (headline.op, headline.case, "float32", provider, "ok")
    names = ("op", "case", "dtype", "provider", "status")
    return {row["allocator"]: row for row in rows if tuple(row[name] for name in names) == wanted}


def allocator_table(files: Iterable[Mapping[str, Any]]) -> str:
    """The times of the README's cases with each allocator, of the baseline and of fastmask, on the first machine
    where the most cases have both."""
    lines, machine = max(((allocator_lines(f["rows"]), f["machine"]) for f in files), key=lambda found: len(found[0]))
    if not lines:
        return "The results do not compare allocators yet."
    header = ["case", "provider", "default", "retaining", "gain"]
    table = markdown_lines(header, lines, words=("case", "provider"))
    return "\n".join([*table, "", f"{machine['cpu']}, {machine['threads']} threads."])


def allocator_lines(rows: Sequence[Row]) -> list[list[str]]:
    lines = []
    for headline in HEADLINES:
        ours = timed_rows(rows, headline, headline.provider)
        for provider in dict.fromkeys([*(row["baseline"] for row in ours.values()), headline.provider]):
            times = timed_rows(rows, headline, provider)
            if times.keys() >= {DEFAULT, RETAINING}:
                before, after = (times[allocator]["median_ms"] for allocator in (DEFAULT, RETAINING))
                cells = [f"{number(before)} ms", f"{number(after)} ms", f"{number(before / after)}×"]
                lines.append([f"`{headline.op}`: {headline.case}", provider, *cells])
    return lines


def operator_table(rows: Sequence[Row], results_page: str) -> str:
    """fastmask's rows of one operator, and where the others are."""
    lines = [
        [
            case_words(row),
            row["provider"].removeprefix("fastmask").strip(" ,") or "–",
            f"{number(row['median_ms'])} ms",
            f"{number(row['speedup'])}× ({row['baseline']})",
            f"{number(row['times_floor'])} ({row['floor_of']})",
        ]
        for row in rows
        if row["provider"].startswith("fastmask") and row["status"] == "ok"
    ]
    table = markdown_lines(["case", "kernel", "median", "ratio", "time / floor"], lines, words=("case", "kernel"))
    op = rows[0]["op"]
    return "\n".join([*table, "", f"The other providers and their memory: [all rows]({results_page}#{op})."])


def fill(text: str, blocks: Mapping[str, str]) -> str:
    """``text`` with the content of each ``<!-- generated: NAME -->`` ... ``<!-- end -->`` replaced.

    Raises:
        ValueError: a name that ``blocks`` does not have, or a block without an end.
    """

    def replaced(match: re.Match[str]) -> str:
        name = match[1]
        if name not in blocks:
            raise ValueError(f"no table is called {name!r}; there are {', '.join(blocks)}")
        return f"<!-- generated: {name} -->\n{blocks[name]}\n<!-- end -->"

    pattern = r"<!-- generated: (\S+) -->\n(?:(?!<!-- generated).)*?<!-- end -->"
    filled, count = re.subn(pattern, replaced, text, flags=re.DOTALL)
    if count != text.count("<!-- generated: "):
        raise ValueError("a generated table has no <!-- end -->")
    return filled


def generated(root: Path, results: Path) -> dict[Path, str]:
    """The content of every file that shows results."""
    titles = {name: operation.title for name, operation in load_operations().items()}
    files = {
        path.stem: read_results(path)
        for path in sorted(results.glob("*.json"))
        if not path.name.startswith("ablation-")  # benchmarks.ablations writes their tables beside them
    }
    if MACHINE not in files:
        raise ValueError(f"{results} has no {MACHINE}.json; run benchmarks/run.py first")
    pages = {root / f"docs/benchmarks/{name}.md": page(content, titles) for name, content in files.items()}
    rows, machine = files[MACHINE]["rows"], files[MACHINE]["machine"]
    host = f"{machine['cpu']}, {machine['threads']} threads, {machine['simd']}"
    pages[root / "docs/images/speedups.svg"] = speedup_chart(rows, CHART, host)
    readme = root / "README.md"
    pages[readme] = fill(readme.read_text(), {"headlines": headlines(rows, f"docs/benchmarks/{MACHINE}.md")})
    tables = {"allocators": allocator_table([files[MACHINE], *files.values()])}
    tables |= {op: operator_table(group, f"../benchmarks/{MACHINE}.md") for (op,), group in rows_by(rows, "op").items()}
    for path in sorted([*(root / "docs/operators").glob("*.md"), *(root / "docs/guides").glob("cpu.md")]):
        pages[path] = fill(path.read_text(), tables)
    return pages


def main(
    root: Annotated[Path, typer.Option(help="Folder of README.md and docs.")] = ROOT,
    results: Annotated[Path, typer.Option(help="Folder of the result files.")] = ROOT / "benchmarks" / "results",
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit with 1 if a file differs.")] = False,
) -> None:
    """Writes the tables and the chart of all result files."""
    try:
        pages = generated(root, results)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    stale = [path for path, text in pages.items() if not path.exists() or path.read_text() != text]
    for path in stale:
        print(f"{path} does not show the result files; run benchmarks/report.py" if check else f"wrote {path}")
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(pages[path])
    if not stale:
        print(f"{len(pages)} files are up to date")
    elif check:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
