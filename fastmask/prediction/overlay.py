"""Draws segmentations: colors over the picture, outlines, names, and a legend of the classes."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

Color = tuple[int, int, int]
Palette = Sequence[Color]

PAPER: Color = (255, 255, 255)
INK: Color = (38, 43, 51)
OUTLINE: Color = (255, 255, 255)
OPACITY = 0.45  # of the segments' colors over the picture
# Lightness added to the class's color for its first, second, ... segment.
SEGMENT_SHADES = (0.0, 0.22, -0.20, 0.40, -0.34)
# Longer sides of overlays, in pixels: smaller pictures are enlarged by whole factors, larger ones are reduced.
SMALLEST_SIDE, LARGEST_SIDE = 800, 1600
# Names are placed on a map of at most this side, since their places need not be exact to the pixel.
PLACING_SIDE = 400
LARGE_REGION = 0.02  # share of the picture from which every region of a segment is named, not only its thickest


class SegmentMap(NamedTuple):
    """The segments of a picture.

    Attributes:
        ids: ``(H, W)`` integers; the ids of segments lie within a range that fits into a table, such as COCO's 24 bits.
        classes: the class of each id that is a segment; other pixels are unlabeled.
        scores: the scores of those ids that have one.
    """

    ids: np.ndarray
    classes: Mapping[int, int]
    scores: Mapping[int, float] = MappingProxyType({})

    @staticmethod
    def of_labels(labels: np.ndarray, num_classes: int) -> SegmentMap:
        """The segments of a label map, one for each class."""
        return SegmentMap(labels, {label: label for label in range(num_classes)})

    @staticmethod
    def of_masks(size: tuple[int, int], masks: Iterable[tuple[np.ndarray, int, float | None]]) -> SegmentMap:
        """Masks on a grid of (H, W), each with its class and its score if it has one, later ones over earlier ones."""
        ids = np.zeros(size, np.int32)
        classes, scores = {}, {}
        for i, (mask, label, score) in enumerate(masks, 1):
            ids[mask] = i
            classes[i] = label
            if score is not None:
                scores[i] = score
        return SegmentMap(ids, classes, scores)

    @staticmethod
    def of_panoptic(ids: np.ndarray, infos: Sequence[Mapping[str, Any]]) -> SegmentMap:
        """The segments of a result of ``panoptic_inference``; a score may be missing."""
        classes = {int(info["id"]): int(info["category_id"]) for info in infos}
        return SegmentMap(ids, classes, {int(info["id"]): info["score"] for info in infos if "score" in info})

    def resized(self, size: tuple[int, int]) -> SegmentMap:
        """The same segments on another grid of (width, height), each pixel as its nearest."""
        rows, columns = (
            (np.arange(new) + 0.5) * old / new for new, old in zip(size[::-1], self.ids.shape, strict=True)
        )
        return self._replace(ids=self.ids[rows.astype(np.int64)[:, None], columns.astype(np.int64)])

    def shown_classes(self) -> list[int]:
        """The classes that have a pixel, the one with most pixels first."""
        counts = np.bincount(self.indices().ravel(), minlength=len(self.classes))
        areas: dict[int, int] = {}
        for label, area in zip(self.classes.values(), counts.tolist(), strict=False):
            areas[label] = areas.get(label, 0) + area
        return sorted((label for label in areas if areas[label]), key=areas.__getitem__, reverse=True)

    def indices(self) -> np.ndarray:
        """``(H, W)`` int32: the place of each pixel's segment in ``classes``; their number where there is none."""
        known = np.array(list(self.classes), np.int64)
        if len(known) == 0:
            return np.zeros(self.ids.shape, np.int32)
        first, beyond = known.min(), np.ptp(known) + 1
        table = np.full(beyond + 1, len(known), np.int32)
        table[known - first] = np.arange(len(known))
        places = self.ids.astype(np.int64) - first
        places[(places < 0) | (places > beyond)] = beyond
        return table[places]


def draw_overlay(photo: Image.Image, segments: SegmentMap, names: Sequence[str], palette: Palette) -> Image.Image:
    """The picture with its segments drawn over it, and below a legend of their classes, the largest first.

    The longer side of the result lies between 800 and 1600 pixels.

    Args:
        photo: the picture, in RGB.
        segments: the segments to draw, of any size.
        names, palette: the name and the color of each class.
    """
    size = _drawn_size(photo.size)
    photo = photo.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)
    if segments.ids.size > photo.width * photo.height:
        segments = segments.resized(size)
    panel = draw_segments(photo, segments, names, palette)
    shown = segments.shown_classes()
    if not shown:
        return panel
    text_size = _text_size(size)
    margin = text_size // 2
    width = max(panel.width, SMALLEST_SIDE // 2)
    legend = draw_legend(width - 2 * margin, [names[k] for k in shown], [palette[k] for k in shown], text_size)
    sheet = Image.new("RGB", (max(width, legend.width + 2 * margin), panel.height + legend.height + 2 * margin), PAPER)
    sheet.paste(panel, (0, 0))
    sheet.paste(legend, (margin, panel.height + margin))
    return sheet


def draw_segments(photo: Image.Image, segments: SegmentMap, names: Sequence[str], palette: Palette) -> Image.Image:
    """The picture under transparent segments in the colors of their classes, outlined and named. Pixels without a
    segment stay as they are. The result has the picture's size.
    """
    indices = segments.indices()
    scaled = SegmentMap(indices, {}).resized(photo.size).ids
    colors = segment_colors(segments.classes.values(), palette).clip(0, 255).astype(np.uint8)
    drawn = Image.fromarray(colors[scaled])
    opacity = np.where(scaled < len(segments.classes), round(255 * OPACITY), 0).astype(np.uint8)
    panel = Image.composite(drawn, photo, Image.fromarray(opacity))
    panel.paste(OUTLINE, mask=Image.fromarray(_outlines(scaled)))
    _write_names(panel, indices, list(segments.classes.values()), names)
    return panel


def draw_legend(width: int, names: Sequence[str], palette: Palette, text_size: int = 14) -> Image.Image:
    """A colored chip and a name for each class, in lines of at most ``width`` pixels (more if a name is longer)."""
    font = text_font(text_size)
    chip, line, gap = round(1.15 * text_size), 2 * text_size, round(1.6 * text_size)
    places = []
    left, top, right = 0, 0, width
    for name in names:
        length = chip + text_size // 2 + round(font.getlength(name))
        if left > 0 and left + length > width:
            left, top = 0, top + line
        places.append((left, top))
        right = max(right, left + length)
        left += length + gap
    legend = Image.new("RGB", (right, top + line), PAPER)
    draw = ImageDraw.Draw(legend)
    for (x, y), name, color in zip(places, names, palette, strict=False):
        y += (line - chip) // 2
        draw.rounded_rectangle((x, y, x + chip, y + chip), chip // 4, tuple(color))
        draw.text((x + chip + text_size // 2, y + chip / 2), name, INK, font, anchor="lm")
    return legend


@functools.cache
def text_font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font that comes with Pillow."""
    return ImageFont.load_default(size)


def _drawn_size(size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of the overlay of a picture."""
    longer = max(size)
    scale = -(-SMALLEST_SIDE // longer) if longer <= LARGEST_SIDE else LARGEST_SIDE / longer
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _text_size(size: tuple[int, int]) -> int:
    return min(max(round(max(size) / 70), 13), 22)


def segment_colors(classes: Iterable[int], palette: Palette) -> np.ndarray:
    """``(S + 1, 3)``: the colors of segments, the last one unused."""
    seen: dict[int, int] = {}
    colors = []
    for label in classes:
        place = seen.get(label, 0)
        seen[label] = place + 1
        colors.append(_shade(palette[label], SEGMENT_SHADES[place % len(SEGMENT_SHADES)]))
    return np.array([*colors, (0, 0, 0)], float)


def _shade(color: Color, lightness: float) -> np.ndarray:
    """The color moved towards white (positive lightness) or black."""
    goal = 255.0 if lightness > 0 else 0.0
    return np.array(color) * (1 - abs(lightness)) + goal * abs(lightness)


def _outlines(indices: np.ndarray) -> np.ndarray:
    """``(H, W)`` bool: pixels that lie below or to the right of another segment."""
    edges = np.zeros(indices.shape, bool)
    edges[1:] |= indices[1:] != indices[:-1]
    edges[:, 1:] |= indices[:, 1:] != indices[:, :-1]
    return edges


def _write_names(panel: Image.Image, indices: np.ndarray, classes: Sequence[int], names: Sequence[str]) -> None:
    """Writes names into the thickest region of each segment and into its other large regions, where they are thick
    enough.
    """
    shrink = max(1, -(-max(indices.shape) // PLACING_SIDE))
    indices = indices[shrink // 2 :: shrink, shrink // 2 :: shrink] if min(indices.shape) > shrink else indices
    # Regions within their outlines: those of two segments never touch, so that one labeling finds all of them.
    framed = np.pad(indices, 1, constant_values=-1)
    inner = ~_outlines(framed)[1:-1, 1:-1] & (indices < len(classes))
    regions, num_regions = ndimage.label(inner)
    if num_regions == 0:
        return
    depth = ndimage.distance_transform_edt(np.pad(inner, 1))[1:-1, 1:-1] + 0.5
    thickest = np.array(ndimage.maximum_position(depth, regions, np.arange(1, num_regions + 1)))
    thickness = depth[thickest[:, 0], thickest[:, 1]]
    areas = np.bincount(regions.ravel())[1:]
    owners = indices[thickest[:, 0], thickest[:, 1]]
    named: set[int] = set()
    taken: list[tuple[float, float, float, float]] = []
    scale = panel.width / indices.shape[1], panel.height / indices.shape[0]
    text_size = _text_size(panel.size)
    font = text_font(text_size)
    draw = ImageDraw.Draw(panel, "RGBA")
    for k in np.argsort(-thickness, kind="stable").tolist():
        owner = int(owners[k])
        if thickness[k] * min(scale) < 0.8 * text_size:
            break
        name = names[classes[owner]]
        text_width = font.getlength(name)
        if thickness[k] * min(scale) < 0.36 * text_width:
            continue
        if owner in named and areas[k] < LARGE_REGION * indices.size:
            continue
        box = _name_box(panel.size, thickest[k], scale, text_width, text_size)
        if any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken):
            continue
        named.add(owner)
        taken.append(box)
        draw.rounded_rectangle(box, (box[3] - box[1]) / 2, (20, 24, 32, 170))
        draw.text(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), name, (255, 255, 255, 255), font, anchor="mm")


def _name_box(
    size: tuple[int, int], cell: np.ndarray, scale: tuple[float, float], text_width: float, text_size: int
) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of the plate behind a name, about the middle of a cell and within the picture."""
    half_width, half_height = text_width / 2 + 0.5 * text_size, 0.8 * text_size
    x = min(max((cell[1] + 0.5) * scale[0], half_width + 2), size[0] - half_width - 3)
    y = min(max((cell[0] + 0.5) * scale[1], half_height + 2), size[1] - half_height - 3)
    return x - half_width, y - half_height, x + half_width, y + half_height
