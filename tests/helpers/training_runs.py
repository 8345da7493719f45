"""Small runs of training: a data set on disk and configurations that a test can afford."""

from __future__ import annotations

import functools
import json
import logging
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastmask.data import CLASS_NAMES, STUFF_CLASSES, ComposedScenes
from fastmask.models import make_model
from fastmask.training import Recipe, TrainingConfig, make_training_config

SIZE = (64, 64)


def scene_folder(root: Path, train: int = 7, val: int = 3, sizes: tuple[tuple[int, int], ...] = (SIZE,)) -> Path:
    """Composed scenes as a plain folder of pictures and label maps; their sizes take turns."""
    for split, count in (("train", train), ("val", val)):
        for i in range(count):
            image, segments, labels = ComposedScenes(split, size=sizes[i % len(sizes)])[i]
            classes = np.append(labels.numpy(), [255] * (256 - len(labels)))[segments.numpy()]
            for folder, picture in (
                ("images", (image * 255).byte().permute(1, 2, 0).numpy()),
                ("annotations", classes),
            ):
                path = root / folder / split / f"{i:03d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture.astype(np.uint8)).save(path)
    (root / "classes.json").write_text(json.dumps({"classes": CLASS_NAMES, "stuff": STUFF_CLASSES}))
    return root


def tiny_config(data: Path | str, steps: int = 6, **options) -> TrainingConfig:
    """A few steps of a tiny MaskFormer with dropout on crops of these scenes."""
    recipe = Recipe(
        **{
            "steps": steps,
            "batch_size": 2,
            "crop": (48, 64),
            "short_side": 64,
            "max_side": 256,
            "learning_rate": 1e-3,
            **options.pop("recipe", {}),
        }
    )
    fields = {"decoder_layers": 1, "dropout": 0.1, "num_queries": 20, **options.pop("model_fields", {})}
    return make_training_config(data, options.pop("model", "tiny"), recipe, model_fields=fields, **options)


@functools.cache
def _import_what_models_take() -> None:
    make_model("tiny", 2)


class ForkedProcess:
    """A process in a group of its own that is quick to start, since everything is imported already.

    Args:
        call: what it does. It has one thread, for those of OpenMP do not survive a fork.
        args: of the call.

    Attributes:
        stderr: what it says, as a file.
    """

    def __init__(self, call: Callable, *args: object):
        _import_what_models_take()
        reading, writing = os.pipe()
        self._process = multiprocessing.get_context("fork").Process(target=self._run, args=(writing, call, *args))
        self._process.start()
        os.close(writing)
        self.pid = self._process.pid
        self.stderr = os.fdopen(reading)

    @staticmethod
    def _run(writing: int, call: Callable, *args: object) -> None:
        os.setsid()
        os.dup2(writing, 2)
        os.close(writing)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        logging.root.handlers.clear()  # pytest's
        torch.set_num_threads(1)
        call(*args)

    @property
    def running(self) -> bool:
        return self._process.is_alive()

    def wait(self, seconds: float | None = None) -> int | None:
        """Its exit status, or the negative number of the signal that ended it; None if it still runs by then."""
        self._process.join(seconds)
        return self._process.exitcode

    def send(self, number: int) -> None:
        """A signal to the whole group."""
        os.killpg(self.pid, number)

    def kill(self) -> None:
        """SIGKILL to the process alone."""
        self._process.kill()
        self._process.join()

    def read_until(self, text: str) -> list[str]:
        """The lines that it says, up to one with this text."""
        lines = []
        for line in self.stderr:
            lines.append(line)
            if text in line:
                return lines
        raise AssertionError(f"{text!r} was never said:\n{''.join(lines)}")


def train_command(*options: object) -> ForkedProcess:
    """``fastmask train`` with these options."""
    return ForkedProcess(run_command, ["fastmask", "train", *map(str, options)])


def run_command(arguments: list[str]) -> None:
    """The command line in this process."""
    from fastmask.cli.main import main

    sys.argv = arguments
    main()
