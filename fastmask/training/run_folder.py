"""The folder of a training run: its files, and the checks before a run begins or continues in it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fastmask.files import finite, read_json, replace_file, write_json
from fastmask.models.weight_files import CONFIG_FILE
from fastmask.training.config import TrainingConfig
from fastmask.training.step_checkpoints import remove_temporary

# Worker processes inherit the lock of the training process, and may briefly outlive it when it is killed.
PATIENCE = 2.0  # seconds


class RunFolder:
    """The files of a run.

    Attributes:
        root: the folder.
        config: config.json, the :class:`TrainingConfig` that reproduces the run.
        checkpoints: a folder with the states that the run can continue from.
        model: a folder with the network at the end or at the last interruption.
        best: a folder with the network of the best evaluation, and with ``score``.
        score: the evaluation of ``best``, and its step.
        metrics: metrics.jsonl, one line for each measurement.
        result: result.json, written at the end.
        log: log.txt, the messages.
        curves: curves.png, the losses and scores over the steps.
        tensorboard: a folder of TensorBoard's event files.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self.config = self.root / CONFIG_FILE
        self.checkpoints = self.root / "checkpoints"
        self.model = self.root / "model"
        self.best = self.root / "best"
        self.score = self.best / "evaluation.json"
        self.metrics = self.root / "metrics.jsonl"
        self.result = self.root / "result.json"
        self.log = self.root / "log.txt"
        self.curves = self.root / "curves.png"
        self.tensorboard = self.root / "tensorboard"
        self._lock = FileLock(self.root / ".lock", timeout=PATIENCE)

    def check_unused(self) -> None:
        """Checks that the folder is empty or does not exist.

        Raises:
            FileExistsError: the folder is not empty, or is a file.
        """
        if self.root.is_dir() and not any(self.root.iterdir()):
            return
        if self.config.is_file():
            raise FileExistsError(f"{self.root} already holds a run; --resume continues it")
        if self.root.exists():
            raise FileExistsError(f"{self.root} already exists and is not empty; choose another folder")

    def create(self, config: TrainingConfig) -> None:
        """Creates the folder, with the configuration in it.

        Raises:
            FileExistsError: another process has begun a run in it.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        self.lock()
        if self.config.is_file():
            raise FileExistsError(f"{self.root} already holds a run, which has just begun")
        write_json(self.config, config.to_dict())

    def reopen(self, config: TrainingConfig | None) -> TrainingConfig:
        """Reopens the folder of a run to continue it; returns the configuration to continue with.

        Args:
            config: the configuration to continue with; None for the run's own.

        Raises:
            FileNotFoundError: there is no run in this folder.
            ValueError: the configuration describes another run; the message names the fields that differ.
        """
        if not self.config.is_file():
            raise FileNotFoundError(f"{self.root} has no run to resume: there is no {CONFIG_FILE}")
        own = TrainingConfig.load(self.config)
        config = own if config is None else config
        changed = config.fixed_differences(own)
        if changed:
            raise ValueError(
                f"{self.root} was trained with another configuration; it differs in {', '.join(changed)}. "
                "Resume without these, or train into another folder"
            )
        return config

    def lock(self) -> None:
        """Keeps other processes from training in this folder until ``close`` or the end of this process.

        Raises:
            FileExistsError: another process trains in it.
        """
        try:
            self._lock.acquire()
        except Timeout:
            raise FileExistsError(f"{self.root} is in use: another process trains in it") from None
        except OSError:
            pass  # a file system without locks

    def close(self) -> None:
        """Lets others train in this folder."""
        self._lock.release()

    def clean(self) -> None:
        """Deletes files that killed processes left half-written."""
        for folder in (self.root, self.checkpoints, self.model, self.best):
            remove_temporary(folder)

    def best_score(self) -> float:
        """The score of the network in ``best``; minus infinity if there is none."""
        return read_json(self.score, {}).get("score", -math.inf)


class MetricsFile:
    """A file of JSON lines, each with the "step" after which it was measured.

    Args:
        path: the path of the file, which need not exist.
    """

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """All records; a last line that a killed process left unfinished is ignored."""
        if not self.path.is_file():
            return []
        lines = self.path.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1]]

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds a line; numbers that are not finite become null."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite(record)) + "\n")

    def cut(self, step: int) -> None:
        """Deletes the records of later steps."""
        if self.path.is_file():
            text = "".join(json.dumps(record) + "\n" for record in self.read() if record["step"] <= step)
            replace_file(self.path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
