"""A list of JSON records, written to disk one by one."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any


class RecordFile:
    """A JSON file with a long list, written record by record under a temporary name and renamed when complete.

    Args:
        path: the path of the file.
        prefix: the text before the records.
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
        """Writes the text after the records, and gives the file its name."""
        self._file.write("\n" + suffix)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self._path)

    def discard(self) -> None:
        """Deletes the file unless it is finished."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)
