"""Processes with a time limit, which are stopped together with their children."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GRACE_SECONDS = 3.0  # between asking a process to end and killing it


def stop(process: subprocess.Popen[bytes] | None) -> None:
    """Ends a process that leads its own session, and all its children."""
    if process is None:
        return
    for signal_, patience in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal_)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            break


def run_limited(
    command: Sequence[str], seconds: float, log: Path, *, cwd: Path, environment: Mapping[str, str] | None = None
) -> int | None:
    """Runs a command with its output in ``log``; returns its exit status, or None if its time was up."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            list(command), cwd=cwd, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | dict(environment or {}),  # survives a kill
        )  # fmt: skip
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            stop(process)
