"""Processes with a time limit, stopped together with what they started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GRACE_SECONDS = 3.0  # for a process that is asked to end


def stop(process: subprocess.Popen[bytes] | None) -> None:
    """Ends a process that leads a session of its own, and all that it started."""
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
    """The exit status of a command whose output goes to ``log``; None if its time was up."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            list(command), cwd=cwd, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | dict(environment or {}),  # what was said outlives the process
        )  # fmt: skip
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            stop(process)
