"""Writes files whole or not at all; reads and writes JSON."""

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
        folder: the folder, which is created with its subfolders if needed.
        writers: by a file's path in the folder, a function that writes the file to the path that it is given.
    """
    token = uuid.uuid4().hex
    # A file's own name with an addition may be too long.
    temporaries = {name: (folder / name).with_name(f".{token}-{i}.tmp") for i, name in enumerate(writers)}
    try:
        for name, write in writers.items():
            temporary = temporaries[name]
            temporary.parent.mkdir(parents=True, exist_ok=True)
            temporary.touch()
            mode = temporary.stat().st_mode
            write(temporary)
            temporary.chmod(mode)  # safetensors makes its files readable by their owner only
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        for name, temporary in temporaries.items():
            os.replace(temporary, folder / name)
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Writes one file whole or not at all, as :func:`replace_files` does."""
    replace_files(path.parent, {path.name: write})


def read_json(path: Path, default: Any = None) -> Any:
    """The content of a JSON file in UTF-8, with or without a byte order mark; ``default``, if given, if there is none.

    Raises:
        FileNotFoundError: no such file, and no ``default``.
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
    """Writes the :func:`finite` values as a JSON file, whole or not at all."""
    text = json.dumps(finite(values), indent=2) + "\n"
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def finite(value: Any) -> Any:
    """The value in types that JSON has: None replaces infinities and NaN, also within dicts, lists and tuples."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value
