"""The output of a training run: lines for readers, a progress bar, and numbers for files and callbacks."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from fastmask.training.callbacks import TRACKERS, Callback, TensorBoard, Tracker
from fastmask.training.config import TrainingConfig
from fastmask.training.run_folder import MetricsFile, RunFolder

INSTALL = "pip install fastmask-kernels[train]"
logger = logging.getLogger("fastmask.training")


class RunLog:
    """Writes messages to stderr (unless the program has configured logging) and to log.txt, numbers to metrics.jsonl
    and to callbacks.

    Args:
        active: whether this process writes anything.
        callbacks: callbacks in addition to the logger that the configuration names.
    """

    def __init__(self, active: bool, callbacks: Sequence[Callback] = ()):
        self._active = active
        self._handlers: list[logging.Handler] = []
        self._metrics: MetricsFile | None = None
        self._bar: Any = None
        self._callbacks = list(callbacks)
        self._started: list[Callback] = []
        self._before = logger.level, logger.propagate
        if active:
            if not logger.hasHandlers():
                self._add_handler(_LinesBesideBar(self), "%(message)s")
                logger.propagate = False
            logger.setLevel(logging.INFO)

    def open(self, folder: RunFolder, step: int, config: TrainingConfig) -> None:
        """Starts writing to the files of a run, calling the callbacks, and showing progress.

        Args:
            folder: the folder of the run.
            step: the number of steps taken before; records of later steps are deleted.
            config: the configuration of the run.
        """
        if not self._active:
            return
        self._metrics = MetricsFile(folder.metrics)
        self._metrics.cut(step)
        self._add_handler(logging.FileHandler(folder.log, encoding="utf-8"), "%(asctime)s  %(levelname)-7s %(message)s")
        if (own := _make_logger(config.log, folder, step)) is not None:
            self._callbacks.append(own)
        for callback in self._callbacks:
            callback.on_start(config.to_dict())
            self._started.append(callback)
        self._bar = _progress_bar(step, config.recipe.steps)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the callbacks and restores the logger."""
        if self._bar is not None:
            self._bar.close()
        for callback in self._started:
            callback.on_end()
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
            step: the last of these steps.
            steps: the number of steps of the whole run.
            losses: "loss", each kind of loss, and "gradient_norm".
            extra: "learning_rates" by parameter group, "images_per_second", and "memory" in GiB.
        """
        if self._metrics is None:
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
        for callback in self._callbacks:
            callback.on_log(step, scalars)

    def evaluation(self, step: int, numbers: Mapping[str, float], per_class: Mapping[str, Mapping[str, float]]) -> None:
        """Writes the scores of an evaluation.

        Args:
            step: the step after which it took place.
            numbers: the scores in 0..1, by name.
            per_class: by name, the score of each class.
        """
        if self._metrics is None:
            return
        self._metrics.append({"step": step, "evaluation": dict(numbers), "per_class": dict(per_class)})
        logger.info(f"step {step}  " + "  ".join(f"{name} {100 * value:.2f} %" for name, value in numbers.items()))
        for callback in self._callbacks:
            callback.on_evaluate(step, {f"evaluation/{name}": value for name, value in numbers.items()})

    def _add_handler(self, handler: logging.Handler, form: str) -> None:
        handler.setFormatter(logging.Formatter(form))
        logger.addHandler(handler)
        self._handlers.append(handler)


class _LinesBesideBar(logging.Handler):
    """Writes lines to stderr, above the log's progress bar if there is one."""

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
    """A progress bar, if stderr is a terminal and tqdm is installed; otherwise None."""
    if not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True)


def _make_logger(name: str, folder: RunFolder, step: int) -> Callback | None:
    """The callback that a configuration names; None for "none", and for "tensorboard" if it is not installed."""
    if name in TRACKERS:
        return Tracker(name, folder.root)
    try:
        return TensorBoard(folder.tensorboard, step) if name == "tensorboard" else None
    except ImportError:
        logger.info("no scalars for TensorBoard: %s", INSTALL)
        return None
