"""The ablation: what it counts and how it judges, on made-up predictions; and short runs from end to end."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import typer
from safetensors.torch import load_file

from benchmarks.ablations import __main__ as ablation
from benchmarks.ablations import backbone, images, sounds
from benchmarks.ablations.findings import Finding, Judgement, image_findings, judge
from benchmarks.ablations.groups import groups_of
from benchmarks.ablations.growth import growths
from benchmarks.ablations.plots import write_plots
from benchmarks.ablations.query_classes import QueryClasses, SharedPair, classes_per_query, histogram, shared_pairs
from benchmarks.ablations.tables import difference, render, spread, summary
from benchmarks.ablations.training import Bench
from benchmarks.ablations.variants import (
    BIPARTITE,
    FIXED,
    FRAMES,
    NO_MASK_LOSSES,
    PER_PIXEL,
    PER_PIXEL_PLUS,
    PRESENCE,
    TUNING_SEED,
    Choice,
    Run,
    Settings,
    Variant,
    comparisons,
    plan,
)
from benchmarks.harness.results import read_results
from fastmask.training import Trainer
from tests.helpers.dataset_trees import blocks, write_image, write_json, write_labels

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SCENES = Settings("composed:scenes", "tiny", "", 32, 4, 2, 2, (1e-3,))
CLIPS = Settings("composed:clips", "tiny", "", 1, 4, 2, 2, (1e-3,))
SHORT = {"steps": 1, "size": 32, "batch_size": 2, "val_samples": 3, "queries": [5, 13], "layers": [1, 3]}
D13 = Variant(BIPARTITE, 13, 3)


@pytest.fixture(scope="module")
def bench():
    return Bench(SCENES, CLIPS, CPU)


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


def make_rows(variant, values, metric="mIoU", **other):
    shared = {
        "op": "ablation on composed:scenes",
        "device": "cpu",
        "settings": SCENES.as_row(),
        "base_layers": 3,
        "class_names": [f"class {i}" for i in range(13)],
        "parameters": 1_234_567,
        "date": "2026-01-02 03:04 UTC",
        "commit": "abc",
        "dirty": False,
        "loss": 1.0,
    }
    return [
        shared | {"variant": asdict(variant), "seed": seed, "metrics": {metric: value}} | other
        for seed, value in enumerate(values)
    ]


A, B = Variant(PER_PIXEL, 0, 0), Variant(PER_PIXEL_PLUS, 13, 3)


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


def test_plan_shares_runs_and_goes_seed_by_seed():
    variants = comparisons(13, 3, panoptic=True, sound_classes=7, sound_layers=2)
    structures = plan(variants, ["structures"], 2)
    assert [(run.variant.structure, run.seed) for run in structures] == [
        (structure, seed) for seed in (0, 1) for structure in (PER_PIXEL, PER_PIXEL_PLUS, FIXED, BIPARTITE)
    ]
    everything = plan(variants, [], 2)
    assert len(everything) == len(set(everything)) == 2 * (4 + 4 + 2 + 3 + 3), "13 queries and 3 layers are (d) itself"
    assert plan(variants, ["inference"], 1) == [Run(D13, 0)]
    without = comparisons(13, 3, panoptic=False, sound_classes=7, sound_layers=2)
    assert {variant.task for variant in without["layers"]} == {"semantic"}
    with pytest.raises(ValueError, match="no comparison shapes; there are structures, queries"):
        plan(variants, ["shapes"], 1)


def test_every_finding_is_about_variants_of_the_plan():
    variants = comparisons(13, 3, panoptic=True, sound_classes=7, sound_layers=2)
    planned = {variant for group in variants.values() for variant in group}
    for finding in image_findings(13, 3, (5, 13, 25, 50, 100), (1, 3, 6)):
        assert {finding.better, finding.worse} <= planned, finding.claim


def test_all_variants_of_a_seed_see_the_same_samples(bench):
    first = next(bench.batches(Run(A, 1), 0))
    for run, same in ((Run(D13, 1), True), (Run(A, 2), False)):
        pixels, targets = next(bench.batches(run, 0))
        assert torch.equal(pixels, first[0]) is same
        assert (targets.labels.shape == first[1].labels.shape and torch.equal(targets.labels, first[1].labels)) is same
    panoptic = next(bench.batches(Run(Variant(BIPARTITE, 13, 3, "panoptic"), 1), 0))
    assert torch.equal(panoptic[0], first[0])
    assert panoptic[1].num_targets >= first[1].num_targets


def test_structures_differ_in_nothing_else(bench):
    networks = {v.structure: bench.trainer(Run(v, 0)).model for v in bench.comparisons([5], [1])["structures"]}
    weights = [network.state_dict() for network in networks.values()]
    for name, value in weights[0].items():
        if name.startswith(("backbone.", "pixel_decoder.")):
            assert all(torch.equal(value, other[name]) for other in weights[1:]), name
    assert networks[FIXED].config.replace(matching="bipartite") == networks[BIPARTITE].config
    assert networks[BIPARTITE].config.num_queries == 13
    assert networks[BIPARTITE].config.stuff_classes == (10, 11, 12)
    assert not networks[PER_PIXEL].config.transformer_decoder
    assert networks[PER_PIXEL_PLUS].config.transformer_decoder
    five = bench.trainer(Run(Variant(BIPARTITE, 5, 1), 0)).model.config
    assert (five.num_queries, five.decoder_layers) == (5, 1)


def test_a_run_is_the_same_each_time(bench):
    first, second = (bench.train(Run(Variant(BIPARTITE, 5, 1), 3)) for _ in range(2))
    assert first | {"seconds": 0} == second | {"seconds": 0}
    assert np.array(first["query_classes"]).shape == (5, 13)


def test_a_network_that_knows_the_truth_scores_one(bench):
    batches = list(images.validation_batches(SCENES, "semantic", 0))
    labels = iter([found for _, targets in batches for found in targets.class_map(12)])
    network = SimpleNamespace(
        config=SimpleNamespace(num_classes=13),
        device=torch.device("cpu"),
        eval=lambda: None,
        predict=lambda pixels: [next(labels) for _ in pixels],
    )
    metrics, queries = images.evaluate_images(network, batches, A, ())
    assert metrics == {"mIoU": 1, "PQ_st": 1}
    assert queries is None


@pytest.mark.parametrize("structure", [PER_PIXEL, BIPARTITE])
def test_more_classes_than_a_byte_holds(structure):
    names = tuple(f"class {i}" for i in range(300))
    variant = Variant(structure, 5, 1)
    network = images.make_network(SCENES, variant, names, ())
    batches = list(images.validation_batches(SCENES, "semantic", 0))
    metrics, _ = images.evaluate_images(network, batches, variant, ())
    assert 0 <= metrics["mIoU"] <= 1


def test_class_segments_leave_out_what_is_no_class():
    ids, infos = images.class_segments(torch.tensor([[0, 2], [255, 2]], dtype=torch.uint8), 3)
    assert ids.tolist() == [[0, 2], [255, 2]]
    assert infos == [{"id": 0, "category_id": 0}, {"id": 2, "category_id": 2}]


def test_the_frame_classifier_learns_when_events_are(bench):
    torch.manual_seed(0)
    network = sounds.make_detector(CLIPS, Variant(FRAMES, 0, 0, "events"))
    waveforms, events = next(iter(sounds.validation_clips(CLIPS, 0)))
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = network(waveforms[:, :-7], events)["loss_strong"]
        loss.backward()
        assert all(parameter.grad is not None for parameter in network.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    full = sounds.make_detector(CLIPS, Variant(PRESENCE, 7, 2, "events")).config
    plain = sounds.make_detector(CLIPS, Variant(NO_MASK_LOSSES, 7, 2, "events")).config
    assert full.replace(mask_weight=0.0, dice_weight=0.0) == plain != full


def test_steps_fit_the_budget_of_the_slowest(bench, monkeypatch):
    monkeypatch.setattr(Bench, "step_seconds", lambda self, run: 0.5 if run.variant == D13 else 0.1)
    runs = [Run(A, 0), Run(A, 1), Run(D13, 0), Run(D13, 1)]
    assert bench.affordable_steps(runs, 10) == int(600 * 0.85 / (4 * 0.5))
    assert bench.affordable_steps(runs, 1e-9) == 1


def test_a_step_is_timed(bench):
    assert 0 < bench.affordable_steps([Run(A, 0)], 1) < 1e6


def run_main(path, **options):
    ablation.main(**SHORT | {"output": path} | options)
    return read_results(path)["rows"]


@pytest.mark.slow
def test_from_end_to_end(tmp_path, monkeypatch, capsys):
    """A comparison, then all of them with one seed, then nothing to do, all in one file."""
    path = tmp_path / "ablation-here.json"
    rows = run_main(path, only=["structures"], seeds=2)
    assert len(rows) == 8
    rows = run_main(path, seeds=1)
    assert len(rows) == 8 + 1 + 1 + 2 + 3, "5 queries, 1 layer, panoptic with 1 and 3 layers, and sound"
    assert json.loads(path.read_text(), parse_constant=pytest.fail)["rows"] == rows
    for row in rows:
        assert all(value is None or 0 <= value <= 1 for value in row["metrics"].values())
        assert row["loss"] > 0
    monkeypatch.setattr(Bench, "train", lambda *_: pytest.fail("trained again"))
    capsys.readouterr()
    assert run_main(path, seeds=1) == rows
    said = capsys.readouterr().out
    text = path.with_suffix(".md").read_text()
    assert text.strip() in said
    assert "#### ablation on composed:scenes, cpu" in text
    assert "#### ablation on composed:clips, cpu" in text
    for title in ("structures", "queries", "layers", "inference", "sound", "which classes each query answers for"):
        assert f"**{title}**" in text
    assert "| (d) masks, bipartite matching | 13 | 3 | semantic | " in text
    assert "one seed: no ordering shown" in text
    assert "holds here" not in text.split("#### ablation on composed:clips")[1], "one seed shows nothing"
    pictures = sorted((tmp_path / "plots").iterdir())
    assert [picture.name for picture in pictures] == [
        "ablation-here-composed-clips-cpu.png",
        "ablation-here-composed-scenes-cpu-query-classes.png",
        "ablation-here-composed-scenes-cpu.png",
    ]
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)


@pytest.mark.parametrize(
    ("model", "layers", "numbers"),
    [
        ("mask2former-tiny", [1], [(5, 3), (13, 1), (13, 1), (13, 3)]),
        ("eomt-tiny", [1, 9], [(5, 2), (13, 1), (13, 1), (13, 2)]),
    ],
)
def test_families_that_share_too_little_with_the_other_structures(model, layers, numbers, tmp_path):
    """They have the other comparisons, an EoMT with as many layers as its encoder has at most."""
    path = tmp_path / "ablation-here.json"
    settings = {"model": model, "queries": [5], "layers": layers, "seeds": 1}
    rows = run_main(path, only=["queries", "layers", "inference"], **settings)
    variants = [row["variant"] for row in rows]
    assert [(variant["queries"], variant["layers"]) for variant in variants] == numbers
    assert all(row["loss"] > 0 and len(row["query_classes"]) == row["variant"]["queries"] for row in rows)
    assert [row["metrics"].keys() >= {"PQ"} for row in rows] == [v["task"] == "panoptic" for v in variants]
    text = path.with_suffix(".md").read_text()
    assert f"Preset `{model}`" in text and "**queries**" in text and "**structures**" not in text
    with pytest.raises(typer.BadParameter, match="no comparison structures; there are queries"):
        run_main(path, only=["structures"], **settings)


def test_an_interrupted_run_continues(tmp_path, monkeypatch, capsys):
    path = tmp_path / "ablation-here.json"
    train = Bench.train
    trained = []

    def stopped(self, run, progress):
        if len(trained) == 1:
            raise KeyboardInterrupt
        trained.append(run.name)
        return train(self, run, progress)

    monkeypatch.setattr(Bench, "train", stopped)
    with pytest.raises(typer.Exit) as ended:
        run_main(path, only=["structures"], seeds=1)
    assert ended.value.exit_code == 130
    assert "continues" in capsys.readouterr().out
    assert [row["case"] for row in read_results(path)["rows"]] == trained

    def continued(self, run, progress):
        trained.append(run.name)
        return train(self, run, progress)

    monkeypatch.setattr(Bench, "train", continued)
    assert [row["case"] for row in run_main(path, only=["structures"], seeds=1)] == trained
    assert len(trained) == len(set(trained)) == 4


def test_a_budget_keeps_the_steps_that_it_was_first_given(tmp_path, monkeypatch):
    path = tmp_path / "ablation-here.json"
    monkeypatch.setattr(Bench, "affordable_steps", lambda self, runs, minutes: 2)
    (row,) = run_main(path, only=["inference"], seeds=1, steps=None, minutes=3)
    assert row["settings"]["steps"] == 2
    monkeypatch.setattr(Bench, "affordable_steps", lambda *_: pytest.fail("measured again"))
    assert len(run_main(path, only=["inference"], seeds=2, steps=None, minutes=3)) == 2
    monkeypatch.setattr(Bench, "affordable_steps", lambda self, runs, minutes: 1)
    other = run_main(path, only=["inference"], seeds=1, steps=None, minutes=4)
    assert [row["settings"]["steps"] for row in other] == [1, 2], "rows of other settings are replaced run by run"
    assert len(groups_of(other)) == 2, "and never compared with each other"


def test_each_structure_takes_what_was_best_on_the_tuning_seed(tmp_path, monkeypatch):
    path = tmp_path / "ablation-here.json"
    trained = []

    def pretended(self, run, progress):
        trained.append(run)
        choice = self.choice_of(run)
        score = {PER_PIXEL: 1, PER_PIXEL_PLUS: -1}.get(run.variant.structure, 0) * choice.learning_rate
        score += 0.1 * choice.class_weight * (run.variant.structure == BIPARTITE)
        (row,) = make_rows(run.variant, [0.5 + score], settings=self.settings_of(run).as_row(), choice=asdict(choice))
        return {name: value for name, value in row.items() if name != "op"} | {"seed": run.seed}

    monkeypatch.setattr(Bench, "train", pretended)
    settings = {"only": ["structures"], "seeds": 2, "learning_rate": [0.01, 0.03], "class_weight": [1.0, 2.0]}
    rows = run_main(path, **settings)
    assert [run.seed for run in trained] == [TUNING_SEED] * (2 + 2 + 4 + 4) + [0] * 4 + [1] * 4
    best = {run.variant.structure: run.choice for run in trained if not run.tunes}
    assert best[PER_PIXEL] == Choice(0.03, 1.0)
    assert best[PER_PIXEL_PLUS] == Choice(0.01, 1.0)
    assert best[FIXED] == Choice(0.01, 1.0), "the first of equals"
    assert best[BIPARTITE] == Choice(0.01, 2.0)
    assert len(rows) == 12 + 8
    (group,) = groups_of(rows)
    assert {row["seed"] for row in group.rows} == {0, 1}
    text = path.with_suffix(".md").read_text()
    assert (
        "of 0.01, 0.03 and 1, 2 ((a) per-pixel 0.03; (b) per-pixel+ 0.01; (c) masks, fixed matching 0.01 and 1" in text
    )
    trained.clear()
    run_main(path, **settings)
    assert not trained
    settings |= {"steps": 7, "tuning_steps": 3, "structure": [BIPARTITE]}
    rows = run_main(path, **settings)
    assert [run.seed for run in trained] == [TUNING_SEED] * 4 + [0, 1]
    assert sorted(row["settings"]["steps"] for row in rows if row["settings"]["tuning_steps"]) == [3] * 4 + [7] * 2
    assert trained[-1].choice == Choice(0.01, 2.0)
    assert "best after 3 steps on another seed" in path.with_suffix(".md").read_text()


def rows_of_icons(number, gains):
    settings = {"settings": replace(SCENES, data=f"composed:icons-{number}").as_row()}
    settings |= {"op": f"ablation on composed:icons-{number}"}
    base, plus = Variant(BIPARTITE, 13, 3), Variant(PER_PIXEL_PLUS, 13, 3)
    return make_rows(base, [0.5 + gain for gain in gains], **settings) + make_rows(plus, [0.5] * len(gains), **settings)


def test_the_growth_with_classes_is_paired_by_seed(tmp_path):
    rows = rows_of_icons(13, [0.01, 0.03, 0.02]) + rows_of_icons(150, [0.06, 0.09, 0.07]) + make_rows(D13, [0.1])
    (found,) = growths(groups_of(rows))
    assert found.classes == (13, 150)
    assert found.growth.differences == pytest.approx((5, 6, 5))
    assert found.growth.verdict == "holds here"
    text = render({"machine": {"gpu": None, "cpu": "Some Processor"}, "rows": rows})
    assert "From 13 to 150 classes of things it grows by +5.3 ± 1.4 points (3 seeds): holds here." in text
    assert not list(growths(groups_of(rows_of_icons(13, [0.01]))))
    assert "x-growth.png" in {path.name for path in write_plots(rows, tmp_path, "x")}


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


def test_structures_start_from_a_backbone_that_names_icons(tmp_path):
    weights = tmp_path / "backbone.safetensors"
    backbone.main(
        icons=3, scenes=4, size=32, steps=1, batch_size=2, val_scenes=2, output=weights, folder=tmp_path / "naming",
        precision="float32",
    )  # fmt: skip
    settings = replace(SCENES, data="composed:icons-3", pretrained=str(weights))
    network = Bench(settings, CLIPS, CPU).trainer(Run(Variant(PER_PIXEL, 0, 0), 0)).model
    for name, weight in load_file(weights).items():
        assert torch.equal(network.backbone.state_dict()[name], weight)


def folder(root):
    for split in ("train", "val"):
        for i, size in enumerate(((40, 60), (48, 36))):
            write_image(root / f"images/{split}/{i}.png", size, i)
            write_labels(root / f"annotations/{split}/{i}.png", blocks([0, 1, 2, 9], size))
    write_json(root / "classes.json", {"classes": ["sky", "road", "car"], "void": 9})
    return root


def test_any_data_set_by_its_folder(tmp_path):
    path = tmp_path / "ablation-here.json"
    rows = run_main(path, data=str(folder(tmp_path / "pictures")), only=["structures", "layers"], seeds=1)
    assert {row["op"] for row in rows} == {"ablation on pictures"}
    assert [row["variant"]["queries"] for row in rows] == [0, 3, 3, 3, 3], "as many queries as classes"
    assert {row["variant"]["task"] for row in rows} == {"semantic"}
    assert "ablation on pictures" in path.with_suffix(".md").read_text()


def test_options_that_fit_nothing_are_named(tmp_path):
    for options, message in (
        ({"only": ["shapes"]}, "no comparison shapes"),
        ({"data": str(tmp_path / "nowhere")}, "nowhere is not a folder"),
        ({"structure": ["triangle"]}, "no structure triangle; there are per-pixel, per-pixel\\+, fixed, bipartite"),
        ({"model": "huge"}, "unknown model 'huge'"),
        (
            {"model": "segmenter-tiny"},
            "model is 'segmenter-tiny'; expected a preset of MaskFormer, Mask2Former or EoMT",
        ),
        ({"model": "eomt-tiny", "size": 36}, "image_size is 36; expected a multiple of patch_size 8"),
        ({"device": "tpu"}, "device must be cpu or cuda, got 'tpu'"),
        ({"pretrained": str(tmp_path / "weights")}, "weights is missing; benchmarks.ablations.backbone makes such"),
    ):
        with pytest.raises(typer.BadParameter, match=message):
            run_main(tmp_path / "x.json", **options)
    root = folder(tmp_path / "pictures")
    (root / "images/val/0.png").unlink()
    (root / "annotations/train/1.png").write_bytes(b"no picture")
    with pytest.raises(typer.BadParameter, match="1 fault in split 'train'") as refused:
        run_main(tmp_path / "x.json", data=str(root))
    assert "1.png" in str(refused.value)
    assert "0.png" in str(refused.value)


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


def test_a_run_that_diverged_is_named(bench, monkeypatch):
    step = Trainer.step

    def diverging(self, batches):
        return step(self, batches) | {"loss": torch.tensor(math.nan)}

    monkeypatch.setattr(Trainer, "step", diverging)
    row = bench.train(Run(A, 0))
    assert row["loss"] is None
    rows = make_rows(A, [0.1], loss=None, case=Run(A, 0).name)
    rows += make_rows(B, [None, 0.3])
    text = render({"machine": {"gpu": None, "cpu": "Some Processor"}, "rows": rows})
    assert "Diverged: per-pixel, 0 queries, 0 layers, semantic, seed 0." in text
    assert "| (b) per-pixel+ | 13 | 3 | semantic | 1.23 M | 1 | 30.0 |" in text


def test_committed_tables_are_those_of_the_committed_numbers():
    for path in (ROOT / "benchmarks/results").glob("ablation-*.json"):
        assert path.with_suffix(".md").read_text() == render(read_results(path)) + "\n"


def test_the_command_explains_itself():
    command = [sys.executable, "-m", "benchmarks.ablations", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--seeds" in done.stdout
