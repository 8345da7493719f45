"""Writes files atomically; reads and writes JSON."""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def replace_files(folder: Path, writers: Mapping[str, Callable[[Path], object]]) -> None:
    """Writes several files of a folder under temporary names and renames them when all are complete, so that an
    interruption leaves the earlier files.

    Args:
        folder: the folder; it and its subfolders are created if needed.
        writers: maps each file's path in the folder to a function that writes the file to the path it is given.
    """
    token = uuid.uuid4().hex
    # A temporary name that contains the file's own name might be too long.
    temporaries = {name: (folder / name).with_name(f".{token}-{i}.tmp") for i, name in enumerate(writers)}
    try:
        for name, write in writers.items():
            temporary = temporaries[name]
            temporary.parent.mkdir(parents=True, exist_ok=True)
            temporary.touch()
            mode = temporary.stat().st_mode
            write(temporary)
            temporary.chmod(mode)  # safetensors makes its files readable only by their owner
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        for name, temporary in temporaries.items():
            os.replace(temporary, folder / name)
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Writes one file atomically, as :func:`replace_files` does."""
    replace_files(path.parent, {path.name: write})


def read_json(path: Path, default: Any = None) -> Any:
    """The content of a JSON file in UTF-8, with or without a byte order mark; ``default`` if the file does not exist.

    Raises:
        FileNotFoundError: the file does not exist, and ``default`` is None.
        ValueError: the file is not JSON; the message names it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        if default is not None:
            return default
        raise FileNotFoundError(f"{path} is missing") from None
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes the values, made :func:`finite`, to a JSON file atomically."""
    text = json.dumps(finite(values), indent=2) + "\n"
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def finite(value: Any) -> Any:
    """Replaces infinities and NaN, which JSON lacks, with None, also within dicts, lists and tuples."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value
