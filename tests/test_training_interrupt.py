"""Ctrl-C and SIGTERM, as a terminal or a scheduler sends them to all processes of the command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from fastmask.training.checkpoint import load_newest
from tests.training_runs import scene_folder


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return scene_folder(tmp_path_factory.mktemp("scenes"), 4, 1)


def start(*options, steps=100_000):
    """The command in a group of processes of its own; what it says goes to a pipe."""
    command = [sys.executable, "-m", "fastmask.cli.main", "train", *map(str, options)]
    if "--resume" not in options:
        command += ["--model", "tiny", "--steps", str(steps), "--batch-size", "2", "--crop", "32", "32"]
        command += ["--log-every", "1", "--checkpoint-every", "2", "--val-split", "", "--set", "model.decoder_layers=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)


def read_until(process, text):
    """The lines up to one with this text."""
    lines = []
    for line in process.stderr:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError(f"{text!r} was never said:\n{''.join(lines)}")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_all_processes_saves_quietly_and_says_how_to_go_on(scenes, tmp_path, number, status):
    folder = tmp_path / "run"
    process = start("--data", scenes, "-o", folder, "--workers", "2")
    read_until(process, "step 2/")
    os.killpg(process.pid, number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == status
    assert "Traceback" not in said and "Error" not in said, said
    assert "once more to stop at once" in said
    path, state = load_newest(folder / "checkpoints")
    step = state["trainer"]["steps"]
    assert f"stopped at step {step}; fastmask train --resume -o {folder} continues" in said
    assert (folder / "model" / "model.safetensors").is_file()

    process = start("-o", folder, "--resume", "--workers", "0")
    lines = read_until(process, f"step {step + 2}/")
    assert f"continuing from {path}\n" in lines
    assert lines[-2].startswith(f"step {step + 1}/")
    process.kill()
    process.communicate()


def test_a_second_ctrl_c_ends_at_once_and_harms_nothing(scenes, tmp_path):
    process = start("--data", scenes, "-o", tmp_path / "run", "--workers", "2", "--set", "recipe.batch_size=512")
    read_until(process, "million parameters")
    time.sleep(1)  # somewhere in the first step, which takes long
    os.killpg(process.pid, signal.SIGINT)
    read_until(process, "once more to stop at once")
    begun = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == -signal.SIGINT
    assert time.monotonic() - begun < 5
    assert load_newest(tmp_path / "run" / "checkpoints") is None
    process.stderr.close()


def test_workers_do_not_outlive_the_command(scenes, tmp_path):
    process = start("--data", scenes, "-o", tmp_path / "run", "--workers", "2")
    read_until(process, "step 1/")
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.2)
    else:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError("workers are still there")
    process.stderr.close()


def test_a_signal_in_the_middle_leaves_the_model_and_the_checkpoint_of_one_step(scenes, tmp_path):
    from fastmask.models import load_model

    process = start("--data", scenes, "-o", tmp_path / "run", "--workers", "0")
    read_until(process, "step 1/")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    _, state = load_newest(tmp_path / "run" / "checkpoints")
    model = load_model(tmp_path / "run").state_dict()
    assert all(torch.equal(model[name], value) for name, value in state["trainer"]["model"].items())
