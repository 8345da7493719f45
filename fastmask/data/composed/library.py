"""The real pixels of the scenes, read from the package and prepared for sampling."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fastmask.data.composed.classes import STUFF_CLASSES, THING_CLASSES
from fastmask.data.composed.icon_classes import ICON_CLASSES

ASSET_DIRECTORY = Path(__file__).parents[1] / "assets"
SPLITS = ("train", "val")
GARMENTS_PER_CLASS = {"train": 150, "val": 50}
SHEET_COLUMNS = 50
SPRITE_SIZE = 28
TEXTURE_SIZE = 384
SPRITE_MARGIN = 2
OVERSAMPLING = 2
# The side of a sprite prepared for sampling, in its own pixels.
STAMP_SIZE = (SPRITE_SIZE + 2 * SPRITE_MARGIN) * OVERSAMPLING
ICON_SIZE = SPRITE_SIZE * OVERSAMPLING
GARMENT_SATURATIONS = (0.10, 0.75)
ICON_SATURATIONS = (0.0, 0.25)
OPAQUE = 128
# 256 times the weights of cubic convolution (Keys 1981, a = -1/2) at distances 1.75, 0.75, 0.25, 1.25.
CUBIC = (-6, 58, 222, -18)


def garment_file(split: str) -> str:
    return f"garments-{split}.png"


def texture_file(split: str) -> str:
    return f"textures-{split}.png"


def icon_file(split: str) -> str:
    return f"icons-{split}.webp"


@dataclass(frozen=True)
class Library:
    """Things, which are garments or icons, and textures of one split.

    Attributes:
        stamps: ``(K, n, P, 64, 64)`` uint32, n pictures of each class of things. Each value holds two numbers in
            0..255, one in each half, so that one interpolation serves both. Garments have one plane, of brightness and
            coverage; icons have two, of green and coverage, and of red and blue.
        areas: ``(K, n)`` float64, the area of each picture as a share of its sprite.
        saturations: the least and the greatest saturation of the color that tints a thing.
        textures: ``(3, 384, 192)`` uint8: brick, grass and gravel.
        means: the mean brightness of each texture.
    """

    stamps: np.ndarray
    areas: np.ndarray
    saturations: tuple[float, float]
    textures: np.ndarray
    means: tuple[float, ...]

    @property
    def num_classes(self) -> int:
        """The number of classes of things."""
        return self.stamps.shape[0]

    @property
    def pictures_per_class(self) -> int:
        return self.stamps.shape[1]


@functools.cache
def load_library(split: str, icons: int = 0) -> Library:
    """Reads the pictures of ``"train"`` or ``"val"``: garments, or icons of the first so many classes.

    Raises:
        FileNotFoundError: the package was installed without its pictures.
    """
    if icons:
        stamps, saturations = _make_icon_stamps(read_icons(split)[:icons]), ICON_SATURATIONS
    else:
        stamps = np.stack([_make_stamps(of_class) for of_class in read_sprites(split)])[:, :, None]
        saturations = GARMENT_SATURATIONS
    areas = ((stamps[:, :, 0] & 0xFFFF) >= OPAQUE).mean((2, 3)) * (STAMP_SIZE / OVERSAMPLING / SPRITE_SIZE) ** 2
    textures = read_textures(split)
    return Library(
        stamps=stamps,
        areas=areas,
        saturations=saturations,
        textures=textures,
        means=tuple(float(texture.mean()) for texture in textures),
    )


def read_sprites(split: str) -> np.ndarray:
    """``(10, n, 28, 28)`` uint8: the garments of each class, 0 outside the garment."""
    sprites = _cut(_read(garment_file(split)), SPRITE_SIZE)
    return sprites.reshape(len(THING_CLASSES), -1, SPRITE_SIZE, SPRITE_SIZE)


def read_icons(split: str) -> np.ndarray:
    """``(150, n, 56, 56, 4)`` uint8: red, green, blue and coverage of each class's icons, one of each artist."""
    icons = _cut(_read(icon_file(split)), ICON_SIZE)
    return icons.reshape(-1, len(ICON_CLASSES), ICON_SIZE, ICON_SIZE, 4).swapaxes(0, 1)


def read_textures(split: str) -> np.ndarray:
    """``(3, 384, 192)`` uint8: this split's halves of brick, grass and gravel."""
    return _read(texture_file(split)).reshape(len(STUFF_CLASSES), TEXTURE_SIZE, -1)


def _read(name: str) -> np.ndarray:
    path = ASSET_DIRECTORY / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; fastmask was installed without its package data")
    with Image.open(path) as picture:
        return np.asarray(picture)


def make_sheet(pictures: np.ndarray) -> np.ndarray:
    """Lays ``(n, h, h, ...)`` pictures out in rows of 50."""
    size = pictures.shape[1]
    grid = pictures.reshape(-1, SHEET_COLUMNS, size, size, *pictures.shape[3:]).swapaxes(1, 2)
    return np.ascontiguousarray(grid).reshape(-1, SHEET_COLUMNS * size, *pictures.shape[3:])


def _cut(sheet: np.ndarray, size: int) -> np.ndarray:
    """The pictures ``(n, size, size, ...)`` of a sheet."""
    grid = sheet.reshape(-1, size, SHEET_COLUMNS, size, *sheet.shape[2:]).swapaxes(1, 2)
    return np.ascontiguousarray(grid).reshape(-1, size, size, *sheet.shape[2:])


def _make_stamps(sprites: np.ndarray) -> np.ndarray:
    """``(n, 28, 28)`` uint8 sprites to ``(n, 64, 64)`` uint32 stamps of brightness and coverage.

    A sprite's rim is a mixture of garment and black: the garment's share is the rim's brightness relative to the mean
    of the garment beside it. The rim and the pixels beyond are filled with that mean, so that interpolation mixes only
    garment with garment.
    """
    margin = ((0, 0), (SPRITE_MARGIN, SPRITE_MARGIN), (SPRITE_MARGIN, SPRITE_MARGIN))
    sprites = np.pad(sprites, margin).astype(np.int16)
    inside = sprites > 0
    core = inside & (_neighborhood_sum(inside) == 9)
    beside = _neighborhood_mean(sprites, core)
    is_mixed = inside & ~core & (beside > 0)
    coverage = np.where(inside, 255, 0)
    coverage[is_mixed] = np.minimum(sprites[is_mixed].astype(np.int32) * 255 // beside[is_mixed], 255)
    brightness = np.where(is_mixed, beside, sprites)
    for _ in range(SPRITE_MARGIN):
        brightness = np.where(brightness > 0, brightness, _neighborhood_mean(brightness, brightness > 0))
    return (_enlarge(brightness) << 16 | _enlarge(coverage)).astype(np.uint32)


def _make_icon_stamps(icons: np.ndarray) -> np.ndarray:
    """``(K, n, 56, 56, 4)`` uint8 icons to ``(K, n, 2, 64, 64)`` uint32 stamps.

    The color of pixels without coverage is the mean of those beside them, so that interpolation mixes no other.
    """
    margin = (STAMP_SIZE - ICON_SIZE) // 2
    padded = np.pad(icons, ((0, 0), (0, 0), (margin, margin), (margin, margin), (0, 0)))
    pixels = padded.reshape(-1, STAMP_SIZE, STAMP_SIZE, 4).astype(np.int16)
    red, green, blue, coverage = pixels.transpose(3, 0, 1, 2)
    known = coverage > 0
    for _ in range(margin):
        beside = (_neighborhood_sum(known) > 0) & ~known
        red, green, blue = (np.where(beside, _neighborhood_mean(c, known), c) for c in (red, green, blue))
        known |= beside
    planes = np.stack([green, red], 1).astype(np.uint32) << 16 | np.stack([coverage, blue], 1).astype(np.uint32)
    return planes.reshape(*icons.shape[:2], 2, STAMP_SIZE, STAMP_SIZE)


def _neighborhood_sum(planes: np.ndarray) -> np.ndarray:
    """int16 sums over each pixel's 3 x 3 neighborhood, within each plane."""
    padded = np.pad(planes.astype(np.int16), ((0, 0), (1, 1), (1, 1)))
    rows = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
    return rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]


def _neighborhood_mean(planes: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """int16 means over the chosen pixels of each 3 x 3 neighborhood; 0 where none is chosen."""
    return _neighborhood_sum(np.where(chosen, planes, 0)) // np.maximum(_neighborhood_sum(chosen), 1)


def _enlarge(planes: np.ndarray) -> np.ndarray:
    """Doubles the height and width of ``(n, h, w)`` planes of 0..255 by cubic convolution, in integers."""
    for axis in (2, 1):
        padded = np.pad(planes, [(2, 2) if a == axis else (0, 0) for a in range(3)]).astype(np.int32)
        size = planes.shape[axis]
        shape = [OVERSAMPLING * n if i == axis else n for i, n in enumerate(planes.shape)]
        taps = [padded[(slice(None),) * axis + (slice(start, start + size),)] for start in range(5)]
        halves = [sum(w * tap for w, tap in zip(CUBIC, order, strict=True)) for order in (taps[:4], taps[:0:-1])]
        planes = np.clip(np.stack(halves, axis + 1) + 128 >> 8, 0, 255)
        planes = planes.reshape(*shape)
    return planes
