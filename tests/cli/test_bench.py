"""``fastmask bench``, the function behind it, and how calls take turns."""

from __future__ import annotations

import importlib
import json

import pytest
import torch
from typer.testing import CliRunner

from fastmask import measure
from fastmask.cli.bench import table
from fastmask.cli.main import app
from fastmask.measure import Clock, Measurement, take_turns
from fastmask.models import make_model
from fastmask.training import benchmark as module
from fastmask.training.benchmark import OWN, REFERENCE, SUBJECTS, benchmark, random_batch
from tests.helpers.exporting import eomt, mask2former

CPU = torch.device("cpu")
RUNNER = CliRunner()


class Time:
    """A clock that moves only when it is told to."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(measure.time, "perf_counter", lambda: self.now)

    def taking(self, log, name, **parts):
        def call(clock):
            log.append(name)
            for part, seconds in parts.items():
                self.now += seconds
                clock.mark(part)
            return name

        return call


def test_calls_take_turns_until_the_time_is_used_up(monkeypatch):
    time, log = Time(monkeypatch), []
    calls = {"a": time.taking(log, "a", first=0.25, second=0.75), "b": time.taking(log, "b", all=2.0)}
    found = take_turns(calls, CPU, 10.0)
    # Twice each for the memory; then in turn, the same rounds for both, for 10 seconds.
    assert "".join(log) == "aabb" + "abababab"
    assert found["a"].seconds == [1.0] * 4 and found["b"].seconds == [2.0] * 4
    assert found["a"].parts() == {"first": 0.25, "second": 0.75} and found["a"].result == "a"
    assert measure.summary(found["a"].seconds) == {"median_ms": 1e3, "p20_ms": 1e3, "p80_ms": 1e3, "rounds": 4}
    assert found["a"].ratio(found["b"]) == 2 and found["b"].ratio(found["a"]) == 0.5


@pytest.mark.parametrize(("seconds", "rounds"), [(8.0, 1), (130.0, 3), (200.0, 4)])
def test_slow_calls_are_timed_once_and_others_three_times_or_more(monkeypatch, seconds, rounds):
    time, log = Time(monkeypatch), []
    calls = {"slow": time.taking(log, "s", all=60.0), "middle": time.taking(log, "m", all=2.0)}
    found = take_turns(calls, CPU, seconds)
    assert found["slow"].seconds == [60.0] * rounds and found["middle"].seconds == [2.0] * rounds
    assert found["middle"].ratio(found["slow"]) == 30


def test_what_runs_out_of_memory_is_said(monkeypatch):
    def fails(clock):
        raise torch.OutOfMemoryError("no")

    found = take_turns({"a": fails, "b": lambda clock: clock.mark("b")}, CPU, 0.001)
    assert found["a"] == Measurement(failure="out of memory")
    assert found["b"].failure is None and len(found["b"].rounds) >= 1


def test_memory_is_that_of_the_call():
    found = take_turns({"a": lambda clock: (torch.ones(1 << 20), clock.mark("a"))[0]}, CPU, 0.01)["a"]
    assert 4 << 20 <= found.memory["allocator"] < 5 << 20


def test_parts_of_one_name_are_added_up(monkeypatch):
    time = Time(monkeypatch)
    clock = Clock(CPU)
    for part, seconds in (("a", 1.0), ("b", 2.0), ("a", 4.0)):
        time.now += seconds
        clock.mark(part)
    assert clock.seconds() == {"a": 5.0, "b": 2.0}


def test_random_batches_are_what_they_say():
    images, targets = random_batch(7, (45, 64), batch_size=3, num_targets=5, seed=1)
    assert images.shape == (3, 3, 45, 64) and targets.segments.shape == (3, 45, 64)
    assert targets.counts.tolist() == [5, 5, 5] and 0 <= int(targets.labels.min()) <= int(targets.labels.max()) < 7
    assert set(targets.segments.unique().tolist()) <= {*range(5), 255}
    again = random_batch(7, (45, 64), batch_size=3, num_targets=5, seed=1)
    assert torch.equal(images, again[0]) and torch.equal(targets.segments, again[1].segments)
    for name, value in {"num_targets": 255, "batch_size": 0}.items():
        with pytest.raises(ValueError, match=f"{name} must be at least 1.*got {value}"):
            random_batch(7, (45, 64), **{name: value})


@pytest.fixture
def backends(monkeypatch):
    """The backends that operators were asked for, by operator."""
    seen = {}
    for name in ("assign", "mask_cost", "mask_loss", "_mask_source"):
        home = importlib.import_module(f"fastmask.ops.{name}")
        original = home.choose_backend

        def choose(operator, backend, tensor, original=original):
            seen.setdefault(operator.name, []).append(backend)
            return original(operator, backend, tensor)

        monkeypatch.setattr(home, "choose_backend", choose)
    return seen


@pytest.mark.slow
def test_each_backend_runs_and_the_model_stays_as_it_was(backends):
    torch.manual_seed(0)
    model = make_model("tiny", 6, num_queries=9)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images, targets = random_batch(6, (64, 64), num_targets=4)
    doing = []
    rows = benchmark(model, images, targets, seconds=0.001, progress=doing.append)
    assert tuple(doing) == SUBJECTS
    assert [(row["subject"], row["backend"]) for row in rows] == [(s, b) for s in SUBJECTS for b in (OWN, REFERENCE)]
    assert {operator for operator, names in backends.items() if {"auto", "reference"} <= set(names)} == set(backends)
    assert len(backends) >= 5
    for row in rows:
        assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] and row["rounds"] >= 1
        assert row["images_per_second"] == pytest.approx(2e3 / row["median_ms"])
        assert ("ratio" in row) == (row["backend"] == REFERENCE)
    training = rows[2]
    assert list(training["parts_ms"]) == ["forward", "criterion", "backward", "optimizer"]
    assert rows[1]["difference"] < 1e-5
    json.dumps(rows)
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert model.criterion.backend == model.criterion.matcher.backend == "auto"
    assert all(parameter.grad is None for parameter in model.parameters())


def test_as_many_queries_pass_as_there_are_targets():
    torch.manual_seed(0)
    model = make_model("tiny", 6)
    images, _ = random_batch(6, (64, 64))
    threshold = module._threshold(model, images, 8)
    probabilities, labels = model.eval()(images)["pred_logits"].softmax(-1).max(-1)
    assert ((probabilities > threshold) & (labels < 6)).sum() == 8
    assert module._threshold(model, images, 1000) == 0.0


def test_a_step_leaves_the_weights():
    torch.manual_seed(0)
    model = make_model("tiny", 6)
    images, targets = random_batch(6, (64, 64), num_targets=4)
    before = [parameter.clone() for parameter in model.parameters()]
    call = module._training_step(model, images, targets)
    for _ in range(2):
        call(Clock(CPU), "auto")
    assert all(torch.equal(value, parameter) for value, parameter in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("make", [mask2former, eomt])
@pytest.mark.slow
def test_both_backends_are_timed_at_the_same_points(make):
    """Their queries differ, so that rounding cannot decide which of them match."""
    model = make(num_points=64)
    images, targets = random_batch(model.config.num_classes, (64, 64), num_targets=4)
    state = torch.get_rng_state()
    rows = benchmark(model, images, targets, ["criterion", "training", "panoptic"], seconds=0.001)
    assert [(row["subject"], row["backend"]) for row in rows] == [
        (subject, backend) for subject in ("criterion", "training", "panoptic") for backend in (OWN, REFERENCE)
    ]
    assert not any(row["failure"] for row in rows)
    assert rows[1]["difference"] < 1e-5
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["segmenter-tiny", "per-pixel-tiny"])
def test_models_without_kernels_are_timed_alone(name):
    images, targets = random_batch(4, (64, 64))
    rows = benchmark(make_model(name, 4), images, targets, seconds=0.001, precision="bfloat16")
    assert [(row["subject"], row["backend"]) for row in rows] == [("training", OWN), ("semantic", OWN)]
    assert list(rows[0]["parts_ms"]) == ["forward", "backward", "optimizer"]


def test_wrong_arguments_are_named():
    model, batch = make_model("segmenter-tiny", 4), random_batch(4, (64, 64))
    with pytest.raises(ValueError, match="Segmenter has no panoptic; expected any of training, semantic"):
        benchmark(model, *batch, ["panoptic"])
    with pytest.raises(TypeError, match="a network that segments images, got SoundEventDetector"):
        benchmark(make_model("sound-tiny", 4), *batch)
    with pytest.raises(ValueError, match="precision='int8' is unknown"):
        benchmark(model, *batch, precision="int8")


@pytest.mark.slow
def test_command_by_name_and_by_folder(tmp_path):
    options = ["--size", "32", "64", "--batch-size", "1", "--targets", "3", "--seconds", "0.001", "--device", "cpu"]
    result = RUNNER.invoke(app, ["bench", "tiny", "--classes", "5", *options, "--json", str(tmp_path / "x.json")])
    assert result.exit_code == 0, result.output
    for said in ("5 classes; 1 images of 32 x 64 pixels, 3 targets", "PyTorch reference", "measured once", "optimizer"):
        assert said in result.output
    content = json.loads((tmp_path / "x.json").read_text())
    assert content["size"] == [32, 64] and len(content["rows"]) == 10
    make_model("tiny", 4).save_pretrained(tmp_path / "run" / "model")
    folder = str(tmp_path / "run")
    result = RUNNER.invoke(app, ["bench", folder, *options, "--subject", "semantic", "--precision", "bfloat16"])
    assert result.exit_code == 0 and "4 classes" in result.output and "criterion" not in result.stdout
    for arguments, message in {
        ("swin",): "unknown model 'swin'; known are",
        (folder, "--classes", "5"): "--classes is 5; .* has 4",
    }.items():
        with pytest.raises(ValueError, match=message):
            raise RUNNER.invoke(app, ["bench", *arguments, *options]).exception


def test_the_table_says_what_failed():
    rows = [{"subject": "training", "backend": REFERENCE, "failure": "out of memory"}]
    assert "training step  PyTorch reference  out of memory" in table(rows)
