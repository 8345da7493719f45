"""Paths and metadata of exported files."""

from __future__ import annotations

import json
from pathlib import Path

from fastmask.models._base import PretrainedModel
from fastmask.version import __version__

# Fields of a configuration that users of a program may need, in addition to the names of the classes.
DESCRIBED = (
    *("num_classes", "stuff_classes", "ignore_index", "pixel_mean", "pixel_std", "size_divisibility", "patch_size"),
    *("sample_rate", "frame_seconds", "median_seconds"),
)


def describe(model: PretrainedModel, task: str, window: tuple[int, int] | None) -> dict[str, str]:
    """The metadata of a program's file: every value is a string; lists are JSON. If a program predicts in windows,
    "window" holds their size and stride."""
    config = model.config
    values = {name: getattr(config, name) for name in DESCRIBED if hasattr(config, name)}
    return {
        "fastmask_version": __version__,
        "model": type(model).__name__,
        "task": task,
        "class_names": json.dumps(config.class_names, ensure_ascii=False),
        **{name: json.dumps(value) for name, value in values.items()},
        **({} if window is None else {"window": json.dumps(window)}),
    }


def check_path(path: str | Path, ending: str, overwrite: bool) -> Path:
    """Checks that a file may be written, and returns its path.

    Raises:
        ValueError: the path has another ending.
        FileExistsError: the path exists, and ``overwrite`` is False or it is a folder.
    """
    path = Path(path)
    if path.suffix != ending:
        raise ValueError(f"path must end with {ending}, got {str(path)!r}")
    if path.is_dir() or (path.exists() and not overwrite):
        hint = "" if path.is_dir() else "; overwrite replaces it"
        raise FileExistsError(f"{path} exists already{hint}")
    return path
