"""Pages of results: their segments read back, and pages seen in headless Chromium, without a network."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import tempfile
import threading
import zlib
from html import unescape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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
)
TIMEOUT_S = 300
# True once all pictures and all drawings in the window are there.
DRAWN = """[...document.images].every(({ complete, id }) => complete || id === "hold")
    && [...document.querySelectorAll("canvas")].every(
        (canvas) => canvas.drawing?.ids || canvas.getBoundingClientRect().top >= innerHeight)"""
# Chromium writes what it shows when all pictures have loaded. The server answers the request for this one after it has
# been asked to release it, two frames after the condition has become true.
HOLD = """<img id="hold" src="{address}/hold" style="display: none"><script>
const held = setInterval(() => {{
    if (!({condition})) return;
    clearInterval(held);
    requestAnimationFrame(() => requestAnimationFrame(() => fetch("{address}/release", {{ mode: "no-cors" }})));
}}, 10);
</script>"""

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


def dom(page: Path, until: str = DRAWN) -> str:
    """The page's HTML once a condition, a JavaScript expression, is true."""
    return _run("--dump-dom", page, until)


def screenshot(page: Path, picture: Path, size: tuple[int, int] = (1280, 1600), *, dark: bool = False) -> None:
    """Writes what a window of (width, height) pixels shows of the drawn page as a PNG file."""
    scheme = ("--blink-settings=preferredColorScheme=0",) if dark else ()
    _run(f"--screenshot={picture}", page, DRAWN, f"--window-size={size[0]},{size[1]}", *scheme)
    assert picture.is_file(), "Chromium wrote no picture"


class _Gate(ThreadingHTTPServer):
    """Answers /hold after a request for /release."""

    def __init__(self) -> None:
        released = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == "/release":
                    released.set()
                elif not released.wait(TIMEOUT_S):
                    raise TimeoutError(f"the page's condition was not true within {TIMEOUT_S} s")
                self.send_response(204)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


def _run(action: str, page: Path, until: str, *flags: str) -> str:
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory() as profile, _Gate() as gate:
        threading.Thread(target=gate.serve_forever, daemon=True).start()
        held = Path(profile, "page.html")
        held.write_text(page.read_text(encoding="utf-8") + HOLD.format(address=gate.address, condition=until), "utf-8")
        command = [CHROMIUM, *FLAGS, *flags, f"--user-data-dir={profile}/profile", action, held.as_uri()]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIMEOUT_S).stdout
        finally:
            gate.shutdown()
