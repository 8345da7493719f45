"""Groups of comparable rows: with the same data set, kind of device and settings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from benchmarks.ablations.findings import Finding, Judgement, image_findings, judge, sound_findings, values_by_seed
from benchmarks.ablations.variants import BIPARTITE, SOUND, TUNING_SEED, Settings, Variant, comparisons

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Group:
    """Comparable rows.

    Args:
        title: the rows' operation and device.
        settings: the settings of all rows.
        rows: the rows, at least one.
    """

    title: str
    settings: Settings
    rows: tuple[Row, ...]

    @property
    def variants(self) -> list[Variant]:
        """Each variant once, in the order of the rows."""
        return list(dict.fromkeys(Variant(**row["variant"]) for row in self.rows))

    @property
    def is_sound(self) -> bool:
        return self.variants[0].structure in SOUND

    @property
    def class_names(self) -> list[str]:
        return self.rows[0]["class_names"]

    @property
    def base(self) -> Variant:
        """Structure (d) with the numbers of queries and layers that comparisons do not vary."""
        return Variant(BIPARTITE, len(self.class_names), self.rows[0]["base_layers"])

    def comparisons(self) -> dict[str, list[Variant]]:
        """The variants of each possible comparison: at least two variants, or two inference rules on one variant."""
        base, there = self.base, self.variants
        found = comparisons(
            base.queries,
            base.layers,
            panoptic=True,
            sound_classes=base.queries,
            sound_layers=base.layers,
            queries=self._queries(),
            layers=self._layers(),
        )
        present = {name: [variant for variant in variants if variant in there] for name, variants in found.items()}
        return {name: variants for name, variants in present.items() if len(variants) > (name != "inference")}

    def answering(self) -> list[Variant]:
        """Structure (d) with each number of queries for which the predicted classes are known."""
        variants = [Variant(BIPARTITE, number, self.base.layers) for number in self._queries()]
        return [variant for variant in variants if self.query_classes(variant)[0]]

    def judgements(self) -> list[Judgement]:
        """The judgement of each finding whose variants were trained."""
        if self.is_sound:
            findings = sound_findings(self.base.queries, self.base.layers)
        else:
            findings = image_findings(self.base.queries, self.base.layers, self._queries(), self._layers())
        made = self.comparisons()
        judgements = [judge(f, self.rows) for f in findings if f.comparison in made and _can_differ(f)]
        return [judgement for judgement in judgements if judgement.differences]

    def values(self, variant: Variant, metric: str) -> list[float]:
        """A metric of a variant, in points, by ascending seed; empty if it has none."""
        found = values_by_seed(self.rows, variant, metric)
        return [100 * found[seed] for seed in sorted(found)]

    def parameters(self, variant: Variant) -> int:
        return next(row["parameters"] for row in self.rows if Variant(**row["variant"]) == variant)

    def query_classes(self, variant: Variant) -> tuple[list[list[int]], int]:
        """The counts ``(queries of all seeds, K)`` of a variant, and how many images each seed saw."""
        rows = [row for row in self.rows if Variant(**row["variant"]) == variant and "query_classes" in row]
        return [counts for row in rows for counts in row["query_classes"]], rows[0]["evaluated"] if rows else 0

    def curve(self, variant: Variant) -> list[tuple[int, float]]:
        """Steps and the variant's mean main metric after them, in points, over the seeds that have as many; empty if
        none was evaluated while it trained."""
        rows = [row["curve"] for row in self.rows if Variant(**row["variant"]) == variant and "curve" in row]
        whole = [curve for curve in rows if all(value is not None for _, value in curve)]
        columns = zip(*whole, strict=True) if whole else ()
        return [(points[0][0], 100 * mean(value for _, value in points)) for points in columns]

    def _queries(self) -> list[int]:
        found = {v.queries for v in self.variants if v == Variant(BIPARTITE, v.queries, self.base.layers)}
        return sorted(found | {self.base.queries})

    def _layers(self) -> list[int]:
        found = {v.layers for v in self.variants if (v.structure, v.queries) == (BIPARTITE, self.base.queries)}
        return sorted(found | {self.base.layers})


def groups_of(rows: Sequence[Row]) -> list[Group]:
    """Rows by operation, device and settings, in the order of their first appearance; without those of tuning."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["seed"] == TUNING_SEED:
            continue
        key = f"{row['op']}, {row['device']}", json.dumps(row["settings"], sort_keys=True)
        found.setdefault(key, []).append(row)
    return [Group(title, Settings(**json.loads(settings)), tuple(own)) for (title, settings), own in found.items()]


def _can_differ(finding: Finding) -> bool:
    """Whether a finding compares two different things, not the same variant if only one number was trained."""
    return finding.better != finding.worse or finding.worse_metric not in ("", finding.metric)
