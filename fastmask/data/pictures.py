"""Pictures of any kind as RGB pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

WIDE_MODES = ("I", "I;16", "I;16L", "I;16B", "F")


def decode_picture(path: Path, *, upright: bool = False) -> Tensor:
    """``(3, H, W)`` uint8 RGB of a file's first frame.

    Grey, palette and CMYK become RGB; what is transparent becomes white; 16 bits become 8 by dropping the lower half,
    and floating point in 0..1 is scaled. Colour profiles are not applied.

    Args:
        path: a file that Pillow reads.
        upright: turn the picture as its EXIF orientation says.

    Raises:
        ValueError: values that no known scale brings to 8 bits.
        OSError and others of ``fastmask.data.files.UNREADABLE``: the file is missing or broken.
    """
    with Image.open(path) as image:
        if upright:
            ImageOps.exif_transpose(image, in_place=True)
        pixels = np.array(_rgb(image))
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in WIDE_MODES:
        return Image.fromarray(_eight_bits(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """``(H, W)`` uint8 of integers in 0..65535 or floating point in 0..1."""
    floating = values.dtype.kind == "f"
    limit = 1 if floating else 2**16 - 1
    low, high = values.min(), values.max()
    if not 0 <= low <= high <= limit:
        raise ValueError(f"a picture of mode {'F' if floating else 'I'} with values {low}..{high}; expected 0..{limit}")
    return np.rint(values * 255).astype(np.uint8) if floating else (values >> 8).astype(np.uint8)
