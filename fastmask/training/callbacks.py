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
    """Base of everything that follows a run of training. Each method does nothing unless a subclass overrides it; of
    several processes, process 0 alone calls them."""

    def on_start(self, config: Mapping[str, Any]) -> None:
        """A run begins or continues.

        Args:
            config: what ``to_dict`` of the :class:`fastmask.training.TrainingConfig` gives.
        """

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Some steps were taken.

        Args:
            step: the last of them, counted from 1.
            metrics: means over these steps: "loss/loss", "loss/loss_ce", ..., "gradient_norm", "learning_rate/GROUP",
                "images_per_second" and "memory" in GiB.
        """

    def on_evaluate(self, step: int, metrics: Mapping[str, float]) -> None:
        """The network was evaluated.

        Args:
            step: after which.
            metrics: shares of 1 by name, such as "evaluation/mIoU"; nan where there was nothing to find.
        """

    def on_end(self) -> None:
        """The run has finished, was interrupted, or failed."""


class TensorBoard(Callback):
    """Scalars for TensorBoard.

    Args:
        folder: of the event files.
        step: how many steps were taken before; scalars of later ones are replaced.

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
    """Metrics for a package with the interface of wandb, in the project "fastmask". A continued run stays one run.

    Args:
        package: one of ``TRACKERS``.
        folder: of the run of training; a file in it keeps the tracked run's name.
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
    """Refuses a logger whose package is missing.

    Raises:
        ImportError: it is; the message says how to install it.
    """
    if name in TRACKERS:
        with extra(name):
            importlib.import_module(name)
