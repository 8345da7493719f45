"""The runs as Markdown: measurements, the papers' findings, and whether the runs show them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import mean, median, stdev
from typing import Any

from benchmarks.ablations.findings import CONFIDENCE, GENERAL, Judgement
from benchmarks.ablations.groups import Group, groups_of
from benchmarks.ablations.growth import Growth, growths, per_pixel_plus
from benchmarks.ablations.naming import FOUND, NAMED
from benchmarks.ablations.query_classes import THRESHOLD, classes_per_query, histogram, shared_pairs
from benchmarks.ablations.variants import BIPARTITE, TITLES, UNWEIGHTED, Variant
from benchmarks.harness.tables import markdown_lines

METRICS = {
    "structures": ("mIoU", "PQ_st"),
    "queries": ("mIoU", "PQ_st"),
    "layers": ("mIoU", "PQ_st", "PQ"),
    "sound": ("F1", "precision", "recall"),
}
HEADERS = {"PQ_st": "PQ<sup>St</sup>", FOUND: "pixels of things found", NAMED: "things named right"}
NAMING = (
    "Pixels of things count as found where the label map has any class of things. A thing, which is all of its class "
    "in an image, counts as named right if most of its pixels that are found have its class."
)
# Headers of columns that hold words; the others hold numbers.
WORDS = {"structure", "trained on", "network", "inference", "finding", "the paper's difference", "reading"}
MOST_PAIRS = 5


def render(results: Mapping[str, Any]) -> str:
    """All groups of a result file, each with its tables."""
    machine = results["machine"]["gpu"] or results["machine"]["cpu"]
    groups = groups_of(results["rows"])
    sections = [render_group(group, machine) for group in groups] + [render_growth(found) for found in growths(groups)]
    return "\n\n".join(sections)


def render_group(group: Group, machine: str) -> str:
    """One group's tables under a heading."""
    sections = [f"#### {group.title}", conditions(group, machine)]
    for name, variants in group.comparisons().items():
        title = f"**{name}**"
        sections.append(f"{title}\n\n{inference_table(group) if name == 'inference' else table(group, name, variants)}")
        if note := flattening(group, variants):
            sections.append(note)
    judgements = group.judgements()
    if judgements:
        sections += [findings_table(judgements), summary(judgements)]
    if answering := group.answering():
        sections.append(queries_section(group, answering))
    return "\n\n".join(sections)


def render_growth(found: Growth) -> str:
    """The gain of (d) over (b) for each number of classes or steps, and by how much it grows."""
    rows = [
        [
            str(number),
            *(spread(group.values(variant, "mIoU")) for variant in (per_pixel_plus(group), group.base)),
            difference(gain),
            str(len(gain.differences)),
            gain.verdict,
        ]
        for (number, group), gain in zip(found.groups.items(), found.gains.values(), strict=True)
    ]
    header = [found.quantity, "(b), mIoU", "(d), mIoU", "(d) - (b)", "seeds", "reading"]
    growth, seeds = found.growth, len(found.growth.differences)
    span = f"{min(found.groups)} to {max(found.groups)}"
    return (
        f"#### {found.title}\n\n{markdown(header, rows)}\n\n"
        f"From {span} {found.quantity} (d) - (b) grows by {difference(growth)} points ({seeds} seeds): "
        f"{growth.verdict}. The paper: {growth.finding.paper}."
    )


def conditions(group: Group, machine: str) -> str:
    """The settings that all runs of the group share, and when they ran."""
    settings = group.settings
    unit = "seconds of sound" if group.is_sound else "pixels"
    stamps = {f"{row['commit']}{' with local changes' if row['dirty'] else ''}" for row in group.rows}
    diverged = "; ".join(row["case"] for row in group.rows if row["loss"] is None)
    days = sorted({row["date"].split()[0] for row in group.rows})
    preset = f"Preset `{settings.model}`"
    if settings.masked_attention:
        preset += ", mask classification with the decoder of Mask2Former"
    return (
        f"{machine}. {preset}; {settings.steps} optimizer steps of {settings.batch_size} samples of "
        f"{settings.size} {unit}, {tuned(group)}, {settings.precision}; at most "
        f"{settings.val_samples} validation samples. Mean ± standard deviation over seeds, in %. All variants take the "
        f"same steps on the same samples. Trained {' to '.join(dict.fromkeys([days[0], days[-1]]))} at "
        f"{', '.join(sorted(stamps))}.{f' Diverged: {diverged}.' if diverged else ''}"
    )


def tuned(group: Group) -> str:
    """The learning rate, or what was best for each structure."""
    rates = group.settings.learning_rates
    if len(rates) * len(group.settings.class_weights) == 1:
        return f"learning rate {rates[0]:g}"
    chosen = {row["variant"]["structure"]: row["choice"] for row in group.rows}
    each = "; ".join(
        f"{TITLES[structure]} {choice['learning_rate']:g}"
        + ("" if structure in UNWEIGHTED else f" and {choice['class_weight']:g}")
        for structure, choice in chosen.items()
    )
    tried = (
        f"{', '.join(f'{rate:g}' for rate in rates)} and {', '.join(f'{w:g}' for w in group.settings.class_weights)}"
    )
    steps = f" after {group.settings.tuning_steps} steps" if group.settings.tuning_steps else ""
    return f"learning rates and weights of classes that were best{steps} on another seed, of {tried} ({each})"


def table(group: Group, name: str, variants: Sequence[Variant]) -> str:
    """A comparison's variants with their metrics."""
    shown = (*METRICS[name], FOUND, NAMED) if name == "structures" else METRICS[name]
    metrics = [metric for metric in shown if any(group.values(v, metric) for v in variants)]
    header = ["structure", "queries", "layers", "trained on", "parameters", "seeds"]
    rows = []
    for variant in variants:
        values = [group.values(variant, metric) for metric in metrics]
        rows.append(
            [
                TITLES[variant.structure],
                str(variant.queries or "–"),
                str(variant.layers or "–"),
                variant.task,
                f"{group.parameters(variant) / 1e6:.2f} M",
                str(max(map(len, values))),
                *map(spread, values),
            ]
        )
    text = markdown([*header, *(HEADERS.get(metric, metric) for metric in metrics)], rows)
    return f"{text}\n\n{NAMING}" if NAMED in metrics else text


def flattening(group: Group, variants: Sequence[Variant]) -> str:
    """How much each variant still gained in the last part of training, during which the learning rate goes to 0."""
    gains = []
    for variant in variants:
        curve = group.curve(variant)
        if len(curve) > 1 and len(variants) > 1:
            (before, low), (_, high) = curve[-2:]
            name = TITLES[variant.structure] if len({v.structure for v in variants}) > 1 else variant.name
            gains.append(f"{name} {high - low:+.1f}")
    if not gains:
        return ""
    return f"From step {before} on, {'F1' if group.is_sound else 'mIoU'} rose by: {'; '.join(gains)}."


def inference_table(group: Group) -> str:
    """Both rules on the same trained networks."""
    rows = []
    for rule, prefix in (("semantic", ""), ("general", GENERAL)):
        values = [group.values(group.base, prefix + metric) for metric in METRICS["structures"]]
        network = f"{TITLES[BIPARTITE]}, {group.base.queries} queries"
        rows.append([network, rule, str(len(values[0])), *map(spread, values)])
    return markdown(["network", "inference", "seeds", "mIoU", HEADERS["PQ_st"]], rows)


def findings_table(judgements: Sequence[Judgement]) -> str:
    """The papers' findings beside those of the runs."""
    rows = []
    for judgement in judgements:
        finding = judgement.finding
        metric = HEADERS.get(finding.metric.removeprefix(GENERAL), finding.metric.removeprefix(GENERAL))
        rows.append(
            [
                f"{finding.claim}, {metric}",
                finding.paper,
                difference(judgement),
                str(len(judgement.differences)),
                judgement.verdict,
            ]
        )
    header = ["finding", "the paper's difference", "here", "seeds", "reading"]
    note = (
        f"Differences in points. Here: the mean over seeds of the difference, ± half of its {CONFIDENCE:.0%} interval "
        "(Student's t, paired by seed). An ordering is shown only where the interval leaves out 0; nothing corrects "
        "for the number of findings."
    )
    return f"{markdown(header, rows)}\n\n{note}"


def summary(judgements: Sequence[Judgement]) -> str:
    """The number of findings with each verdict."""
    counts = Counter(judgement.verdict for judgement in judgements).most_common()
    return f"Of {len(judgements)} findings: {'; '.join(f'{count} {verdict}' for verdict, count in counts)}."


def queries_section(group: Group, variants: Sequence[Variant]) -> str:
    """How many classes each query predicts, and which classes share queries."""
    rows, pairs = [], []
    for variant in variants:
        counts, images = group.query_classes(variant)
        per_query, bins = classes_per_query(counts), histogram(counts)
        seeds = len(counts) // variant.queries
        rows.append(
            [
                str(variant.queries),
                str(seeds),
                f"{min(per_query)} – {median(per_query):g} – {max(per_query)}",
                *(f"{100 * share / len(counts):.0f} %" for share in (bins[0], bins[1], sum(bins[2:]))),
            ]
        )
        if variant.queries in (group.base.queries, max(v.queries for v in variants)):
            pairs.append(pairs_line(group, variant, counts, images))
    header = ["queries", "seeds", "classes of a query: least – median – most", "of no class", "of one", "of several"]
    intro = (
        "**which classes each query answers for**\n\n"
        "The distinct classes that a query of (d) is kept with in the validation images (most likely class not "
        f"no-object, probability above {THRESHOLD}). The paper (section 4.4): not uniform, some queries capture more "
        "classes than others, similar classes and unrelated ones alike."
    )
    return f"{intro}\n\n{markdown(header, rows)}\n\n" + "  \n".join(pairs)


def pairs_line(group: Group, variant: Variant, counts: Sequence[Sequence[int]], images: int) -> str:
    """The classes that share queries most often, in words."""
    found = shared_pairs(counts)
    where = f"{variant.queries} queries"
    if not found:
        return f"With {where} no query answered for two classes."
    names = group.class_names
    listed = "; ".join(
        f"{names[a]} and {names[b]} ({pair.queries} quer{'y' if pair.queries == 1 else 'ies'}, {pair.images})"
        for pair in found[:MOST_PAIRS]
        for a, b in [pair.classes]
    )
    return (
        f"With {where} the pairs that share a query most often, of {len(found)} (how many of {len(counts)} queries; in "
        f"how many images at least, of {images} for each seed): {listed}."
    )


def difference(judgement: Judgement) -> str:
    """The mean with its interval; only the mean for a single seed."""
    if len(judgement.differences) < 2:
        return f"{judgement.mean:+.1f}"
    return f"{judgement.mean:+.1f} ± {judgement.half_width:.1f}"


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    if not values:
        return "–"
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in which columns of words stand left and those of numbers right."""
    return "\n".join(markdown_lines(header, rows, WORDS))
