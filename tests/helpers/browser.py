"""Pages seen in headless Chromium, without a network."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

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
