"""A list of JSON records that grows on disk."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any


class RecordFile:
    """A JSON file that holds a long list, written record by record under a temporary name; it gets its own name when it
    is whole.

    Args:
        path: of the file.
        prefix: what stands before the records.
    """

    def __init__(self, path: Path, prefix: str):
        self._path = path
        self._temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
        self._file = self._temporary.open("w", encoding="utf-8")
        self._file.write(prefix)
        self._separator = "\n"

    def add(self, record: Any) -> None:
        """Appends a record."""
        self._file.write(self._separator + json.dumps(record))
        self._separator = ",\n"

    def finish(self, suffix: str) -> None:
        """Writes what stands after the records, and gives the file its name."""
        self._file.write("\n" + suffix)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self._path)

    def discard(self) -> None:
        """Deletes the file unless it was finished."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)
