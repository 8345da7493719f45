"""JSON files of annotations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_json(path: Path) -> Any:
    """The content of a file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no JSON; the message names it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing") from None
    except ValueError as error:
        raise ValueError(f"{path}: no readable JSON: {error}") from error


def read_coco(path: Path, needed: dict[str, tuple[str, ...]]) -> dict[str, list[dict[str, Any]]]:
    """COCO's lists of annotations.

    Args:
        path: of the file.
        needed: the lists that it must have, and what each of their entries must have.

    Raises:
        FileNotFoundError, ValueError: as for :func:`read_json`; a list or key is missing.
    """
    content = read_json(path)
    for name, keys in needed.items():
        entries = content.get(name) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise ValueError(f'{path}: no list "{name}"')
        for k, entry in enumerate(entries):
            missing = [key for key in keys if not isinstance(entry, dict) or key not in entry]
            if missing:
                raise ValueError(f'{path}: "{name}"[{k}] has no "{missing[0]}"')
    return content
