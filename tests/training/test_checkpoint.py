"""Checkpoints survive whatever happens while they are written, and are read only if they are whole."""

from __future__ import annotations

import random
import resource
import sys
import time
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch

from fastmask.models import MaskFormer, MaskFormerConfig, load_model
from fastmask.training import train
from fastmask.training.random_state import random_state, seed_all, set_random_state
from fastmask.training.step_checkpoints import load_newest, remove_temporary, save_checkpoint
from tests.helpers.training_runs import ForkedProcess, scene_folder, tiny_config


def state_of(step: int, size: int = 1 << 20) -> dict:
    """Something that says in each of its parts which step it is of."""
    tensors = {name: torch.from_numpy(np.full(size, step, np.float32)) for name in ("weights", "moments")}
    return {"trainer": {**tensors, "steps": step}, "random": [random_state()], "losses": [{"loss": float(step)}]}


def step_of(state: dict) -> int:
    """The step of a state that is all of one piece."""
    step = state["trainer"]["steps"]
    assert all(
        torch.equal(state["trainer"][name], torch.full((1 << 20,), float(step))) for name in ("weights", "moments")
    )
    assert state["losses"] == [{"loss": float(step)}]
    return step


def test_the_latest_two_are_kept_and_the_newest_is_loaded(tmp_path):
    folder = tmp_path / "checkpoints"
    assert load_newest(folder) is None
    for step in (8, 9, 10, 100_000_001):
        assert save_checkpoint(folder, step, state_of(step)).is_file()
    assert len(list(folder.iterdir())) == 2
    path, state = load_newest(folder)
    assert path.name == "step-100000001.pt"
    assert step_of(state) == 100_000_001


def test_random_generators_continue_after_a_checkpoint(tmp_path):
    def draws():
        return random.random(), np.random.rand(), torch.rand(3).tolist()  # noqa: NPY002

    seed_all(5)
    draws()
    save_checkpoint(tmp_path, 1, {"random": random_state()})
    expected = draws()
    seed_all(6)
    assert draws() != expected
    set_random_state(load_newest(tmp_path)[1]["random"])
    assert draws() == expected


def keep_saving(folder):
    remove_temporary(folder)
    newest = load_newest(folder)
    step = 0 if newest is None else step_of(newest[1])
    while True:
        step += 1
        save_checkpoint(folder, step, state_of(step))
        print("saved", file=sys.stderr)


@pytest.mark.slow
def test_killed_at_any_moment_of_saving_the_newest_checkpoint_is_whole(tmp_path):
    generator = random.Random(1)
    torn, reached = 0, 0
    for _ in range(30):
        process = ForkedProcess(keep_saving, tmp_path)
        process.read_until("saved")
        process.wait(generator.uniform(0, 0.1))
        process.kill()
        torn += any(path.suffix == ".tmp" for path in tmp_path.iterdir())
        newest = load_newest(tmp_path)
        if newest is not None:
            assert step_of(newest[1]) >= reached
            reached = step_of(newest[1])
    assert reached > 5
    assert torn > 3  # the kills did hit


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_arrives_where_it_would_have(tmp_path):
    data = scene_folder(tmp_path / "data", 5, 2)
    config = tiny_config(data, 6, workers=0, log_every=3, eval_every=3, checkpoint_every=1)
    through, folder = tmp_path / "through", tmp_path / "killed"
    assert ForkedProcess(train, config, through).wait() == 0
    generator = random.Random(2)
    kills = 0
    while True:
        process = ForkedProcess(partial(train, config, folder, resume=(folder / "config.json").exists()))
        begun = set(folder.rglob("*.pt"))
        while process.running and set(folder.rglob("*.pt")) == begun:
            time.sleep(0.001)
        if (status := process.wait(generator.uniform(0, 0.15))) is not None:
            break
        kills += 1
        process.kill()
        newest = load_newest(folder / "checkpoints")
        if newest is not None:
            assert newest[1]["trainer"]["steps"] == int(newest[0].stem.removeprefix("step-"))
    assert status == 0
    assert kills >= 3
    ours, theirs = (load_model(path / "model").state_dict() for path in (folder, through))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    score = "best/evaluation.json"
    assert (folder / score).read_text() == (through / score).read_text()


@pytest.mark.parametrize("damage", ["cut", "empty", "zeros", "changed", "foreign"])
def test_a_damaged_checkpoint_is_never_used(tmp_path, damage, caplog):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, state_of(step))
    _, newest = sorted(tmp_path.iterdir())
    content = bytearray(newest.read_bytes())
    if damage == "cut":
        del content[len(content) * 9 // 10 :]
    elif damage == "empty":
        content.clear()
    elif damage == "zeros":  # as some file systems leave a file after a power cut
        content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    elif damage == "changed":
        content[len(content) // 2] ^= 4
    if damage == "foreign":
        torch.save({"weights": object}, newest)
    else:
        newest.write_bytes(content)
    path, state = load_newest(tmp_path)
    assert path.name == "step-00000001.pt"
    assert step_of(state) == 1
    assert f"{newest} is damaged" in caplog.text
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"every checkpoint is damaged: .*step-00000001.pt, .*step-00000002.pt"):
        load_newest(tmp_path)


@contextmanager
def full_disk(size: int):
    """No file can grow beyond a size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    with full_disk(1_000_000), pytest.raises(OSError, match=r"step-00000001.pt: File too large; there is no earlier"):
        save_checkpoint(tmp_path, 1, state_of(1))
    save_checkpoint(tmp_path, 2, state_of(2))
    with full_disk(1_000_000), pytest.raises(OSError, match=r"step-00000003.pt: .*step-00000002.pt is there to resume"):
        save_checkpoint(tmp_path, 3, state_of(3))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002.pt"]
    assert step_of(load_newest(tmp_path)[1]) == 2


def test_a_full_disk_leaves_the_network_before(tmp_path):
    model = MaskFormer(MaskFormerConfig.preset("tiny", 2))
    model.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    with full_disk(1_000_000), pytest.raises(OSError, match="cannot write .*File too large"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 3


def test_a_run_on_a_full_disk_ends_with_an_error_and_can_go_on(tmp_path):
    config = tiny_config(scene_folder(tmp_path / "data", 3, 1), 3, workers=0, checkpoint_every=1, val_split="")
    with full_disk(1_000_000), pytest.raises(OSError, match="step-00000001.pt: File too large"):
        train(config, tmp_path / "run")
    train(None, tmp_path / "run", resume=True)
    train(config, tmp_path / "other")
    ours, theirs = (load_model(tmp_path / name / "model").state_dict() for name in ("run", "other"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
