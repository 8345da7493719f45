"""Two processes train as one with the joined batch, by either strategy; their state goes from one to another."""

from __future__ import annotations

import functools

import pytest
import torch

from fastmask.training import distributed
from tests.helpers import two_processes
from tests.helpers.original_criteria import make_criterion, random_inputs
from tests.helpers.shared_batches import CASES, PROCESSES, ROOT, fork_together, torchrun
from tests.helpers.two_processes import (
    MICRO_BATCHES,
    NAMES,
    PATCHED_COUNTS,
    RECOMPUTED,
    STEPS,
    gradients,
    loss_of,
    optimizer_of,
    train,
)

# Where the losses are computed in float32 the order of their sums shows; elsewhere all is float64.
FLOAT32 = ("sound", "points")

every_strategy = pytest.mark.parametrize("strategy", distributed.STRATEGIES)


@pytest.fixture(scope="module")
def seen(made_once):
    """What each process saw."""
    folder = made_once("two processes", functools.partial(fork_together, two_processes.main))
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


def check(found, expected, *, loss_tolerance, tolerance):
    """Losses to a relative tolerance, gradients to one that is relative to the largest of the parameter's."""
    (losses, found_gradients), (expected_losses, expected_gradients) = found, expected
    assert losses.keys() == expected_losses.keys()
    for name, loss in expected_losses.items():
        torch.testing.assert_close(losses[name], loss.detach(), rtol=loss_tolerance, atol=1e-9, msg=name)
    assert found_gradients.keys() == expected_gradients.keys()
    largest = max(one.abs().max() for one in expected_gradients.values())
    for name, gradient in expected_gradients.items():
        # Some gradients, such as those of keys' biases, are 0 but for rounding.
        bound = tolerance * max(gradient.abs().max(), 1e-3 * largest)
        assert (found_gradients[name] - gradient).abs().max() <= bound, name


@functools.cache
def joined(name):
    """(losses, gradients) of one process."""
    model = CASES[name].model()
    return loss_of(model, CASES[name].joined), gradients(model)


@pytest.mark.parametrize(("strategy", "name"), [(key, name) for key, names in NAMES.items() for name in names])
def test_losses_and_gradients_are_those_of_the_joined_batch(seen, name, strategy):
    expected = joined(name)
    tolerance = 1e-5 if name.startswith(FLOAT32) else 1e-11
    for one in seen:
        check(one[name, strategy], expected, loss_tolerance=tolerance, tolerance=tolerance)
    if name not in ("segmenter, all void", "no targets", "sound without events"):
        assert all(loss > 0 for loss in expected[0].values())


def test_a_patched_criterion_keeps_the_originals_normalizers(seen):
    """Classes by the queries of each process, masks by the targets of the average process."""
    average = sum(map(sum, PATCHED_COUNTS)) / PROCESSES
    for rank, one in enumerate(seen):
        theirs = make_criterion()(*random_inputs(rank, PATCHED_COUNTS[rank]))
        for name, loss in theirs.items():
            factor = 1 if name.startswith("loss_ce") else sum(PATCHED_COUNTS[rank]) / average
            torch.testing.assert_close(one["patched"][name], loss * factor, rtol=1e-5, atol=1e-7)


@every_strategy
@pytest.mark.parametrize("name", RECOMPUTED)
def test_with_activation_checkpointing(seen, name, strategy):
    for one in seen:
        for values, expected in zip(one[name, "recomputed", strategy], one[name, strategy], strict=True):
            assert values.keys() == expected.keys()
            assert all(values[key].equal(expected[key]) for key in expected)


@every_strategy
@pytest.mark.parametrize("name", RECOMPUTED)
def test_bfloat16(seen, name, strategy):
    """Two processes are no further from float64 than twice one process in bfloat16 is, plus rounding."""
    case = CASES[name].in_float32()
    model = case.model()
    half = loss_of(model, case.joined, bfloat16=True), gradients(model)
    for one in seen:
        for found, single, exact in zip(one[name, "bfloat16", strategy], half, joined(name), strict=True):
            found, single, exact = (
                torch.cat([value.detach().double().flatten() for value in values.values()])
                for values in (found, single, exact)
            )
            rounding = exact.norm() * torch.finfo(torch.bfloat16).eps
            assert (found - exact).norm() <= 2 * (single - exact).norm() + rounding


@every_strategy
def test_accumulation(seen, strategy):
    model = CASES[MICRO_BATCHES[0]].model()
    losses = [loss_of(model, CASES[name].joined) for name in MICRO_BATCHES]
    assert len(losses) == 3
    for one in seen:
        check(({}, one["accumulated", strategy]), ({}, gradients(model)), loss_tolerance=0, tolerance=1e-11)


def test_states_go_from_strategy_to_strategy_and_to_one_process(seen):
    """Three runs in a row, each from the state of the last by another strategy, are one run of one process."""
    case = CASES["segmenter"]
    model = case.model()
    optimizer = optimizer_of(model)
    for run, (weights, state) in enumerate(seen[0]["relay"]):
        if run == 2:
            model = case.model()
            optimizer = optimizer_of(model)
            distributed.load_model_state(model, seen[0]["relay"][1][0])
            distributed.load_optimizer_state(model, optimizer, seen[0]["relay"][1][1])
        train(model, optimizer, case.joined)
        expected = distributed.optimizer_state(model, optimizer)
        assert state["param_groups"] == expected["param_groups"]
        assert state["state"].keys() == expected["state"].keys() == dict(model.named_parameters()).keys()
        for name, weight in distributed.model_state(model).items():
            assert not weights[name].is_cuda
            torch.testing.assert_close(weights[name], weight, rtol=1e-9, atol=1e-9)
            for key, value in expected["state"].get(name, {}).items():
                torch.testing.assert_close(state["state"][name][key], value, rtol=1e-7, atol=1e-12)
                assert key != "step" or value == (run + 1) * STEPS


def test_a_state_of_other_groups_is_refused():
    model = CASES["segmenter"].model()
    state = distributed.optimizer_state(model, optimizer_of(model))
    with pytest.raises(ValueError, match="other parameters"):
        distributed.load_optimizer_state(model, torch.optim.AdamW(model.parameters()), state)


@every_strategy
def test_the_whole_model_predicts_alone(seen, strategy):
    case = CASES["segmenter"]
    model = case.model()
    for before_or_after in range(2):
        expected = model.predict(case.shares[0][0], output="scores")
        for one in seen:
            for found, scores in zip(one["predictions", strategy][before_or_after], expected, strict=True):
                torch.testing.assert_close(found, scores, rtol=1e-9, atol=1e-9)
        train(model, optimizer_of(model), case.joined, steps=1)


@every_strategy
def test_statistics_are_those_of_the_first_process(seen, strategy):
    (whole, saved), (elsewhere, nothing) = (one["statistics", strategy] for one in seen)
    assert nothing == {}
    assert whole.keys() == elsewhere.keys() == saved.keys()
    assert all(whole[name].equal(elsewhere[name]) and whole[name].equal(saved[name]) for name in whole)


def test_a_flag_of_any_process(seen):
    assert [one["flags"] for one in seen] == [[True, False], [True, False]]
    assert distributed.any_process(True)
    assert not distributed.any_process(False)


def test_a_single_process_needs_nothing(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    processes = distributed.setup("cpu")
    assert (processes.rank, processes.world_size, processes.device) == (0, 1, torch.device("cpu"))
    assert not distributed.together()
    model = CASES["segmenter"].model()
    assert distributed.wrap(model, "fsdp") is model
    assert distributed.whole(model) is model
    with distributed.accumulating(model):
        pass
    with pytest.raises(ValueError, match="unknown strategy 'zero'; expected one of ddp, fsdp"):
        distributed.wrap(model, "zero")
    distributed.cleanup()


FAILING = """
import time
from fastmask.training import distributed
processes = distributed.setup("cpu")
if processes.rank == 1:
    raise ValueError("one of them fails")
distributed.any_process(False)
"""


@pytest.mark.slow
def test_the_failure_of_one_process_ends_the_others(tmp_path):
    (tmp_path / "failing.py").write_text(FAILING)
    done = torchrun(str(tmp_path / "failing.py"), PYTHONPATH=str(ROOT))
    assert done.returncode != 0
    assert "one of them fails" in done.stderr
