"""Pictures of results beside their truth, in rows and on sheets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from fastmask.prediction.overlay import INK, PAPER, Palette, SegmentMap, draw_legend, draw_segments, text_font

SegmentInfo = Mapping[str, int | float | bool]

GUTTER = 12
CAPTION_HEIGHT = 30


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
        truth_segments: ``(H, W)`` integers, the index of each pixel's segment; other values are unlabeled.
        truth_labels: ``(M,)`` the class of each segment.
        semantic: ``(H, W)`` integers, the class of each pixel.
        panoptic: ``(H, W)`` integers, the id of each pixel's segment, and the segments' ``"id"`` and ``"category_id"``,
            as ``panoptic_inference`` returns them.
        class_names, palette: the name and the color of each class.
        magnification: the pixels of the picture for one pixel of the image, along each side.
        captions: write a title above each panel.
    """
    pixels = np.clip(np.rint(np.moveaxis(_array(image), 0, -1) * 255), 0, 255).astype(np.uint8)
    height, width = pixels.shape[:2]
    size = (width * magnification, height * magnification)
    photo = Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS)
    ids, infos = panoptic
    maps = (
        SegmentMap(_array(truth_segments), dict(enumerate(_array(truth_labels).tolist()))),
        SegmentMap.of_labels(_array(semantic), len(class_names)),
        SegmentMap.of_panoptic(_array(ids), infos),
    )
    panels = [photo, *(draw_segments(photo, segments, class_names, palette) for segments in maps)]
    names = ("image", "truth", "semantic result", "panoptic result")
    top = CAPTION_HEIGHT if captions else 0
    row = Image.new("RGB", (len(panels) * (size[0] + GUTTER) - GUTTER, size[1] + top), PAPER)
    draw = ImageDraw.Draw(row)
    for i, (name, panel) in enumerate(zip(names, panels, strict=True)):
        left = i * (size[0] + GUTTER)
        row.paste(panel, (left, top))
        if captions:
            draw.text((left, top - 8), name, INK, text_font(17), anchor="ls")
    return row


def contact_sheet(
    rows: Sequence[Image.Image], class_names: Sequence[str] = (), palette: Palette = (), *, title: str = ""
) -> Image.Image:
    """The rows below each other with a margin, a title above and a legend of the classes below.

    Raises:
        ValueError: no rows.
    """
    if len(rows) == 0:
        raise ValueError("rows is empty; expected at least one picture")
    margin = 2 * GUTTER
    width = max(row.width for row in rows)
    top = margin + (CAPTION_HEIGHT + GUTTER if title else 0)
    legend = draw_legend(width, class_names, palette) if class_names else None
    height = top + sum(row.height + GUTTER for row in rows) - GUTTER + margin
    height += legend.height + GUTTER if legend else 0
    sheet = Image.new("RGB", (width + 2 * margin, height), PAPER)
    if title:
        ImageDraw.Draw(sheet).text((margin, margin), title, INK, text_font(24))
    for row in rows:
        sheet.paste(row, (margin, top))
        top += row.height + GUTTER
    if legend:
        sheet.paste(legend, (margin, top + GUTTER))
    return sheet


def _array(values: Tensor | np.ndarray | Sequence[int]) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
