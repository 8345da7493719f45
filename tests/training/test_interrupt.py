"""Ctrl-C and SIGTERM, as a terminal or a scheduler sends them to all processes of the command."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest
import torch

from fastmask.models import load_model
from fastmask.training.step_checkpoints import load_newest
from fastmask.training.trainer import Trainer
from tests.helpers.training_runs import ForkedProcess, run_command, scene_folder, train_command


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return scene_folder(tmp_path_factory.mktemp("scenes"), 4, 1)


def arguments(scenes, folder, *options):
    """Of a run that would not end."""
    options = ("--data", scenes, "-o", folder, "--model", "tiny", "--steps", "100000", "--crop", "32", "32", *options)
    small = ("--batch-size", "2", "--val-split", "", "--set", "model.decoder_layers=1")
    return ("--log-every", "1", "--checkpoint-every", "2", *small, *options)


def start_a_step_without_end(*options):
    """``fastmask train`` whose first step says "in the step" and never ends."""
    return ForkedProcess(_train_without_end, ["fastmask", "train", *map(str, options)])


def _train_without_end(options):
    def step(trainer, batches):
        print("in the step", file=sys.stderr)
        while True:
            time.sleep(0.01)

    Trainer.step = step
    run_command(options)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_all_processes_saves_quietly_and_says_how_to_go_on(scenes, tmp_path, number, status):
    folder = tmp_path / "run"
    process = train_command(*arguments(scenes, folder, "--workers", "2"))
    process.read_until("step 2/")
    process.send(number)
    said = process.stderr.read()
    assert process.wait(60) == status
    assert "Traceback" not in said and "Error" not in said, said
    assert "interrupt again to stop at once" in said
    path, state = load_newest(folder / "checkpoints")
    step = state["trainer"]["steps"]
    assert f"stopped at step {step}; fastmask train --resume -o {folder} continues" in said
    assert (folder / "model" / "model.safetensors").is_file()

    process = train_command("-o", folder, "--resume", "--workers", "0")
    lines = process.read_until(f"step {step + 2}/")
    assert f"continuing from {path}\n" in lines
    assert lines[-2].startswith(f"step {step + 1}/")
    process.kill()


def test_a_second_ctrl_c_ends_at_once_and_harms_nothing(scenes, tmp_path):
    process = start_a_step_without_end(*arguments(scenes, tmp_path / "run", "--workers", "2"))
    process.read_until("in the step")
    process.send(signal.SIGINT)
    process.read_until("interrupt again to stop at once")
    process.send(signal.SIGINT)
    assert process.wait(60) == -signal.SIGINT
    assert load_newest(tmp_path / "run" / "checkpoints") is None


@pytest.mark.slow
def test_workers_do_not_outlive_the_command(scenes, tmp_path):
    # Batches of more than a pipe holds, so that workers wait for someone to read them.
    options = ("--workers", "2", "--set", "recipe.batch_size=256")
    process = start_a_step_without_end(*arguments(scenes, tmp_path / "run", *options))
    process.read_until("in the step")
    time.sleep(1)  # in which they fill the pipes, as a rule; whenever it comes, none may stay
    process.kill()
    for _ in range(300):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.2)
    else:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError("workers are still there")


def test_a_signal_in_the_middle_leaves_the_model_and_the_checkpoint_of_one_step(scenes, tmp_path):
    process = train_command(*arguments(scenes, tmp_path / "run", "--workers", "0"))
    process.read_until("step 1/")
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(60) == 130
    _, state = load_newest(tmp_path / "run" / "checkpoints")
    model = load_model(tmp_path / "run").state_dict()
    assert all(torch.equal(model[name], value) for name, value in state["trainer"]["model"].items())
