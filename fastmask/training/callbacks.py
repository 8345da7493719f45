"""Loggers of a training run: TensorBoard, Weights & Biases, Trackio, or a callback of your own."""

from __future__ import annotations

import importlib
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastmask.extras import extra

PROJECT = "fastmask"
TRACKERS = ("wandb", "trackio")


class Callback:
    """Base class of loggers that follow a training run. Each method does nothing unless a subclass overrides it. Only
    process 0 calls them."""

    def on_start(self, config: Mapping[str, Any]) -> None:
        """A run begins or continues.

        Args:
            config: the result of ``to_dict`` of the :class:`fastmask.training.TrainingConfig`.
        """

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Some steps were taken.

        Args:
            step: the last of these steps, counted from 1.
            metrics: means over these steps: "loss/loss", "loss/loss_ce", ..., "gradient_norm", "learning_rate/GROUP",
                "images_per_second" and "memory" in GiB.
        """

    def on_evaluate(self, step: int, metrics: Mapping[str, float]) -> None:
        """The network was evaluated.

        Args:
            step: the step after which it was evaluated.
            metrics: scores in 0..1 by name, such as "evaluation/mIoU"; nan where there was nothing to find.
        """

    def on_end(self) -> None:
        """The run has finished, was interrupted, or failed."""


class TensorBoard(Callback):
    """Scalars for TensorBoard.

    Args:
        folder: the folder of the event files.
        step: the number of steps taken before; scalars of later steps are replaced.

    Raises:
        ImportError: tensorboard is missing.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._make_writer = lambda: SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def on_start(self, config: Mapping[str, Any]) -> None:
        self._writer = self._make_writer()

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    on_evaluate = on_log

    def on_end(self) -> None:
        self._writer.close()


class Tracker(Callback):
    """Metrics for a package with the interface of wandb, in the project "fastmask". A resumed run continues its record.

    Args:
        package: one of ``TRACKERS``.
        folder: the folder of the training run; a file in it stores the name of the tracked run.
    """

    def __init__(self, package: str, folder: Path) -> None:
        self._package, self._folder = package, folder

    def on_start(self, config: Mapping[str, Any]) -> None:
        kept = self._folder / f".{self._package}"
        if not kept.exists():
            kept.write_text(f"{self._folder.absolute().name}-{uuid.uuid4().hex[:8]}", encoding="utf-8")
        name = kept.read_text(encoding="utf-8")
        own = {"id": name, "dir": str(self._folder)} if self._package == "wandb" else {}
        api = importlib.import_module(self._package)
        self._run = api.init(project=PROJECT, name=name, resume="allow", config=dict(config), **own)

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    on_evaluate = on_log

    def on_end(self) -> None:
        self._run.finish()


def check_logger(name: str) -> None:
    """Checks that a logger's package is installed.

    Raises:
        ImportError: the package is missing; the message says how to install it.
    """
    if name in TRACKERS:
        with extra(name):
            importlib.import_module(name)
