"""JSON files of numbers, which JSON does not know all of."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastmask.models.checkpoint import replace_file


def finite(value: Any) -> Any:
    """A value in types of JSON: None for a float that is not finite, also within dicts, lists and tuples."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def read_json(path: Path) -> dict[str, Any]:
    """What :func:`write_json` wrote; empty if there is no such file."""
    return json.loads(path.read_text(encoding="utf-8-sig")) if path.is_file() else {}


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a file of :func:`finite` values, whole or not at all."""
    text = json.dumps(finite(values), indent=2) + "\n"
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
