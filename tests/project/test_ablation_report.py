"""The ablation's report: what it counts and how it judges, on made-up predictions and rows."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from benchmarks.ablations.findings import Finding, Judgement, judge
from benchmarks.ablations.groups import groups_of
from benchmarks.ablations.growth import growths
from benchmarks.ablations.plots import write_plots
from benchmarks.ablations.query_classes import QueryClasses, SharedPair, classes_per_query, histogram, shared_pairs
from benchmarks.ablations.tables import difference, render, spread, summary
from benchmarks.ablations.variants import (
    BIPARTITE,
    PER_PIXEL,
    PER_PIXEL_PLUS,
    Variant,
)
from benchmarks.harness.results import read_results
from tests.helpers.ablation_rows import D13, ROOT, SCENES, A, B, make_rows


def class_logits(*images_of_queries):
    """``(B, N, K+1)`` for K = 3: of each query (class, probability), 3 being no object."""
    logits = torch.full((len(images_of_queries), len(images_of_queries[0]), 4), 0.0)
    for b, queries in enumerate(images_of_queries):
        for n, (label, probability) in enumerate(queries):
            logits[b, n] = math.log((1 - probability) / 3)
            logits[b, n, label] = math.log(probability)
    return logits


def test_query_classes_counts_confident_queries_that_are_objects():
    counts = QueryClasses(3, 3, threshold=0.5)
    counts.update(class_logits([(0, 0.9), (3, 0.9), (2, 0.4)], [(1, 0.6), (3, 0.5), (2, 0.8)]))
    counts.update(class_logits([(0, 0.51), (0, 0.49), (3, 0.99)]))
    assert counts.counts.tolist() == [[2, 1, 0], [0, 0, 0], [0, 0, 1]]
    assert counts.images == 3
    assert classes_per_query(counts.counts) == [2, 1, 0]
    assert histogram(counts.counts) == [1, 1, 1, 0]


def test_shared_pairs_are_those_that_one_query_answers_for_most_often():
    counts = [[5, 2, 0], [9, 0, 3], [1, 1, 8], [0, 0, 7]]
    assert shared_pairs(counts) == [SharedPair((0, 2), 2, 4), SharedPair((0, 1), 2, 3), SharedPair((1, 2), 1, 1)]
    assert shared_pairs([[4, 0], [0, 4]]) == []


@pytest.mark.parametrize(
    ("better", "worse", "verdict"),
    [
        ([0.30, 0.31, 0.32], [0.20, 0.21, 0.23], "holds here"),
        ([0.20, 0.21, 0.23], [0.30, 0.31, 0.32], "reversed here"),
        ([0.30, 0.31, 0.32], [0.29, 0.32, 0.30], "no ordering shown"),
        ([0.30, 0.30], [0.30, 0.30], "no ordering shown"),
        ([0.40, 0.31], [0.20, 0.30], "no ordering shown"),
        ([0.90], [0.10], "one seed: no ordering shown"),
        ([0.90], [], "not run"),
    ],
)
def test_an_ordering_is_shown_only_beyond_the_seeds(better, worse, verdict):
    finding = Finding("structures", "(b) above (a)", "+2.7", B, A, "mIoU")
    judgement = judge(finding, make_rows(B, better) + make_rows(A, worse))
    assert judgement.verdict == verdict
    assert len(judgement.differences) == min(len(better), len(worse))


def test_the_interval_is_students_and_pairs_seeds():
    judgement = Judgement(None, (1.0, 2.0, 6.0))
    assert judgement.mean == 3
    assert judgement.half_width == pytest.approx(4.30265 * math.sqrt(7 / 3), rel=1e-5)
    assert difference(judgement) == "+3.0 ± 6.6"
    finding = Finding("structures", "", "", B, A, "mIoU")
    rows = make_rows(B, [0.1, 0.2, 0.3]) + make_rows(A, [0.0, 0.0, 0.0])[1:2]
    assert judge(finding, rows).differences == pytest.approx((20.0,))


def rows_of_icons(number, gains):
    settings = {"settings": replace(SCENES, data=f"composed:icons-{number}").as_row()}
    settings |= {"op": f"ablation on composed:icons-{number}"}
    base, plus = Variant(BIPARTITE, 13, 3), Variant(PER_PIXEL_PLUS, 13, 3)
    return make_rows(base, [0.5 + gain for gain in gains], **settings) + make_rows(plus, [0.5] * len(gains), **settings)


def test_the_growth_with_classes_is_paired_by_seed(tmp_path):
    rows = rows_of_icons(13, [0.01, 0.03, 0.02]) + rows_of_icons(150, [0.06, 0.09, 0.07]) + make_rows(D13, [0.1])
    (found,) = growths(groups_of(rows))
    assert list(found.groups) == [13, 150]
    assert found.growth.differences == pytest.approx((5, 6, 5))
    assert found.growth.verdict == "holds here"
    text = render({"machine": {"gpu": None, "cpu": "Some Processor"}, "rows": rows})
    assert "From 13 to 150 classes of things (d) - (b) grows by +5.3 ± 1.4 points (3 seeds): holds here." in text
    assert not list(growths(groups_of(rows_of_icons(13, [0.01]))))
    assert "x-growth.png" in {path.name for path in write_plots(rows, tmp_path, "x")}


def test_the_growth_is_also_that_of_runs_that_see_each_class_as_often():
    rows = rows_of_icons(13, [0.01, 0.03]) + rows_of_icons(50, [0.02, 0.02]) + rows_of_icons(150, [0.06, 0.09])
    steps = {"composed:icons-13": 780, "composed:icons-50": 3000, "composed:icons-150": 3000}
    for row in rows:
        row["settings"] = row["settings"] | {"steps": steps[row["settings"]["data"]]}
    same_steps, same_share = sorted(growths(groups_of(rows)), key=lambda found: list(found.groups), reverse=True)
    assert (list(same_steps.groups), list(same_share.groups)) == ([50, 150], [13, 50])
    assert same_steps.title.endswith("cpu, 3000 steps")
    assert same_share.title.endswith("cpu, 60 steps per class of things")


def test_the_growth_with_the_length_of_training():
    rows = rows_of_icons(13, [0.01, 0.03])
    for row in rows_of_icons(13, [0.05, 0.08]):
        rows.append(row | {"settings": row["settings"] | {"steps": 5000, "tuning_steps": 100}})
    (found,) = growths(groups_of(rows))
    assert list(found.groups) == [rows[0]["settings"]["steps"], 5000]
    assert found.growth.differences == pytest.approx((4, 5))
    text = render({"machine": {"gpu": None, "cpu": "Some Processor"}, "rows": rows})
    assert "training of several lengths" in text
    assert " to 5000 optimizer steps (d) - (b) grows by +4.5 ± 6.4 points (2 seeds): no ordering shown." in text


def test_curves_tell_what_still_rises(tmp_path):
    rows = make_rows(Variant(PER_PIXEL, 0, 0), [0.2, 0.3]) + make_rows(D13, [0.4, 0.5])
    for row in rows:
        final = row["metrics"]["mIoU"]
        row["curve"] = [[100, final / 2], [200, final - 0.01], [300, final]]
    (group,) = groups_of(rows)
    assert group.curve(D13) == [(100, pytest.approx(22.5)), (200, pytest.approx(44)), (300, pytest.approx(45))]
    assert "From step 200 on, mIoU rose by: (a) per-pixel +1.0; (d) masks, bipartite matching +1.0." in render(
        {"machine": {"gpu": None, "cpu": "Some Processor"}, "rows": rows}
    )
    assert any(path.name.endswith("-curves.png") for path in write_plots(rows, tmp_path, "x"))


def test_numbers_as_they_are_shown():
    assert spread([]) == "–"
    assert spread([31.25]) == "31.2"
    assert spread([30.0, 32.0]) == "31.0 ± 1.4"
    assert difference(Judgement(None, (-0.04,))) == "-0.0"
    judgements = [Judgement(None, values) for values in ((1.0, 1.1), (0.5,), (1.0, -1.0), (2.0, 2.1))]
    assert summary(judgements) == ("Of 4 findings: 2 holds here; 1 one seed: no ordering shown; 1 no ordering shown.")


def test_an_ordering_that_the_seeds_do_not_show_is_not_claimed():
    rows = make_rows(A, [0.2, 0.3]) + make_rows(B, [0.3, 0.2])
    content = {"schema": 1, "machine": {"gpu": None, "cpu": "Some Processor"}, "rows": rows}
    assert "| (b) above (a), mIoU | +2.7 on ADE20K, table 2 | +0.0 ± 127.1 | 2 | no ordering shown |" in render(content)


def test_committed_tables_are_those_of_the_committed_numbers():
    for path in (ROOT / "benchmarks/results").glob("ablation-*.json"):
        assert path.with_suffix(".md").read_text() == render(read_results(path)) + "\n"
