"""Makes the sheets of icons in ``fastmask/data/assets`` from five artists' emoji.

    npm install @iconify-json/{noto,noto-v1,fluent-emoji-flat,emojione,twemoji}
    pip install resvg-py
    python -m fastmask.data.composed.prepare_icons

Icons of the train split are those of four artists; the fifth draws the val split. Each icon is cut to what it covers,
and scaled to 56 pixels at its longer side.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastmask.data.composed.icon_classes import NAMES
from fastmask.data.composed.library import ASSET_DIRECTORY, ICON_SIZE, icon_file, make_sheet
from fastmask.files import read_json

ARTISTS = {"train": ("noto", "noto-v1", "fluent-emoji-flat", "emojione"), "val": ("twemoji",)}
DRAWN_SIZE = 8 * ICON_SIZE
# Pixels of the drawing with less coverage do not count as part of it.
MIN_COVERAGE = 64
# Levels that the sheets keep: fewer make smaller files.
COLOR_STEP = 8
COVERAGE_STEP = 16


def draw(icons: dict[str, Any], name: str) -> np.ndarray:
    """An icon of a set: ``(56, 56, 4)`` uint8, red, green, blue and coverage; black where nothing is covered.

    Args:
        icons: the content of a set's ``icons.json``.
        name: of the icon, or its alias.
    """
    import resvg_py

    while name not in icons["icons"]:
        name = icons["aliases"][name]["parent"]
    icon = icons | icons["icons"][name]
    left, top, width, height = (
        icon.get(key, default) for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, width=DRAWN_SIZE, height=round(DRAWN_SIZE * height / width))
    drawing = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    covered = drawing.getchannel("A").point(lambda coverage: 255 * (coverage >= MIN_COVERAGE))
    drawing = drawing.crop(covered.getbbox())
    size = [max(1, round(length * ICON_SIZE / max(drawing.size))) for length in drawing.size]
    pixels = np.asarray(drawing).astype(np.float32)
    pixels[..., :3] *= pixels[..., 3:] / 255
    planes = [Image.fromarray(pixels[..., c]).resize(size, Image.Resampling.LANCZOS) for c in range(4)]
    scaled = np.stack([np.asarray(plane) for plane in planes], -1)
    coverage = _in_steps(scaled[..., 3:], COVERAGE_STEP)
    color = _in_steps(scaled[..., :3] * 255 / np.maximum(scaled[..., 3:], 1), COLOR_STEP)
    tile = np.zeros((ICON_SIZE, ICON_SIZE, 4), np.uint8)
    x, y = ((ICON_SIZE - length) // 2 for length in size)
    tile[y : y + size[1], x : x + size[0]] = np.concatenate([np.where(coverage > 0, color, 0), coverage], -1)
    return tile


def _in_steps(values: np.ndarray, step: int) -> np.ndarray:
    """Multiples of a step, and 255."""
    return np.clip(np.rint(values / step) * step, 0, 255)


def icon_sheet(packages: Path, artists: Sequence[str]) -> np.ndarray:
    """The icons of all classes, artist after artist, in rows of 50: ``(h, w, 4)`` uint8.

    Raises:
        FileNotFoundError: a set of icons is not in ``packages``.
    """
    sets = [read_json(packages / "@iconify-json" / artist / "icons.json") for artist in artists]
    return make_sheet(np.stack([draw(icons, name) for icons in sets for name in NAMES.split()]))


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the icons in fastmask/data/assets from their sources.")
    parser.add_argument("--packages", type=Path, default=Path("node_modules"), help="folder of the npm packages")
    parser.add_argument("--output", type=Path, default=ASSET_DIRECTORY, help="folder to write")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for split, artists in ARTISTS.items():
        path = options.output / icon_file(split)
        Image.fromarray(icon_sheet(options.packages, artists)).save(path, lossless=True, method=4)
        print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
