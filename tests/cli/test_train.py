"""``fastmask train``: what its options become, and what it says to wrong ones."""

from __future__ import annotations

import json
import sys

import pytest
from typer.testing import CliRunner

from fastmask import training
from fastmask.cli.main import app, main
from fastmask.models import load_model
from fastmask.training import Recipe, TrainingConfig
from tests.helpers.dataset_trees import instance_tree
from tests.helpers.training_runs import scene_folder

TINY = ("--model", "tiny", "--steps", "2", "--batch-size", "2", "--crop", "32", "48", "--workers", "0")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return scene_folder(tmp_path_factory.mktemp("scenes"), 3, 1)


@pytest.fixture
def asked(monkeypatch):
    """What the command asks the library for, without any training."""
    calls = []
    monkeypatch.setattr(training, "train", lambda config, output, **options: calls.append((config, output, options)))
    return calls


def invoke(*options):
    return CliRunner().invoke(app, ["train", *map(str, options)], catch_exceptions=False)


def said_to_stderr(capsys, monkeypatch, *options):
    """The line with which the command ends."""
    monkeypatch.setattr(sys, "argv", ["fastmask", "train", *map(str, options)])
    with pytest.raises(SystemExit) as exit_status:
        main()
    assert exit_status.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("fastmask: ")
    return said


def test_options_become_the_configuration(scenes, tmp_path, asked):
    options = ["--precision", "bfloat16", "--accumulate", "2", "--seed", "3", "--eval-every", "7", "--val-split", ""]
    options += ["--checkpoint-every", "9", "--log-every", "4", "--strategy", "fsdp", "--activation-checkpointing"]
    options += ["--lr", "0.002", "--set", "model.num_queries=7", "--set", "recipe.schedule=constant", "--device", "cpu"]
    assert invoke("--data", scenes, "-o", tmp_path / "run", *TINY, *options).exit_code == 0
    ((config, output, others),) = asked
    assert (output, others) == (tmp_path / "run", {"resume": False, "device": "cpu"})
    recipe = config.recipe
    assert (recipe.steps, recipe.batch_size, recipe.crop, recipe.short_side) == (2, 2, (32, 48), 32)
    assert (recipe.learning_rate, recipe.schedule, config.model.num_queries) == (0.002, "constant", 7)
    assert (config.precision, config.accumulate, config.seed, config.workers) == ("bfloat16", 2, 3, 0)
    assert (config.eval_every, config.checkpoint_every, config.log_every) == (7, 9, 4)
    assert (config.val_split, config.strategy, config.activation_checkpointing) == ("", "fsdp", True)


@pytest.mark.parametrize(
    ("model", "preset"),
    [
        ("maskformer-r50", "maskformer-ade20k"),
        ("maskformer-swin-tiny", "maskformer-ade20k-swin"),
        ("segmenter-tiny", "segmenter-ade20k"),
        ("mask2former-r50", "mask2former-ade20k"),
        ("mask2former-swin-large", "mask2former-ade20k-640"),
        ("mask2former-tiny", "finetune"),
        ("eomt-dinov3-large", "eomt-dinov3-ade20k"),
        ("eomt-dinov2-small", "eomt-coco-2x"),
        ("eomt-tiny", "finetune"),
        ("tiny", "finetune"),
        ("maskformer-efficientnet-lite0", "finetune"),
    ],
)
def test_every_network_has_the_recipe_of_its_paper(scenes, tmp_path, asked, model, preset):
    invoke("--data", scenes, "-o", tmp_path, "--model", model)
    invoke("--data", scenes, "-o", tmp_path, "--model", model, "--recipe", "maskformer-cityscapes")
    assert [call[0].recipe for call in asked] == [Recipe.preset(preset), Recipe.preset("maskformer-cityscapes")]


def test_a_short_run_has_a_short_warmup_unless_it_is_set(scenes, tmp_path, asked):
    options = ["--data", scenes, "-o", tmp_path, "--model", "maskformer-swin-tiny"]
    invoke(*options, "--steps", "100")
    invoke(*options, "--steps", "100", "--set", "recipe.warmup_steps=30")
    invoke(*options, "--steps", "90000")
    assert [(call[0].recipe.steps, call[0].recipe.warmup_steps) for call in asked] == [
        (100, 10),
        (100, 30),
        (90_000, 1500),
    ]


def test_an_eomt_is_trained_annealed_and_resumed(scenes, tmp_path):
    fields = ("model.num_points=256", "recipe.anneal_starts=[0,0.25]", "recipe.anneal_ends=[0.5,1]")
    fields = [part for field in (*fields, "recipe.layer_decay=0.8") for part in ("--set", field)]
    options = ("--data", scenes, "-o", tmp_path / "run", *TINY, "--model", "eomt-tiny", "--steps", 4, *fields)
    assert invoke(*options).exit_code == 0
    assert load_model(tmp_path / "run" / "model").config.mask_probabilities == (0, 0)
    assert invoke("-o", tmp_path / "run", "--resume").exit_code == 0


def test_options_override_a_file(scenes, tmp_path, asked):
    invoke("--data", scenes, "-o", tmp_path / "run", *TINY, "--seed", "5")
    asked[0][0].save(tmp_path / "config.json")
    invoke("--config", tmp_path / "config.json", "-o", tmp_path / "run")
    invoke("--config", tmp_path / "config.json", "-o", tmp_path / "run", "--steps", "3", "--model", "per-pixel-tiny")
    (first, *_), (same, *_), (other, *_) = asked
    assert same == first
    assert other.recipe == first.recipe.replace(steps=3)
    assert other.model.class_names == first.model.class_names
    assert (type(other.model).__name__, other.seed) == ("PerPixelBaselineConfig", 5)


def test_train_resume_and_begin_again(scenes, tmp_path, capsys, monkeypatch):
    assert invoke("--data", scenes, "-o", tmp_path / "run", *TINY).exit_code == 0
    assert load_model(tmp_path / "run").config.num_classes == 13
    config = TrainingConfig.load(tmp_path / "run" / "config.json")
    assert (config.data, config.recipe.steps) == (str(scenes), 2)
    assert invoke("-o", tmp_path / "run", "--resume", "--workers", 1).exit_code == 0
    run = ("-o", tmp_path / "run")
    said = said_to_stderr(capsys, monkeypatch, *run, "--resume", "--steps", 9, "--set", "model.num_queries=3")
    assert "differs in model.num_queries, recipe.steps" in said
    assert "already holds a run" in said_to_stderr(capsys, monkeypatch, "--data", scenes, *run, *TINY)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-o", "run"], "--data is missing"),
        (["-o", "run", "--resume"], "run has no run to resume"),
        (["-o", "run", "--data", "nowhere", "--model", "tiny"], "nowhere is not a folder"),
        (["-o", "run", "--data", "SCENES"], "--model is missing"),
        (["-o", "run", "--data", "SCENES", "--model", "huge"], "unknown model 'huge'; known are"),
        (["-o", "run", "--data", "SCENES", *TINY, "--recipe", "cake"], "unknown preset 'cake'; known are"),
        (["-o", "run", "--data", "SCENES", *TINY, "--set", "recipe.cake=1"], "--set recipe.cake=1: expected KEY=VALUE"),
        (["-o", "run", "--data", "SCENES", *TINY, "--set", "recipe.steps"], "--set recipe.steps: expected KEY=VALUE"),
        (["-o", "run", "--data", "SCENES", *TINY, "--set", "recipe.steps=many"], "steps must be of type int"),
        (["-o", "run", "--data", "SCENES", *TINY, "--task", "panoptic"], "panoptic"),
        (["-o", "run", "--data", "SCENES", *TINY, "--val-split", "test"], "test"),
        (["-o", "run", "--data", "SCENES", *TINY, "--config", "no.json"], "no.json"),
        (["-o", "run", "--data", "SCENES", *TINY, "--pretrained", "nothing"], "/nothing"),
        (["-o", "run", "--data", "SCENES", *TINY, "--device", "gpu"], "device='gpu' cannot be used"),
        (["-o", "run", "--data", "SCENES", *TINY, "--device", "cuda:99"], "device='cuda:99' cannot be used"),
        (["-o", "run", "--data", "SCENES", *TINY, "--accumulate", "2", "--batch-size", "3"], "accumulate is 2"),
    ],
)
def test_wrong_options_end_with_one_line(scenes, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    said = said_to_stderr(capsys, monkeypatch, *(scenes if option == "SCENES" else option for option in options))
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_invalid_polygons_are_skipped_if_asked(tmp_path, asked):
    pytest.importorskip("pycocotools")
    data = instance_tree(tmp_path / "data")
    for options in ([], ["--skip-invalid"]):
        assert invoke("--data", data, "-o", tmp_path / "run", *TINY, *options).exit_code == 0
    assert [config.skip_invalid for config, _, _ in asked] == [False, True]


def test_settings_reach_fields_within_options_of_a_backbone(scenes, tmp_path, asked):
    invoke("--data", scenes, "-o", tmp_path, *TINY, "--set", 'model.backbone_options={"depths": [1, 1, 1]}')
    assert json.dumps(asked[0][0].model.backbone_options) == '{"depths": [1, 1, 1]}'
