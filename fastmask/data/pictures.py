"""Decodes pictures of any kind to RGB pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

WIDE_MODES = ("I", "I;16", "I;16L", "I;16B", "F")
# The operation that makes a picture upright, by its EXIF orientation.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)  # orientations that swap height and width


def decode_picture(file: Path | BinaryIO) -> Tensor:
    """A file's first frame as ``(3, H, W)`` uint8 RGB, rotated as its EXIF orientation says.

    Gray, palette and CMYK pictures become RGB; transparent pixels become white; 16 bits become 8 by dropping the lower
    half, and floating point in 0..1 is scaled. Color profiles are not applied.

    Args:
        file: a picture in a format that Pillow reads.

    Raises:
        ValueError: the values have an unknown range, so that they cannot be scaled to 8 bits.
        OSError and others of ``fastmask.data.image_files.UNREADABLE``: the file is missing or broken.
    """
    with Image.open(file) as image:
        image.load()  # the orientation may be stored after the pixels
        turn = TURNS.get(_orientation(image))
        pixels = np.array(_rgb(image if turn is None else image.transpose(turn)))
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def picture_size(path: Path) -> tuple[int, int]:
    """(H, W) of :func:`decode_picture`, as far as a file's header tells: a PNG's orientation may be stored after its
    pixels, and Pillow may report a TIFF's size as if it were already rotated.
    """
    with Image.open(path) as image:
        sideways = _orientation(image) in SIDEWAYS
        return (image.width, image.height) if sideways else (image.height, image.width)


def _orientation(image: Image.Image) -> Any:
    """The orientation in the EXIF data read so far; None if there is none or the data are damaged."""
    try:
        # Not image.getexif(), which decodes a whole PNG to find the orientation.
        return Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    except Exception:  # Pillow raises errors of many kinds for damaged EXIF data, which other readers ignore
        return None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in WIDE_MODES:
        return Image.fromarray(_eight_bits(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Scales integers in 0..65535 or floating point in 0..1 to ``(H, W)`` uint8."""
    floating = values.dtype.kind == "f"
    limit = 1 if floating else 2**16 - 1
    low, high = values.min(), values.max()
    if not 0 <= low <= high <= limit:
        raise ValueError(f"a picture of mode {'F' if floating else 'I'} with values {low}..{high}; expected 0..{limit}")
    return np.rint(values * 255).astype(np.uint8) if floating else (values >> 8).astype(np.uint8)
