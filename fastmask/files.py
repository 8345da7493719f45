"""Files that are written whole or not at all, and JSON in them."""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def replace_files(folder: Path, writers: Mapping[str, Callable[[Path], object]]) -> None:
    """Writes several files of a folder so that an interruption leaves what was there before: each under a temporary
    name first, and only when all are complete are they renamed.

    Args:
        folder: is made if it does not exist, and so are folders in it.
        writers: by a file's path in the folder, what writes it to the path that it is given.
    """
    token = uuid.uuid4().hex
    # Not the file's own name with something added, which may be too long for a name.
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
    """The content of a file in UTF-8, with or without a byte order mark; ``default``, if one is given, where there is
    no such file.

    Raises:
        FileNotFoundError: no such file, and no ``default``.
        ValueError: it is no JSON; the message names it.
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
    """Writes a file of :func:`finite` values, whole or not at all."""
    text = json.dumps(finite(values), indent=2) + "\n"
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def finite(value: Any) -> Any:
    """A value in types of JSON, which has no infinity and no NaN: None takes their place, within dicts, lists and
    tuples too."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value
