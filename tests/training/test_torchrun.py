"""A run in two processes is that of one: by either strategy, under torchrun, and continued by more or fewer."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from fastmask.training import Recipe, make_training_config, train
from fastmask.training.run_folder import MetricsFile
from fastmask.training.trainer import Trainer
from tests.helpers.interrupted_training import STEP
from tests.helpers.shared_batches import fork_together, torchrun
from tests.helpers.training_runs import scene_folder

STEPS = 5


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Without batch norm, whose statistics are each process's own, and with an optimizer that is linear in gradients:
    where they are 0 but for rounding, Adam would make steps of that."""
    recipe = Recipe(
        optimizer="sgd",
        learning_rate=0.01,
        ema=0.5,
        steps=STEPS,
        batch_size=4,
        crop=(48, 64),
        short_side=64,
        max_side=256,
    )
    scenes = scene_folder(tmp_path_factory.mktemp("scenes"), val=5)
    options = {"workers": 0, "log_every": 1, "checkpoint_every": 100}
    return make_training_config(scenes, "segmenter-tiny", recipe, model_fields={"dropout": 0.0}, **options)


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    """The folder of the run in one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    train(config, folder, device="cpu")
    return folder


def fastmask(folder, *options, module="fastmask.cli.main"):
    return torchrun("-m", module, "train", "-o", str(folder), "--device", "cpu", *options)


def resume(folder):
    train(None, folder, resume=True, device="cpu")


def assert_same_run(folder, alone):
    """Weights, losses and evaluation, to rounding."""
    for name in ("model", "best"):
        ours, theirs = (load_file(one / name / "model.safetensors") for one in (folder, alone))
        assert ours.keys() == theirs.keys()
        for key, weight in theirs.items():
            torch.testing.assert_close(ours[key], weight, rtol=1e-4, atol=1e-6, msg=key)
    ours, theirs = (MetricsFile(one / "metrics.jsonl").read() for one in (folder, alone))
    assert [record["step"] for record in ours] == [record["step"] for record in theirs]
    for found, expected in zip(ours, theirs, strict=True):
        assert found.keys() == expected.keys()
        for name in {"loss", "loss_ce", "gradient_norm"} & expected.keys():
            assert found[name] == pytest.approx(expected[name], rel=1e-4)
    found, expected = (json.loads((one / "result.json").read_text()) for one in (folder, alone))
    assert found["evaluation"] == pytest.approx(expected["evaluation"], abs=1e-3, nan_ok=True)
    assert 0 < expected["evaluation"]["mIoU"] < 1


@pytest.mark.slow
def test_interrupted_in_two_processes_and_continued_in_one(config, alone, tmp_path):
    folder = tmp_path / "run"
    config.replace(strategy="fsdp", activation_checkpointing=True).save(tmp_path / "config.json")
    stopped = fastmask(folder, "--config", str(tmp_path / "config.json"), module="tests.helpers.interrupted_training")
    assert stopped.returncode != 0
    assert f"stopped at step {STEP}" in stopped.stderr + stopped.stdout, stopped.stderr
    assert not (folder / "result.json").exists()
    train(None, folder, resume=True, device="cpu")
    assert_same_run(folder, alone)


def test_interrupted_in_one_process_and_continued_in_two(config, alone, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    take_step = Trainer.step

    def interrupted(trainer, batches):
        if trainer.steps == STEP - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return take_step(trainer, batches)

    monkeypatch.setattr(Trainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(config, folder, device="cpu")
    monkeypatch.undo()
    fork_together(resume, folder)
    assert_same_run(folder, alone)
