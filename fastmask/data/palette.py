"""Colors for data sets without a palette."""

from __future__ import annotations

import colorsys

GOLDEN_SECTION = 0.6180339887498949


def distinct_colors(count: int) -> tuple[tuple[int, int, int], ...]:
    """RGB colors in 0..255, of which neighbors differ: their hues are a golden section of the circle apart."""
    colors = []
    for k in range(count):
        shade = k // 3 % 3
        red, green, blue = colorsys.hsv_to_rgb(k * GOLDEN_SECTION % 1, (0.75, 0.5, 0.9)[shade], (0.95, 0.8, 0.6)[shade])
        colors.append((round(255 * red), round(255 * green), round(255 * blue)))
    return tuple(colors)
