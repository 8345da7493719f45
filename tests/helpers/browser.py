"""Pages of results: their segments read back, and pages seen in headless Chromium, without a network."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import tempfile
import zlib
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--virtual-time-budget=2000",  # of the page's own clock: what it starts on loading has ended by then
)

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


def drawn_segments(text: str) -> list[tuple[np.ndarray, list[Any]]]:
    """For each drawing of a page, ``(H, W)`` numbers of segments, and the segments' names, colors and scores."""
    drawings = re.findall(
        r'<canvas width="(\d+)" height="(\d+)"[^>]* data-ids="([^"]*)" data-segments="([^"]*)">', text
    )
    return [
        (
            np.frombuffer(zlib.decompress(base64.b64decode(ids)), "<u2").reshape(int(height), int(width)),
            json.loads(unescape(segments)),
        )
        for width, height, ids, segments in drawings
    ]


def titles(text: str) -> list[str]:
    """The titles of the page's pictures with segments."""
    return [unescape(title) for title in re.findall(r'<figure class="segments"><figcaption><b>(.*?)</b>', text)]


def dom(page: Path) -> str:
    """The page's HTML after its scripts have run."""
    return _run("--dump-dom", page)


def screenshot(page: Path, picture: Path, size: tuple[int, int] = (1280, 1600), *, dark: bool = False) -> None:
    """Writes what a window of (width, height) pixels shows of the page as a PNG file."""
    scheme = ("--blink-settings=preferredColorScheme=0",) if dark else ()
    _run(f"--screenshot={picture}", page, f"--window-size={size[0]},{size[1]}", *scheme)
    assert picture.is_file(), "Chromium wrote no picture"


def _run(action: str, page: Path, *flags: str) -> str:
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory() as profile:
        command = [CHROMIUM, *FLAGS, *flags, f"--user-data-dir={profile}", action, page.resolve().as_uri()]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout
