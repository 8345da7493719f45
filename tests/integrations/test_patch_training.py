"""transformers' Trainer with a patched model, in two processes under accelerate."""

from __future__ import annotations

import functools

import pytest
import torch

from tests.helpers import patched_training
from tests.helpers.patched_training import STEPS
from tests.helpers.shared_batches import PROCESSES, fork_together


@pytest.fixture(scope="module")
def seen(made_once):
    """What tests/helpers/patched_training.py saw."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        folder = made_once("patched training", functools.partial(fork_together, patched_training.main))
    result = torch.load(folder / "seen.pt")
    assert result["processes"] == PROCESSES
    return result


def test_the_trainer_sees_the_same_losses(seen):
    assert len(seen["plain"]["curve"]) == STEPS
    assert seen["patched"]["curve"] == pytest.approx(seen["plain"]["curve"], rel=1e-4)
    assert seen["patched"]["curve"][0] == pytest.approx(seen["plain"]["curve"][0], rel=1e-5)


def test_the_criterion_gives_the_same_losses(seen):
    assert seen["patched"]["losses"] == pytest.approx(seen["plain"]["losses"], rel=1e-5)


def test_the_fix_divides_by_the_targets_of_the_average_process(seen):
    """transformers' mask and dice losses grow with the number of processes; the classification loss does not."""
    for name, loss in seen["plain"]["losses"].items():
        factor = 1 if "cross_entropy" in name else PROCESSES
        assert factor * seen["fixed"]["losses"][name] == pytest.approx(loss, rel=1e-5)
