"""The ablation: its plan, networks and runs, short ones from end to end."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import typer
from safetensors.torch import load_file

from benchmarks.ablations import __main__ as ablation
from benchmarks.ablations import backbone, images, sounds, training
from benchmarks.ablations.findings import image_findings
from benchmarks.ablations.groups import groups_of
from benchmarks.ablations.naming import ThingNames
from benchmarks.ablations.tables import render
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
from tests.helpers.ablation_rows import D13, ROOT, SCENES, A, B, make_rows
from tests.helpers.dataset_trees import blocks, write_image, write_json, write_labels

CPU = torch.device("cpu")
CLIPS = Settings("composed:clips", "tiny", "", 1, 4, 2, 2, (1e-3,))
SHORT = {"steps": 1, "size": 32, "batch_size": 2, "val_samples": 3, "queries": [5, 13], "layers": [1, 3]}


@pytest.fixture(scope="module")
def bench():
    return Bench(SCENES, CLIPS, CPU)


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


def test_masked_attention_is_that_of_mask_classification(bench):
    masked = Bench(replace(SCENES, masked_attention=True), bench.sound_settings, bench.device)
    networks = {v.structure: masked.trainer(Run(v, 0)).model for v in masked.comparisons([5], [1])["structures"]}
    assert all(networks[structure].config.masked_attention for structure in (FIXED, BIPARTITE))
    plain = bench.trainer(Run(Variant(PER_PIXEL_PLUS, 13, 3), 0)).model
    assert networks[PER_PIXEL_PLUS].config == plain.config


def test_a_run_is_the_same_each_time(bench):
    first, second = (bench.train(Run(Variant(BIPARTITE, 5, 1), 3)) for _ in range(2))
    assert first | {"seconds": 0} == second | {"seconds": 0}
    assert np.array(first["query_classes"]).shape == (5, 13)


@pytest.mark.parametrize("run", [Run(Variant(BIPARTITE, 5, 1), 3), Run(Variant(PRESENCE, 10, 1, "events"), 3)])
def test_a_run_continues_from_its_checkpoint_with_the_same_result(run, bench, tmp_path, monkeypatch):
    def interrupt(step, loss):
        if step == 2:
            raise KeyboardInterrupt

    whole, steps = bench.train(run), []
    monkeypatch.setattr(training, "CHECKPOINT_EVERY", 1)
    with pytest.raises(KeyboardInterrupt):
        bench.train(run, interrupt, tmp_path)
    continued = bench.train(run, lambda step, loss: steps.append(step), tmp_path)
    assert steps == list(range(2, bench.settings_of(run).steps + 1))
    assert continued | {"seconds": 0} == whole | {"seconds": 0}


def test_a_network_that_knows_the_truth_scores_one(bench):
    batches = list(images.validation_batches(SCENES, "semantic", 0))
    labels = iter([found for _, targets in batches for found in targets.class_map(12)])
    network = SimpleNamespace(
        config=SimpleNamespace(num_classes=13),
        device=torch.device("cpu"),
        eval=lambda: None,
        predict=lambda pixels: [next(labels) for _ in pixels],
    )
    metrics, queries = images.evaluate_images(network, batches, A, (10, 11, 12))
    assert metrics == {"mIoU": 1, "PQ_st": 1, "found": 1, "named": 1}
    assert queries is None


def test_things_are_found_and_named():
    """Classes 3 and 4 are stuff, 255 is void. Half of thing 0 is found, as 1; thing 2 is found, and most of it as 2."""
    names = ThingNames(5, (3, 4))
    truth = torch.tensor([[0, 0, 0, 0, 255], [2, 2, 2, 3, 3]])
    names.update(torch.tensor([[1, 1, 3, 255, 0], [2, 2, 1, 2, 3]], dtype=torch.uint8), truth)
    assert names.compute() == {"found": 5 / 7, "named": 1 / 2}
    names.update(torch.full((2, 2), 3), torch.tensor([[0, 0], [255, 3]]))  # nothing is found
    assert names.compute() == {"found": 5 / 9, "named": 1 / 2}
    assert ThingNames(2, (0, 1)).compute() == {}


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

    def stopped(self, run, *options):
        if len(trained) == 1:
            raise KeyboardInterrupt
        trained.append(run.name)
        return train(self, run, *options)

    monkeypatch.setattr(Bench, "train", stopped)
    with pytest.raises(typer.Exit) as ended:
        run_main(path, only=["structures"], seeds=1)
    assert ended.value.exit_code == 130
    assert "continues" in capsys.readouterr().out
    assert [row["case"] for row in read_results(path)["rows"]] == trained

    def continued(self, run, *options):
        trained.append(run.name)
        return train(self, run, *options)

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

    def pretended(self, run, *options):
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
        (
            {"model": "mask2former-tiny", "masked_attention": True},
            "masked_attention is True for model 'mask2former-tiny'; expected a preset of MaskFormer",
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


def test_the_command_explains_itself():
    command = [sys.executable, "-m", "benchmarks.ablations", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--seeds" in done.stdout
