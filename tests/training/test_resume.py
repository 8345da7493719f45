"""A run that is interrupted and continued is the run that was not, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file

from fastmask.data import open_dataset, write_shards
from fastmask.models import load_model
from fastmask.training import make_training_config, train
from fastmask.training.run_folder import MetricsFile, RunFolder
from fastmask.training.trainer import Trainer
from tests.helpers.training_runs import scene_folder, tiny_config, train_command

MEASURED_ANEW = ("images_per_second", "memory")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return scene_folder(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def config(scenes):
    return tiny_config(scenes, workers=0, log_every=2, eval_every=3, checkpoint_every=2, recipe={"ema": 0.5})


@pytest.fixture(scope="module")
def uninterrupted(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    train(config, folder)
    return folder


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    """Pictures take longer than these runs."""
    monkeypatch.setattr("fastmask.training.runner.draw_curves", lambda *_: None)


@contextmanager
def signal_in_step(step, number=signal.SIGINT):
    """A signal arrives in the middle of a step."""
    take_step = Trainer.step

    def interrupted(trainer, batches):
        if trainer.steps == step - 1:
            os.kill(os.getpid(), number)
        return take_step(trainer, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        yield


def weights(folder, name="model"):
    return load_file(folder / name / "model.safetensors")


def assert_same_run(folder, expected):
    """Weights and records are equal, except for time and memory; no step is recorded twice."""
    for name in ("model", "best"):
        ours, theirs = weights(folder, name), weights(expected, name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name
    ours, theirs = (MetricsFile(path / "metrics.jsonl").read() for path in (folder, expected))
    for record in ours + theirs:
        for name in MEASURED_ANEW:
            record.pop(name, None)
    assert ours == theirs
    assert len({(record["step"], "evaluation" in record) for record in ours}) == len(ours)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("stop", [pytest.param(3, marks=pytest.mark.slow), 5])
def test_interrupted_and_resumed_equals_uninterrupted(config, uninterrupted, tmp_path, workers, stop):
    config = config.replace(workers=workers)
    with signal_in_step(stop), pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run")
    assert load_model(tmp_path / "run" / "model") is not None
    assert not (tmp_path / "run" / "result.json").exists()
    result = train(None, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", uninterrupted)
    assert (result.folder, result.best) == (tmp_path / "run", tmp_path / "run" / "best")


@pytest.mark.parametrize(
    ("model", "annealing"),
    [
        pytest.param("mask2former-tiny", {}, marks=pytest.mark.slow),
        ("eomt-tiny", {"anneal_starts": (0, 0.25), "anneal_ends": (0.5, 1)}),
    ],
)
def test_random_points_and_masks_continue(scenes, tmp_path, model, annealing):
    recipe = tiny_config(scenes, steps=4, recipe=annealing).recipe
    options = {"workers": 0, "log_every": 2, "eval_every": 2, "checkpoint_every": 2}
    config = make_training_config(scenes, model, recipe, model_fields={"num_points": 64}, **options)
    train(config, tmp_path / "whole")
    with signal_in_step(3), pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run")
    train(None, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.slow
def test_shards_continue_with_the_same_samples(scenes, tmp_path, workers):
    for split in ("train", "val"):
        write_shards(open_dataset(scenes, split), tmp_path / "shards", samples_per_shard=3)
    config = tiny_config(f"{tmp_path}/shards/*.tar", workers=workers, log_every=2, eval_every=3)
    train(config, tmp_path / "whole")
    with signal_in_step(4), pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run")
    train(None, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_sigterm_saves_too(config, tmp_path, uninterrupted):
    before = signal.getsignal(signal.SIGTERM)
    with signal_in_step(1, signal.SIGTERM), pytest.raises(SystemExit) as exit_status:
        train(config, tmp_path / "run")
    assert exit_status.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before
    train(config, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", uninterrupted)


def test_same_configuration_same_run_other_seed_other_run(config, uninterrupted, tmp_path):
    train(config, tmp_path / "again")
    assert_same_run(tmp_path / "again", uninterrupted)
    train(config.replace(seed=1), tmp_path / "other")
    ours, theirs = weights(tmp_path / "other"), weights(uninterrupted)
    assert any(not torch.equal(ours[name], theirs[name]) for name in theirs)


def test_evaluation_changes_nothing(config, uninterrupted, tmp_path):
    train(config.replace(val_split="", log_every=1), tmp_path / "run")
    ours, theirs = weights(tmp_path / "run"), weights(uninterrupted)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not (tmp_path / "run" / "best").exists()


def test_accumulation_takes_the_same_samples_and_may_change(config, tmp_path):
    config = config.replace(accumulate=2)
    with signal_in_step(2), pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run")
    result = train(config.replace(accumulate=1, log_every=1), tmp_path / "run", resume=True)
    assert result.evaluation
    assert [record["step"] for record in MetricsFile(tmp_path / "run" / "metrics.jsonl").read()] == [
        2,
        3,
        3,
        4,
        5,
        6,
        6,
    ]


def test_killed_before_the_first_checkpoint_begins_again(config, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    train(None, folder, resume=True)
    assert_same_run(folder, uninterrupted)


def test_killed_between_the_last_checkpoint_and_its_evaluation(config, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    train(config, folder)
    (folder / "result.json").unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert "evaluation" in lines[-1]
    (folder / "metrics.jsonl").write_text("".join(lines[:-1]))
    (folder / "checkpoints" / "step-00000009.pt.tmp").write_bytes(b"half")
    result = train(None, folder, resume=True)
    assert_same_run(folder, uninterrupted)
    assert result.evaluation == json.loads(lines[-1])["evaluation"]
    assert not list(folder.rglob("*.tmp"))


def test_a_finished_run_says_so(config, uninterrupted, caplog):
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*") if path.is_file()}
    result = train(config, uninterrupted, resume=True)
    assert "this run has finished" in caplog.text
    assert result.best_step in (3, 6)
    assert before == {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*") if path.is_file()}


def test_another_configuration_is_refused_by_field(config, uninterrupted):
    recipe = config.recipe.replace(steps=8, learning_rate=1.0)
    other = config.replace(recipe=recipe, seed=3, workers=1, model=config.model.replace(dropout=0.0))
    with pytest.raises(ValueError, match=r"differs in model.dropout, recipe.learning_rate, recipe.steps, seed\."):
        train(other, uninterrupted, resume=True)


def test_a_used_folder_is_refused_and_left_alone(config, uninterrupted, tmp_path):
    with pytest.raises(FileExistsError, match="already holds a run; --resume continues it"):
        train(config, uninterrupted)
    (tmp_path / "thesis.tex").write_text("all of it")
    with pytest.raises(FileExistsError, match="already exists and is not empty"):
        train(config, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(FileNotFoundError, match="has no run to resume"):
        train(config, tmp_path, resume=True)
    with pytest.raises(TypeError, match="config is needed"):
        train(None, tmp_path / "run")


def test_a_damaged_checkpoint_is_passed_over(config, uninterrupted, tmp_path, caplog):
    folder = tmp_path / "run"
    with signal_in_step(5), pytest.raises(KeyboardInterrupt):
        train(config, folder)
    *_, before, newest = sorted((folder / "checkpoints").iterdir())
    content = newest.read_bytes()
    newest.write_bytes(content[: len(content) // 2])
    train(None, folder, resume=True)
    assert f"{newest} is damaged" in caplog.text
    assert f"continuing from {before}" in caplog.text
    assert_same_run(folder, uninterrupted)


def test_resumed_from_another_place_and_with_other_data(scenes, tmp_path, monkeypatch):
    data = shutil.copytree(scenes, tmp_path / "zwei Szenen, größer")
    monkeypatch.chdir(tmp_path)
    config = tiny_config(data.name, steps=2, workers=0, val_split="", checkpoint_every=1)
    train(config, "run")
    for path in (tmp_path / "run/result.json", tmp_path / "run/checkpoints/step-00000002.pt"):
        path.unlink()
    monkeypatch.chdir("/")
    for kind in ("images", "annotations"):
        (data / kind / "train/000.png").rename(tmp_path / f"{kind}.png")
    with pytest.raises(ValueError, match="has 6 samples to train on; the run began with 7"):
        train(None, tmp_path / "run", resume=True)
    for kind in ("images", "annotations"):
        (tmp_path / f"{kind}.png").rename(data / kind / "train/000.png")
    train(None, tmp_path / "run", resume=True)


def test_two_processes_do_not_train_in_one_folder(config, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    (tmp_path / "run/result.json").unlink()
    held = RunFolder(tmp_path / "run")
    held.lock()
    other = train_command("-o", tmp_path / "run", "--resume", "--device", "cpu")
    other.read_until("is in use: another process trains in it")
    assert other.wait(60) == 1
    held.close()
    train(None, tmp_path / "run", resume=True, device="cpu")


def test_a_run_that_began_meanwhile_is_left_alone(config, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    before = (tmp_path / "run/config.json").read_bytes()
    with pytest.raises(FileExistsError, match="has just begun"):
        RunFolder(tmp_path / "run").create(config.replace(seed=5))
    assert (tmp_path / "run/config.json").read_bytes() == before
