"""The pictures that the demo writes: results beside their truth, and the loss curve."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage
from torch import Tensor

Colour = tuple[int, int, int]
Palette = Sequence[Colour]
SegmentInfo = Mapping[str, int | float | bool]

BACKGROUND: Colour = (255, 255, 255)
INK: Colour = (38, 43, 51)
UNLABELLED: Colour = (70, 74, 82)
GUTTER = 12
CAPTION_HEIGHT = 30
# Lightness added to the class's colour for its first, second, ... instance.
INSTANCE_SHADES = (0.0, 0.22, -0.20, 0.40, -0.34)
TEXT_SIZE = 13


def side_by_side(
    image: Tensor | np.ndarray,
    truth_segments: Tensor | np.ndarray,
    truth_labels: Tensor | Sequence[int],
    semantic: Tensor | np.ndarray,
    panoptic: tuple[Tensor | np.ndarray, Sequence[SegmentInfo]],
    class_names: Sequence[str],
    palette: Palette,
    *,
    magnification: int = 3,
    captions: bool = True,
) -> Image.Image:
    """One row: the image, its truth, the semantic result and the panoptic result.

    Args:
        image: ``(3, H, W)`` float in 0..1.
        truth_segments: ``(H, W)`` integers, the index of each pixel's segment; any other value is unlabelled.
        truth_labels: ``(M,)`` the class of each segment.
        semantic: ``(H, W)`` integers, the class of each pixel.
        panoptic: ``(H, W)`` integers, the id of each pixel's segment, and the segments' ``"id"`` and ``"category_id"``,
            as ``panoptic_inference`` returns them.
        class_names, palette: the name and the colour of each class.
        magnification: how many pixels of the picture show one pixel of the image, along each side.
        captions: write above each panel what it shows.
    """
    pixels = np.clip(np.rint(np.moveaxis(_array(image), 0, -1) * 255), 0, 255).astype(np.uint8)
    height, width = pixels.shape[:2]
    size = (width * magnification, height * magnification)
    photo = Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS)
    segmentation, infos = panoptic
    classes = _array(truth_labels).tolist()
    semantic = _array(semantic)
    segment_maps = (
        (_array(truth_segments), dict(enumerate(classes))),
        (semantic, {int(c): int(c) for c in np.unique(semantic) if 0 <= c < len(class_names)}),
        (_array(segmentation), {int(info["id"]): int(info["category_id"]) for info in infos}),
    )
    panels = [photo]
    panels += [_map_panel(photo, segments, ids, class_names, palette) for segments, ids in segment_maps]
    names = ("image", "truth", "semantic result", "panoptic result")
    top = CAPTION_HEIGHT if captions else 0
    row = Image.new("RGB", (len(panels) * (size[0] + GUTTER) - GUTTER, size[1] + top), BACKGROUND)
    draw = ImageDraw.Draw(row)
    for i, (name, panel) in enumerate(zip(names, panels, strict=True)):
        left = i * (size[0] + GUTTER)
        row.paste(panel, (left, top))
        if captions:
            draw.text((left, top - 8), name, INK, _font(16, bold=True), anchor="ls")
    return row


def contact_sheet(
    rows: Sequence[Image.Image], class_names: Sequence[str] = (), palette: Palette = (), *, title: str = ""
) -> Image.Image:
    """The rows below each other with a margin around them, a title above, and below a legend of the classes.

    Raises:
        ValueError: no rows.
    """
    if len(rows) == 0:
        raise ValueError("rows is empty; expected at least one picture")
    margin = 2 * GUTTER
    width = max(row.width for row in rows)
    top = margin + (CAPTION_HEIGHT + GUTTER if title else 0)
    legend = _legend(width, class_names, palette) if class_names else None
    height = top + sum(row.height + GUTTER for row in rows) - GUTTER + margin
    height += legend.height + GUTTER if legend else 0
    sheet = Image.new("RGB", (width + 2 * margin, height), BACKGROUND)
    if title:
        ImageDraw.Draw(sheet).text((margin, margin), title, INK, _font(22, bold=True))
    for row in rows:
        sheet.paste(row, (margin, top))
        top += row.height + GUTTER
    if legend:
        sheet.paste(legend, (margin, top + GUTTER))
    return sheet


def plot_losses(history: Sequence[Mapping[str, float]], path: str | Path, *, total: str = "loss") -> None:
    """Writes the loss curve: at the left the total, each step and smoothed, at the right its components, smoothed.

    Args:
        history: the losses of each step by name, every step with the same names.
        path: the picture to write; its suffix chooses the format.
        total: the name of the total among them.

    Raises:
        ValueError: an empty history, or one without the total.
    """
    if len(history) == 0 or total not in history[0]:
        raise ValueError(f"history has {len(history)} steps; expected at least one, each with {total!r}")
    curves = {name: np.array([step[name] for step in history], float) for name in history[0]}
    steps = np.arange(1, len(history) + 1)
    figure = Figure(figsize=(10.5, 4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.plot(steps, curves[total], color="#4285f4", alpha=0.25, linewidth=0.8)
    left.plot(steps, _smoothed(curves[total]), color="#1a56c4", linewidth=2)
    left.set_title("total loss", loc="left", fontweight="bold")
    colours = ("#ef5350", "#26a67b", "#7e57c2", "#f59f1a", "#00acc1", "#d55ccb")
    components = [name for name in curves if name != total]
    for i, name in enumerate(components):
        right.plot(steps, _smoothed(curves[name]), color=colours[i % len(colours)], linewidth=2, label=name)
    right.set_title("its components", loc="left", fontweight="bold")
    if components:
        right.legend(frameon=False)
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.set_xlim(1, max(len(history), 2))
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", color="#e3e6ea", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def _array(values: Tensor | np.ndarray | Sequence[int]) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _map_panel(
    photo: Image.Image, segments: np.ndarray, classes: Mapping[int, int], names: Sequence[str], palette: Palette
) -> Image.Image:
    """The segments in the colours of their classes over the photograph's light and shade, outlined and named."""
    scaled = np.asarray(Image.fromarray(segments.astype(np.int32)).resize(photo.size, Image.Resampling.NEAREST))
    light = np.asarray(photo.convert("L"), np.float32)[:, :, None] / 255
    colours = np.empty((*scaled.shape, 3), np.float32)
    colours[:] = UNLABELLED
    instances: dict[int, int] = {}
    for segment, label in classes.items():
        instance = instances.get(label, 0)
        instances[label] = instance + 1
        colours[scaled == segment] = _shade(palette[label], INSTANCE_SHADES[instance % len(INSTANCE_SHADES)])
    colours = colours * (0.62 + 0.5 * light)
    edges = np.zeros(scaled.shape, bool)
    differs = scaled[1:] != scaled[:-1]
    edges[1:] |= differs
    edges[:-1] |= differs
    differs = scaled[:, 1:] != scaled[:, :-1]
    edges[:, 1:] |= differs
    edges[:, :-1] |= differs
    colours[edges] = 255
    panel = Image.fromarray(np.clip(colours, 0, 255).astype(np.uint8))
    for segment, label in classes.items():
        _write_name(panel, segments == segment, names[label])
    return panel


def _shade(colour: Colour, lightness: float) -> np.ndarray:
    """The colour moved towards white (positive lightness) or black."""
    goal = 255.0 if lightness > 0 else 0.0
    return np.array(colour) * (1 - abs(lightness)) + goal * abs(lightness)


def _write_name(panel: Image.Image, mask: np.ndarray, name: str) -> None:
    """Writes a segment's name where the segment is thickest, if it is thick enough to carry it."""
    depth = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    row, column = np.unravel_index(depth.argmax(), depth.shape)
    magnification = panel.width / mask.shape[1]
    thickness = depth[row, column] * magnification
    x, y = (column + 0.5) * magnification, (row + 0.5) * magnification
    font = _font(TEXT_SIZE)
    text_width = font.getlength(name)
    if thickness < max(0.8 * TEXT_SIZE, 0.3 * text_width):
        return
    half_width, half_height = text_width / 2 + 6, TEXT_SIZE / 2 + 4
    x = min(max(x, half_width + 2), panel.width - half_width - 3)
    y = min(max(y, half_height + 2), panel.height - half_height - 3)
    draw = ImageDraw.Draw(panel, "RGBA")
    box = (x - half_width, y - half_height, x + half_width, y + half_height)
    draw.rounded_rectangle(box, half_height, (20, 24, 32, 170))
    draw.text((x, y), name, (255, 255, 255, 255), font, anchor="mm")


def _legend(width: int, names: Sequence[str], palette: Palette) -> Image.Image:
    font = _font(14)
    chip, line = 16, 28
    places = []
    left, top = 0, 0
    for name in names:
        length = chip + 8 + round(font.getlength(name)) + 22
        if left > 0 and left + length > width:
            left, top = 0, top + line
        places.append((left, top))
        left += length
    legend = Image.new("RGB", (width, top + line), BACKGROUND)
    draw = ImageDraw.Draw(legend)
    for (x, y), name, colour in zip(places, names, palette, strict=False):
        draw.rounded_rectangle((x, y + 4, x + chip, y + 4 + chip), 4, tuple(colour))
        draw.text((x + chip + 8, y + 4 + chip / 2), name, INK, font, anchor="lm")
    return legend


@functools.cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(str(folder / ("DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf")), size)


def _smoothed(values: np.ndarray) -> np.ndarray:
    """The values averaged over about a twentieth of the curve, without lag."""
    return ndimage.gaussian_filter1d(values, max(len(values) / 60, 1e-3), mode="nearest")
