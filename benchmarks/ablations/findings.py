"""The papers' findings, and whether the runs show them, by an interval over the seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from benchmarks.ablations.variants import (
    BIPARTITE,
    FIXED,
    FRAMES,
    NO_MASK_LOSSES,
    PER_PIXEL,
    PER_PIXEL_PLUS,
    PRESENCE,
    Variant,
)

CONFIDENCE = 0.95
NO_ORDERING = "no ordering shown"
# The prefix of a run's metrics by general inference, which separates them from those by semantic inference.
GENERAL = "general "
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Finding:
    """A paper's statement that one variant is better than another.

    Args:
        comparison: the comparison to which it belongs.
        claim: the statement in words.
        paper: the paper's difference, and where the paper gives it.
        better, worse: the variants.
        metric: the metric of both, in 0..1.
        worse_metric: the metric of ``worse``, if it differs.
    """

    comparison: str
    claim: str
    paper: str
    better: Variant
    worse: Variant
    metric: str
    worse_metric: str = ""


@dataclass(frozen=True)
class Judgement:
    """What the runs say about a finding.

    Args:
        differences: better minus worse, in percentage points, for each seed with which both were trained.
    """

    finding: Finding
    differences: tuple[float, ...]

    @property
    def mean(self) -> float:
        return mean(self.differences)

    @property
    def half_width(self) -> float:
        """Half of the 95% confidence interval of the mean, by Student's t over the seeds; infinite for one seed."""
        from scipy.stats import t

        count = len(self.differences)
        if count < 2:
            return math.inf
        return float(t.ppf(0.5 + CONFIDENCE / 2, count - 1)) * stdev(self.differences) / math.sqrt(count)

    @property
    def verdict(self) -> str:
        """An ordering is shown if the interval excludes 0; a difference that the seeds explain shows none."""
        if not self.differences:
            return "not run"
        if not abs(self.mean) > self.half_width:
            return NO_ORDERING if len(self.differences) > 1 else f"one seed: {NO_ORDERING}"
        return "holds here" if self.mean > 0 else "reversed here"


def judge(finding: Finding, rows: Sequence[Row]) -> Judgement:
    """The judgement of a finding by the rows of one group of settings."""
    better = values_by_seed(rows, finding.better, finding.metric)
    worse = values_by_seed(rows, finding.worse, finding.worse_metric or finding.metric)
    return Judgement(
        finding, tuple(100 * (better[seed] - worse[seed]) for seed in sorted(better.keys() & worse.keys()))
    )


def values_by_seed(rows: Sequence[Row], variant: Variant, metric: str) -> dict[int, float]:
    """A metric of a variant by seed, for the seeds with which it was trained."""
    return {
        row["seed"]: row["metrics"][metric]
        for row in rows
        if Variant(**row["variant"]) == variant and row["metrics"].get(metric) is not None
    }


def image_findings(num_classes: int, base_layers: int, queries: Sequence[int], layers: Sequence[int]) -> list[Finding]:
    """The findings of MaskFormer (arXiv:2107.06278) with ResNet-50 about the variants trained on images."""
    a = Variant(PER_PIXEL, 0, 0)
    b = Variant(PER_PIXEL_PLUS, num_classes, base_layers)
    c = Variant(FIXED, num_classes, base_layers)
    d = Variant(BIPARTITE, num_classes, base_layers)
    most, few = (Variant(BIPARTITE, number, base_layers) for number in (max(queries), _nearest(queries, 20)))
    deep, shallow = (Variant(BIPARTITE, num_classes, number) for number in (max(layers), min(layers)))
    deep_things, shallow_things = (Variant(v.structure, v.queries, v.layers, "panoptic") for v in (deep, shallow))
    return [
        Finding("structures", "(b) above (a)", "+2.7 on ADE20K, table 2", b, a, "mIoU"),
        Finding("structures", "(c) above (b)", "+1.8 on ADE20K, table 4a", c, b, "mIoU"),
        Finding("structures", "(d) above (c)", "+0.5 on ADE20K, table 4b", d, c, "mIoU"),
        Finding(
            "structures",
            "(d) above (b), the more the more classes there are",
            "+0.0 on Cityscapes (19 classes), +2.6 on ADE20K (150), table 2",
            d,
            b,
            "mIoU",
        ),
        Finding("structures", "(c) above (b)", "+2.0 on ADE20K, table 4a", c, b, "PQ_st"),
        Finding("structures", "(d) above (c)", "+3.1 on ADE20K, table 4b", d, c, "PQ_st"),
        Finding("structures", "(d) above (b)", "+2.9 on Cityscapes (19), +5.1 on ADE20K (150), table 2", d, b, "PQ_st"),
        Finding(
            "queries",
            f"(d) with {most.queries} queries above {few.queries} (the paper: 100 above 20)",
            "+1.6 on ADE20K, section 4.4",
            most,
            few,
            "mIoU",
        ),
        Finding(
            "queries",
            f"(d) with {few.queries} queries (the paper: 20) above (b)",
            "+1.0 on ADE20K, section 4.4",
            few,
            b,
            "mIoU",
        ),
        Finding(
            "layers",
            f"(d) with {_layers(deep.layers)} above {shallow.layers} (the paper: 6 above 1)",
            "+1.5 on ADE20K, table VIII",
            deep,
            shallow,
            "mIoU",
        ),
        Finding(
            "layers",
            f"(d) with {_layers(shallow.layers)} above (b) with {base_layers} (the paper: 1 above 6)",
            "+1.1 on ADE20K, table VIII",
            shallow,
            b,
            "mIoU",
        ),
        Finding(
            "layers",
            f"panoptic: (d) with {_layers(deep.layers)} above {shallow.layers} (the paper: 6 above 1)",
            "+2.8 on ADE20K panoptic, table VIII",
            deep_things,
            shallow_things,
            "PQ",
        ),
        Finding(
            "inference",
            "semantic above general",
            "+2.1 on ADE20K, table VII (general there drops queries below 0.3)",
            d,
            d,
            "mIoU",
            f"{GENERAL}mIoU",
        ),
        Finding(
            "inference",
            "general above semantic",
            "+0.8 on ADE20K, table VII (as above)",
            d,
            d,
            f"{GENERAL}PQ_st",
            "PQ_st",
        ),
    ]


def sound_findings(sound_classes: int, sound_layers: int) -> list[Finding]:
    """No paper has the same ablation for sound. The closest statement is by Cai et al. 2025 (Detect Any Sound,
    arXiv:2507.16343): queries that predict which events a clip holds, separately from their times, are better than
    frame-wise classification. MaskFormer assumes that the mask losses help, which no paper has measured for sound.
    """
    frames = Variant(FRAMES, 0, 0, "events")
    presence, plain = (Variant(s, sound_classes, sound_layers, "events") for s in (PRESENCE, NO_MASK_LOSSES))
    other = "+6.9 PSDS on AudioSet Strong, arXiv:2507.16343"
    return [
        Finding("sound", "(e) above frame-wise", f"another measure: {other}", presence, frames, "F1"),
        Finding("sound", "(e) above (e) without mask losses", "not measured by a paper", presence, plain, "F1"),
    ]


def _layers(number: int) -> str:
    return "1 layer" if number == 1 else f"{number} layers"


def _nearest(numbers: Sequence[int], wanted: int) -> int:
    return min(numbers, key=lambda number: abs(number - wanted))
