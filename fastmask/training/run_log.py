"""What a run says while it trains: lines for readers, a bar on terminals, scalars for TensorBoard."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastmask.training.run_folder import MetricsFile, RunFolder

INSTALL = "pip install fastmask-kernels[train]"
logger = logging.getLogger("fastmask.training")


class RunLog:
    """Lines go to stderr (unless the program has configured logging) and to log.txt, numbers to metrics.jsonl and
    TensorBoard.

    Args:
        active: this is the process that writes; the others are silent.
    """

    def __init__(self, active: bool):
        self._active = active
        self._handlers: list[logging.Handler] = []
        self._metrics: MetricsFile | None = None
        self._bar, self._board = None, None
        self._before = logger.level, logger.propagate
        if active:
            if not logger.hasHandlers():
                self._add_handler(_LinesBesideBar(self), "%(message)s")
                logger.propagate = False
            logger.setLevel(logging.INFO)

    def open(self, folder: RunFolder, step: int, steps: int) -> None:
        """Writes to the files of a run from now on, and shows how far it is.

        Args:
            folder: of the run.
            step: how many steps were taken; records of later ones are deleted.
            steps: how many there will be.
        """
        if not self._active:
            return
        self._metrics = MetricsFile(folder.metrics)
        self._metrics.cut(step)
        self._add_handler(logging.FileHandler(folder.log, encoding="utf-8"), "%(asctime)s  %(levelname)-7s %(message)s")
        self._board = _tensorboard(folder.tensorboard, step)
        self._bar = _progress_bar(step, steps)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        """Gives back the logger as it was."""
        for part in (self._bar, self._board):
            if part is not None:
                part.close()
        for handler in self._handlers:
            logger.removeHandler(handler)
            handler.close()
        level, logger.propagate = self._before
        logger.setLevel(level)

    def advance(self) -> None:
        """One more step was taken."""
        if self._bar is not None:
            self._bar.update()

    def say(self, text: str) -> None:
        """Writes a line."""
        if self._active:
            logger.info(text)

    def training(self, step: int, steps: int, losses: Mapping[str, float], extra: Mapping[str, Any]) -> None:
        """Writes the means over some steps.

        Args:
            step: the last of them.
            steps: of the whole run.
            losses: "loss", its kinds, and "gradient_norm".
            extra: "learning_rates" by group of parameters, "images_per_second", "memory" in GiB.
        """
        if not self._active:
            return
        self._metrics.append({"step": step, **losses, **extra})
        kinds = [f"{name.removeprefix('loss_')} {value:.3f}" for name, value in losses.items() if "loss_" in name]
        rates = sorted(set(extra["learning_rates"].values()), reverse=True)
        logger.info(
            f"step {step}/{steps}  loss {losses['loss']:.3f} ({', '.join(kinds)})  "
            f"gradient {losses['gradient_norm']:.3g}  lr {', '.join(f'{rate:.2e}' for rate in rates)}  "
            f"{extra['images_per_second']:.1f} images/s  {extra['memory']:.2f} GiB"
        )
        scalars = {f"loss/{name}": value for name, value in losses.items() if name.startswith("loss")}
        scalars["gradient_norm"] = losses["gradient_norm"]
        scalars |= {f"learning_rate/{name}": rate for name, rate in extra["learning_rates"].items()}
        scalars |= {name: extra[name] for name in ("images_per_second", "memory")}
        self._write_scalars(step, scalars)

    def evaluation(self, step: int, numbers: Mapping[str, float], per_class: Mapping[str, Mapping[str, float]]) -> None:
        """Writes what an evaluation found.

        Args:
            step: after which it took place.
            numbers: by name, as shares of 1.
            per_class: for each kind of number, that of each class.
        """
        if not self._active:
            return
        self._metrics.append({"step": step, "evaluation": dict(numbers), "per_class": dict(per_class)})
        logger.info(f"step {step}  " + "  ".join(f"{name} {100 * value:.2f} %" for name, value in numbers.items()))
        self._write_scalars(step, {f"evaluation/{name}": value for name, value in numbers.items()})

    def _write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        if self._board is not None:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)

    def _add_handler(self, handler: logging.Handler, form: str) -> None:
        handler.setFormatter(logging.Formatter(form))
        logger.addHandler(handler)
        self._handlers.append(handler)


class _LinesBesideBar(logging.Handler):
    """Writes to stderr, above the bar of a log if it has one."""

    def __init__(self, log: RunLog):
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record)
        if self._log._bar is None:
            print(line, file=sys.stderr, flush=True)
        else:
            self._log._bar.write(line, file=sys.stderr)


def _progress_bar(step: int, steps: int) -> Any:
    """On a terminal, if tqdm is there."""
    if not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True)


def _tensorboard(folder: Path, step: int) -> Any:
    """A writer that replaces what was written of later steps; None without the package."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.info("no scalars for TensorBoard: %s", INSTALL)
        return None
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)
