"""The pixels and the truth of a planned scene.

All arithmetic is on integers, or consists of single float64 additions, multiplications and divisions, so that the same
plan gives the same bits on any machine.
"""

from __future__ import annotations

import numpy as np

from fastmask.data.composed.library import OPAQUE, OVERSAMPLING, SPRITE_MARGIN, SPRITE_SIZE, STAMP_SIZE, Library
from fastmask.data.composed.plan import Boundary, Region, ScenePlan, Thing

VOID = 255
# A thing with a smaller visible part is left out of the scene; a texture with a smaller visible part becomes void.
MIN_VISIBLE_PIXELS = 24
MIN_VISIBLE_SHARE = 0.25
# The gray levels, before tinting, of a texture's mean and of a garment's black.
TEXTURE_LEVEL = 155
GARMENT_BLACK = 70
FIXED_POINT = 16

Window = tuple[slice, slice]


def render_scene(library: Library, plan: ScenePlan) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """The pixels and the truth of a plan.

    A thing owns the pixels of which it covers at least half; where two things do, the front one owns them. A pixel
    without a thing belongs to its texture. Things whose visible part is too small are not painted.

    Returns:
        image: ``(H, W, 3)`` uint8.
        segments: ``(H, W)`` uint8, the index of the segment that owns each pixel; 255 is void.
        labels: the class of each segment: things back to front, then textures.
    """
    covers = [_cover(library, plan.size, thing) for thing in plan.things]
    image, ground = _background(library, plan)
    num_regions = len(plan.regions)
    shown = list(range(len(covers)))
    while True:
        owner = ground.copy()
        for i in shown:
            window, _, coverage = covers[i]
            owner[window][coverage >= OPAQUE] = num_regions + i
        visible = np.bincount(owner.ravel(), minlength=num_regions + len(covers))
        hidden = [i for i in shown if visible[num_regions + i] < _least_visible(library, plan.things[i])]
        if not hidden:
            break
        shown = [i for i in shown if i not in hidden]
    for i in shown:
        _shade(image, plan, *covers[i])
        _paint(image, plan.things[i], *covers[i])

    lookup = np.full(num_regions + len(covers), VOID, np.uint8)
    labels: list[int] = []
    for i in shown:
        lookup[num_regions + i] = len(labels)
        labels.append(plan.things[i].label)
    for r, region in enumerate(plan.regions):
        if visible[r] >= MIN_VISIBLE_PIXELS:
            lookup[r] = len(labels)
            labels.append(library.num_classes + region.stuff)
    return image, lookup[owner], labels


def _least_visible(library: Library, thing: Thing) -> float:
    area = library.areas[thing.label, thing.number] * thing.length**2
    return max(MIN_VISIBLE_PIXELS, MIN_VISIBLE_SHARE * area)


def _background(library: Library, plan: ScenePlan) -> tuple[np.ndarray, np.ndarray]:
    """The textures: ``(H, W, 3)`` uint8 pixels, and ``(H, W)`` uint8 index of the region that owns each."""
    ground = np.zeros(plan.size, np.uint8)
    image = _texture(library, plan.size, plan.regions[0])
    for r, region in enumerate(plan.regions[1:], 1):
        assert region.boundary is not None  # only the first region has none
        distance = _distance(plan.size, region.boundary)
        ground[distance >= 0] = r
        weight = np.clip(np.rint(256 * distance) + 128, 0, 256).astype(np.int32)[:, :, None]
        image = image + ((_texture(library, plan.size, region) - image) * weight + 128 >> 8)
    return image.astype(np.uint8), ground


def _distance(size: tuple[int, int], boundary: Boundary) -> np.ndarray:
    """``(H, W)`` float64: about how many pixels each pixel is beyond the boundary; negative before the boundary."""
    x, y = boundary.point
    rows = np.arange(size[0])[:, None] + (0.5 - y)
    columns = np.arange(size[1])[None, :] + (0.5 - x)
    cosine, sine = boundary.normal
    across = columns * cosine + rows * sine
    if boundary.amplitude == 0:
        return across
    along = (rows * cosine - columns * sine) / boundary.wavelength + boundary.phase
    part = along - np.floor(along)
    # Two parabolas replace a sine, whose last bit differs between mathematics libraries.
    wave = np.where(part < 0.5, part * (0.5 - part), (part - 0.5) * (part - 1)) * 16
    return across + boundary.amplitude * wave


def _texture(library: Library, size: tuple[int, int], region: Region) -> np.ndarray:
    """``(H, W, 3)`` int32 in 0..255: the region's part of its picture, tinted."""
    height, width = size
    scaled = (width, height) if region.is_transposed else (height, width)
    pixels = _crop(library.textures[region.stuff], region.box, scaled)
    if region.is_transposed:
        pixels = pixels.T
    pixels = pixels[:: -1 if region.is_flipped else 1, :: -1 if region.is_mirrored else 1]
    levels = TEXTURE_LEVEL + region.contrast * (np.arange(256) - library.means[region.stuff])
    return _tint(levels, region.color).take(pixels, 0)


def _crop(texture: np.ndarray, box: tuple[float, float, float, float], size: tuple[int, int]) -> np.ndarray:
    """The box (left, top, right, bottom) of a texture as ``size`` int32 pixels: bilinear, in integers."""
    pixels = texture.astype(np.int32)
    for axis, start, stop in ((0, box[1], box[3]), (1, box[0], box[2])):
        step = (stop - start) / size[axis]
        places = np.rint((start - 0.5 + step * (np.arange(size[axis]) + 0.5)) * 256).astype(np.int64)
        places = np.clip(places, 0, (texture.shape[axis] - 1) * 256 - 1)
        weight = (places & 0xFF).astype(np.int32)
        weight = weight[:, None] if axis == 0 else weight[None, :]
        first, second = (pixels.take((places >> 8) + offset, axis) for offset in (0, 1))
        pixels = first + ((second - first) * weight + 128 >> 8)
    return pixels


def _tint(levels: np.ndarray, color: tuple[float, float, float]) -> np.ndarray:
    """``(256, 3)`` int32: the color in 0..255 of each of 256 gray levels."""
    return np.clip(np.rint(levels[:, None] * np.array(color)), 0, 255).astype(np.int32)


def _cover(library: Library, size: tuple[int, int], thing: Thing) -> tuple[Window, np.ndarray, np.ndarray]:
    """The window of the scene that a thing can reach, its ``(P, h, w)`` int32 samples there, and their coverage."""
    scale = thing.length / SPRITE_SIZE
    half = thing.half_turn
    cosine, sine = (1 - half * half) / (1 + half * half), 2 * half / (1 + half * half)
    reach = (0.5 * SPRITE_SIZE + SPRITE_MARGIN / 2) * scale * (cosine + abs(sine))
    rows, columns = (
        slice(max(int(np.floor(center - reach)), 0), max(min(int(np.ceil(center + reach)), limit), 0))
        for center, limit in ((thing.y, size[0]), (thing.x, size[1]))
    )
    one = 1 << FIXED_POINT
    step = OVERSAMPLING / scale * one
    along, across = round(step * cosine), round(step * sine)
    sign = -1 if thing.is_mirrored else 1
    center = round((STAMP_SIZE / 2 - 0.5) * one)
    start_x, start_y = columns.start + 0.5 - thing.x, rows.start + 0.5 - thing.y
    origin_x = center + sign * round(start_x * along + start_y * across)
    origin_y = center + round(start_y * along - start_x * across)
    i = np.arange(rows.stop - rows.start, dtype=np.int32)[:, None]
    j = np.arange(columns.stop - columns.start, dtype=np.int32)[None, :]
    last = (STAMP_SIZE - 1) * one - 1
    x = np.clip(origin_x + sign * (j * along + i * across), 0, last)
    y = np.clip(origin_y + (i * along - j * across), 0, last)
    samples = np.stack([_interpolate(plane, x, y) for plane in library.stamps[thing.label, thing.number]])
    return (rows, columns), samples, samples[0] & 0xFFFF


def _interpolate(stamp: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Bilinear samples of a stamp at fixed-point x and y, for both halves of each value at once.

    Weights have 8 bits, so that the product of a half with a weight needs 16 and does not overflow into the other half.
    """
    values = stamp.ravel()
    corner = (y >> FIXED_POINT) * STAMP_SIZE + (x >> FIXED_POINT)
    weight_x = ((x >> (FIXED_POINT - 8)) & 0xFF).astype(np.uint32)
    weight_y = ((y >> (FIXED_POINT - 8)) & 0xFF).astype(np.uint32)
    upper = _mix(values.take(corner), values.take(corner + 1), weight_x)
    corner += STAMP_SIZE
    lower = _mix(values.take(corner), values.take(corner + 1), weight_x)
    return _mix(upper, lower, weight_y).astype(np.int32)


def _mix(first: np.ndarray, second: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return (first * (256 - weight) + second * weight + 0x00800080) >> 8 & 0x00FF00FF


def _shade(image: np.ndarray, plan: ScenePlan, window: Window, _: np.ndarray, coverage: np.ndarray) -> None:
    target, source = zip(*map(_shift, window, plan.shadow, plan.size), strict=True)
    light = (1 << 16) - coverage[source][:, :, None] * plan.shadow_depth
    image[target] = image[target] * light >> 16


def _shift(span: slice, offset: int, limit: int) -> tuple[slice, slice]:
    """The span shifted by an offset and clipped to 0..limit, and the part of the original span that remains."""
    start, stop = max(span.start + offset, 0), max(min(span.stop + offset, limit), 0)
    return slice(start, stop), slice(start - offset - span.start, stop - offset - span.start)


def _paint(image: np.ndarray, thing: Thing, window: Window, samples: np.ndarray, coverage: np.ndarray) -> None:
    if len(samples) == 1:
        levels = GARMENT_BLACK + np.arange(256) * ((255 - GARMENT_BLACK) / 255)
        pixels = _tint(levels, thing.color).take(samples[0] >> 16, 0)
    else:
        levels = _tint(np.arange(256), thing.color)
        channels = samples[1] >> 16, samples[0] >> 16, samples[1] & 0xFFFF
        pixels = np.stack([levels[:, c].take(channel) for c, channel in enumerate(channels)], 2)
    weight = (coverage + (coverage >> 7))[:, :, None]
    below = image[window].astype(np.int32)
    image[window] = below + ((pixels - below) * weight + 128 >> 8)
