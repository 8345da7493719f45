"""What callbacks and trackers are told of a run."""

from __future__ import annotations

import importlib
import sys
import types

import pytest

from fastmask.training import Callback, TrainingConfig, train
from fastmask.training.callbacks import PROJECT
from fastmask.training.run_folder import MetricsFile
from tests.helpers.training_runs import scene_folder, tiny_config


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    scenes = scene_folder(tmp_path_factory.mktemp("scenes"), 3, 1)
    return tiny_config(scenes, 3, workers=0, log="none", log_every=2, eval_every=2, checkpoint_every=1)


class Recorder(Callback):
    """Keeps what it is told."""

    def __init__(self):
        self.told = []

    def on_start(self, config):
        self.told.append(("start", config))

    def on_log(self, step, metrics):
        self.told.append(("log", step, metrics))

    def on_evaluate(self, step, metrics):
        self.told.append(("evaluate", step, metrics))

    def on_end(self):
        self.told.append(("end",))


def test_a_callback_is_told_of_everything(config, tmp_path):
    recorder = Recorder()
    train(config, tmp_path / "run", callbacks=[recorder, Callback()])
    assert [kind for kind, *_ in recorder.told] == ["start", "log", "evaluate", "log", "evaluate", "end"]
    (_, started), (_, step, metrics), (_, evaluated_step, evaluation), *_ = recorder.told
    assert TrainingConfig.from_dict(started) == config
    (record, evaluated, *_) = MetricsFile(tmp_path / "run/metrics.jsonl").read()
    assert step == evaluated_step == record["step"] == 2
    assert evaluation["evaluation/mIoU"] == evaluated["evaluation"]["mIoU"]
    for name in ("loss", "loss_ce", "loss_mask", "loss_dice"):
        assert metrics[f"loss/{name}"] == record[name]
    assert metrics["learning_rate/head/weights"] == record["learning_rates"]["head/weights"]
    assert metrics.keys() >= {"gradient_norm", "images_per_second", "memory"}
    assert not (tmp_path / "run/tensorboard").exists()  # log="none"


def test_the_end_is_told_even_of_a_run_that_fails(config, tmp_path):
    class Failing(Recorder):
        def on_log(self, step, metrics):
            raise RuntimeError("the disk is full")

    recorder, failing = Recorder(), Failing()
    with pytest.raises(RuntimeError, match="disk is full"):
        train(config, tmp_path / "run", callbacks=[recorder, failing])
    assert recorder.told[-1] == failing.told[-1] == ("end",)


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_a_missing_tracker_says_its_extra(config, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"pip install 'fastmask-kernels\[{package}\]'"):
        train(config.replace(log=package), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_a_tracker_keeps_one_run_when_training_continues(config, tmp_path, monkeypatch, package):
    """A stub in the package's place."""
    calls = []

    class Run:
        def log(self, metrics, step):
            calls.append((step, sorted(metrics)))

        def finish(self):
            calls.append("finish")

    def init(**options):
        calls.append(options)
        return Run()

    monkeypatch.setitem(sys.modules, package, types.SimpleNamespace(init=init))
    train(config.replace(log=package), tmp_path / "run")
    started, (step, logged), (_, evaluated), *_ = calls
    assert (started["project"], started["resume"], started["config"]["seed"]) == (PROJECT, "allow", 0)
    assert step == 2 and "loss/loss" in logged and "evaluation/mIoU" in evaluated
    assert calls[-1] == "finish"
    assert ("id" in started) == (package == "wandb")

    (tmp_path / "run/result.json").unlink()
    calls.clear()
    train(None, tmp_path / "run", resume=True)
    assert calls[0]["name"] == started["name"] and started["name"].startswith("run-")
    assert calls[-1] == "finish"


def test_trackio_stores_a_run(config, tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)  # it reads the variable when it is imported
    train(config.replace(log="trackio"), tmp_path / "run")
    storage = importlib.import_module("trackio.sqlite_storage").SQLiteStorage
    (run,) = storage.get_runs(PROJECT)
    logs = storage.get_logs(PROJECT, run)
    losses = {log["step"]: log["loss/loss"] for log in logs if "loss/loss" in log}
    records = MetricsFile(tmp_path / "run/metrics.jsonl").read()
    assert losses == {record["step"]: pytest.approx(record["loss"]) for record in records if "loss" in record}
