"""Checkpoints on disk, which are written atomically and verified before they are loaded."""

from __future__ import annotations

import logging
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

KEPT = 2  # checkpoints, so that there is another one if the newest is damaged
NAME = re.compile(r"step-(\d+)\.pt")
TEMPORARY = ".tmp"

logger = logging.getLogger(__name__)


def save_checkpoint(folder: Path, step: int, state: Mapping[str, Any]) -> Path:
    """Writes a checkpoint and deletes all but the latest two. Earlier checkpoints survive if the process is killed at
    any moment, the disk is full, or the machine fails.

    Args:
        folder: the folder, which is created if it does not exist.
        step: the number of steps taken.
        state: tensors, numbers, strings, and lists, tuples and dicts of them.

    Raises:
        OSError: the file cannot be written; the message gives its name, the reason, and the checkpoint to resume from.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.pt"
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(folder)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        kept = _checkpoints(folder)
        there = f"{kept[-1]} is there to resume from" if kept else "there is no earlier checkpoint"
        raise OSError(f"cannot write {path}: {_reason(error)}; {there}") from error
    for old in _checkpoints(folder)[:-KEPT]:
        old.unlink()
    return path


def load_newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest undamaged checkpoint, on the CPU; None if there are no checkpoints.

    The checksum of each tensor is verified. A damaged file is skipped with a warning.

    Raises:
        ValueError: every checkpoint is damaged; the message names them.
    """
    paths = _checkpoints(folder)
    for path in reversed(paths):
        state, fault = _read(path)
        if state is not None:
            return path, state
        logger.warning("%s is damaged (%s); trying the one before", path, fault)
    if paths:
        raise ValueError(f"every checkpoint is damaged: {', '.join(map(str, paths))}")
    return None


def remove_temporary(folder: Path) -> None:
    """Deletes the files in a folder that killed processes left half-written."""
    for path in folder.glob(f"*{TEMPORARY}"):
        path.unlink()


def _checkpoints(folder: Path) -> list[Path]:
    """All checkpoints, from the oldest to the newest."""
    found = [(int(match[1]), path) for path in folder.glob("*") if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def _read(path: Path) -> tuple[dict[str, Any] | None, str]:
    """The content of a file and ""; or None and the fault."""
    try:
        # torch.load does not verify checksums.
        with zipfile.ZipFile(path) as archive:
            changed = archive.testzip()
        if changed is not None:
            return None, f"{changed} has another checksum"
        return torch.load(path, map_location="cpu", weights_only=True), ""
    except (zipfile.BadZipFile, EOFError, UnpicklingError, RuntimeError) as error:
        return None, str(error).partition("\n")[0]


def _reason(error: BaseException) -> str:
    """The system's message: torch reports only that a failed write left the file inconsistent."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__context__
    return str(error)


def _sync_folder(folder: Path) -> None:
    """Makes renamed files in a folder survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
