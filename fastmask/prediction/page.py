"""One HTML file of results that needs no network: text, numbers, tables, charts, pictures, and segments whose names
appear under the pointer.

Each function makes a block of HTML, and :func:`write_page` makes them a page. Text is escaped, pictures are embedded.
"""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from fastmask.files import finite, replace_file
from fastmask.prediction.overlay import Color, Palette, SegmentMap, segment_colors

LARGEST_SIDE = 800  # of pictures with segments, in pixels


def write_page(path: str | Path, title: str, lead: str, blocks: Iterable[str]) -> None:
    """Writes a page, whole or not at all.

    Args:
        path: the file to write.
        title: the heading of the page.
        lead: the line below the heading.
        blocks: results of the other functions, from top to bottom.
    """
    folder = resources.files("fastmask.prediction")
    style, script = ((folder / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    text = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>
{style}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
<p>{escape(lead)}</p>
</header>
<main>
{"".join(blocks)}</main>
<footer>Made by fastmask.</footer>
<script>
{script}</script>
</body>
</html>
"""
    # Names of files may hold bytes that are no characters.
    data = text.encode("utf-8", "xmlcharrefreplace")
    replace_file(Path(path), lambda temporary: temporary.write_bytes(data))


def heading(text: str) -> str:
    """The heading of a section."""
    return f"<h2>{escape(text)}</h2>\n"


def paragraph(text: str) -> str:
    """A paragraph."""
    return f"<p>{escape(text)}</p>\n"


def numbers(values: Mapping[str, str]) -> str:
    """The most important numbers by name, in large type."""
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in values.items())
    return f'<dl class="numbers">{items}</dl>\n'


def table(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is its header; the cells of the first column are on the left, the others on the right."""
    header, *lines = (
        "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row) + "</tr>\n"
        for row, tag in zip(rows, ["th"] + ["td"] * (len(rows) - 1), strict=True)
    )
    return f'<div class="scroll"><table>\n<thead>{header}</thead>\n{"".join(lines)}</table></div>\n'


def bars(names: Sequence[str], values: Mapping[str, Sequence[float]], colors: Palette) -> str:
    """A bar for each class and score, the classes with the highest first score on top.

    Args:
        names, colors: the name and the color of each class.
        values: by the name of a score, its value for each class, as a share of 1; nan where there is none.
    """
    columns = list(values.values())
    order = sorted(range(len(names)), key=lambda k: (math.isnan(columns[0][k]), -columns[0][k]))
    lines = ""
    for k in order:
        cells = "".join(f"<td>{_bar(column[k])}</td>" for column in columns)
        lines += f"<tr><th>{_chip(colors[k])}{escape(names[k])}</th>{cells}</tr>\n"
    header = "<th></th>" + "".join(f"<th>{escape(name)}</th>" for name in values)
    return f'<div class="scroll"><table class="bars">\n<thead><tr>{header}</tr></thead>\n{lines}</table></div>\n'


def picture(source: str | Path | Image.Image, caption: str = "") -> str:
    """A picture with a caption.

    Args:
        source: a PNG, JPEG, WebP, GIF or SVG file, or an image, which is embedded as PNG.
        caption: the text below it.
    """
    if isinstance(source, Image.Image):
        data, kind = _encoded(source, "png"), "png"
    else:
        data, kind = Path(source).read_bytes(), Path(source).suffix[1:].lower()
        kind = {"jpg": "jpeg", "svg": "svg+xml"}.get(kind, kind)
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure><img alt="{escape(caption)}" src="{_data_url(data, kind)}">{below}</figure>\n'


def row(blocks: Iterable[str]) -> str:
    """Blocks in a row, or in several where the page is narrow."""
    return f'<div class="row">\n{"".join(blocks)}</div>\n'


def segments(
    photo: Image.Image,
    maps: Mapping[str, SegmentMap],
    names: Sequence[str],
    palette: Palette,
    title: str,
    note: str = "",
) -> str:
    """A picture, and beside it once more for each map with its segments, which show their names under the pointer.

    The picture is reduced to at most 800 pixels a side, and maps to its size.

    Args:
        photo: the picture, in RGB.
        maps: the segments by a title, such as "truth".
        names, palette: the name and the color of each class.
        title, note: the text above, such as the name of the picture, and its scores.
    """
    photo = photo.copy()
    photo.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.LANCZOS)
    source = _data_url(_encoded(photo, "jpeg"), "jpeg")
    image = f'<img width="{photo.width}" height="{photo.height}" alt="{escape(title)}" src="{source}">'
    panels = [("image", image)]
    for key, of_map in maps.items():
        found = "" if of_map.shown_classes() else ": no segments"
        panels.append((key + found, _canvas(of_map, names, palette, photo.size)))
    boxes = "".join(f'<div><h3>{escape(key)}</h3><div class="view">{view}</div></div>\n' for key, view in panels)
    shown = dict.fromkeys(label for of_map in maps.values() for label in of_map.shown_classes())
    legend = "".join(f"<span>{_chip(palette[label])}{escape(names[label])}</span>" for label in shown)
    return f"""<figure class="segments"><figcaption><b>{escape(title)}</b> {escape(note)}</figcaption>
<div class="panels">
{boxes}</div>
<div class="legend">{legend}</div></figure>
"""


def mask_slider() -> str:
    """A slider for the opacity of all segments on the page; it stays in view."""
    slider = '<input type="range" min="0" max="1" step="0.01" value="0.65">'
    return f'<label class="strength">Masks {slider} Point at a mask to see its name; click to enlarge.</label>\n'


def _canvas(of_map: SegmentMap, names: Sequence[str], palette: Palette, size: tuple[int, int]) -> str:
    """An empty drawing with its segments as data, which the page's script draws."""
    if of_map.ids.size > size[0] * size[1]:
        of_map = of_map.resized(size)
    ids = of_map.indices().astype("<u2")
    classes = list(of_map.classes.values())
    kept = np.unique(ids[ids < len(classes)])  # large data sets have many classes, and a picture few
    places = np.full(len(classes) + 1, len(kept), "<u2")
    places[kept] = np.arange(len(kept))
    colors = np.rint(segment_colors(classes, palette)).clip(0, 255).astype(int).tolist()
    scores = [of_map.scores.get(key) for key in of_map.classes]
    known = [[names[classes[i]], colors[i], scores[i]] for i in kept.tolist()]
    packed = base64.b64encode(zlib.compress(places[ids].tobytes(), 9)).decode("ascii")
    height, width = ids.shape
    label = ", ".join(dict.fromkeys(name for name, *_ in known))
    return (
        f'<canvas width="{width}" height="{height}" role="img" aria-label="{escape(label)}" '
        f'data-ids="{packed}" data-segments="{escape(json.dumps(finite(known)))}"></canvas>'
    )


def _chip(color: Color) -> str:
    return '<i style="background:#{:02x}{:02x}{:02x}"></i>'.format(*map(int, color))


def _bar(share: float) -> str:
    if math.isnan(share):
        return "<span></span><b>–</b>"
    return f'<span style="--share:{share:.4f}"></span><b>{100 * share:.1f}</b>'


def _encoded(image: Image.Image, kind: str) -> bytes:
    file = BytesIO()
    image.save(file, kind, quality=85)
    return file.getvalue()


def _data_url(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
