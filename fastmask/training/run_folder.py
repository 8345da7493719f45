"""The folder of a run of training: what is where, and what it takes to begin or continue in it."""

from __future__ import annotations

import fcntl
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from fastmask.files import finite, read_json, replace_file, write_json
from fastmask.models.weight_files import CONFIG_FILE
from fastmask.training.config import TrainingConfig
from fastmask.training.step_checkpoints import remove_temporary


class RunFolder:
    """The files of a run.

    Attributes:
        root: the folder.
        config: config.json, the :class:`TrainingConfig` that reproduces the run.
        checkpoints: a folder of what the run can be continued from.
        model: a folder with the latest network, as of the end or of an interruption.
        best: a folder with the network that did best in evaluation, and with ``score``.
        score: the evaluation of ``best``, and its step.
        metrics: metrics.jsonl, a line for each time that something was measured.
        result: result.json, written when everything is done.
        log, curves, tensorboard: for the eye.
    """

    _lock: BinaryIO | None = None

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

    def check_unused(self) -> None:
        """Refuses a folder that has something in it.

        Raises:
            FileExistsError: it has, or is a file.
        """
        if self.root.is_dir() and not any(self.root.iterdir()):
            return
        if self.config.is_file():
            raise FileExistsError(f"{self.root} holds a run already; --resume continues it")
        if self.root.exists():
            raise FileExistsError(f"{self.root} exists already and is not empty; choose another folder")

    def create(self, config: TrainingConfig) -> None:
        """Makes the folder, with the configuration in it.

        Raises:
            FileExistsError: another process has begun a run in it.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        self.lock()
        if self.config.is_file():
            raise FileExistsError(f"{self.root} holds a run already, which has begun meanwhile")
        write_json(self.config, config.to_dict())

    def reopen(self, config: TrainingConfig | None) -> TrainingConfig:
        """The configuration to continue with.

        Args:
            config: of the continuation; None for the run's own.

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
        """Keeps other processes from training in this folder for as long as this one lives, or until ``close``.

        Raises:
            FileExistsError: another process trains in it.
        """
        # Of all kinds of lock this one is not inherited by the processes that read data, which may live a bit longer.
        file = (self.root / ".lock").open("ab")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.close()
            raise FileExistsError(f"{self.root} is in use: another process trains in it") from None
        except OSError:
            pass  # a file system without locks
        self._lock = file

    def close(self) -> None:
        """Lets others train in this folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def clean(self) -> None:
        """Deletes what killed processes left half-written."""
        for folder in (self.root, self.checkpoints, self.model, self.best):
            remove_temporary(folder)

    def best_score(self) -> float:
        """Of the network in ``best``; minus infinity if there is none."""
        return read_json(self.score, {}).get("score", -math.inf)


class MetricsFile:
    """A file of JSON lines, each with the "step" after which it was measured.

    Args:
        path: of the file, which need not exist.
    """

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """Every record, without a last line that a killed process left unfinished."""
        if not self.path.is_file():
            return []
        lines = self.path.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1]]

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds a line; what is not finite becomes null."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite(record)) + "\n")

    def cut(self, step: int) -> None:
        """Deletes the records of later steps."""
        if self.path.is_file():
            text = "".join(json.dumps(record) + "\n" for record in self.read() if record["step"] <= step)
            replace_file(self.path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
