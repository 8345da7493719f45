"""Draws the plan of a scene: textures and things as plain numbers, which tests can read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastmask.data.composed.classes import STUFF_CLASSES
from fastmask.data.composed.library import Library

MAX_THINGS = 6
EMPTY_SHARE = 0.04
# How often a scene has one texture, and how often at most two.
TEXTURE_SHARES = (0.40, 0.85)
# Texture pixels per pixel of the scene; with more, bilinear samples would skip the texture's grain.
MAX_REDUCTION = 1.5
STRAIGHT_SHARE = 0.4
# Natural hues that overlap, so that color alone does not tell the textures apart.
TEXTURE_HUES = {"brick": 0.04, "grass": 0.24, "gravel": 0.10}
HUE_SPREAD = 0.16
# Lengths are shares of the scene's shorter side.
THING_LENGTHS = (0.26, 0.66)
SHADOW_LENGTHS = (0.015, 0.035)
SHADOW_DEPTHS = (40, 120)
MAX_HALF_TURN = 0.16


class Draws:
    """Random numbers that depend only on the key.

    They are made from the raw words of the Philox generator, which are the same in all versions of NumPy.
    """

    def __init__(self, seed: int, split_index: int, index: int):
        self._generator = np.random.Philox(key=np.array([seed, split_index << 62 | index], np.uint64))
        self._words: list[int] = []

    def word(self) -> int:
        if not self._words:
            self._words = self._generator.random_raw(128).tolist()[::-1]
        return self._words.pop()

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * ((self.word() >> 11) * 2.0**-53)

    def below(self, bound: int) -> int:
        return self.word() % bound

    def permutation(self, size: int) -> list[int]:
        order = list(range(size))
        for last in range(size - 1, 0, -1):
            other = self.below(last + 1)
            order[last], order[other] = order[other], order[last]
        return order

    def direction(self) -> tuple[float, float]:
        """A unit vector (cosine, sine), computed without trigonometry from the tangent of half its angle."""
        half = self.uniform(-1, 1)
        sign = 1 - 2 * self.below(2)
        return sign * (1 - half * half) / (1 + half * half), sign * 2 * half / (1 + half * half)


@dataclass(frozen=True)
class Boundary:
    """The curve beyond which a texture covers earlier ones: a line through a point (x, y), or a wave along a line."""

    point: tuple[float, float]
    normal: tuple[float, float]
    amplitude: float
    wavelength: float
    phase: float


@dataclass(frozen=True)
class Region:
    """One texture of the background: its class, the visible part of its picture, and its look."""

    stuff: int
    box: tuple[float, float, float, float]
    is_transposed: bool
    is_mirrored: bool
    is_flipped: bool
    color: tuple[float, float, float]
    contrast: float
    boundary: Boundary | None


@dataclass(frozen=True)
class Thing:
    """One garment or icon: its class and number, its center, the length of its sprite in pixels, and its look.

    ``half_turn`` is the tangent of half the angle by which it is turned.
    """

    label: int
    number: int
    x: float
    y: float
    length: float
    half_turn: float
    is_mirrored: bool
    color: tuple[float, float, float]


@dataclass(frozen=True)
class ScenePlan:
    """The content of a scene of (height, width) pixels: textures in painting order, then things from back to front.

    A thing's shadow is offset by ``shadow`` = (rows, columns) and takes ``shadow_depth`` 256ths of the light. It does
    not change the truth.
    """

    size: tuple[int, int]
    shadow: tuple[int, int]
    shadow_depth: int
    regions: tuple[Region, ...]
    things: tuple[Thing, ...]


def plan_scene(library: Library, draws: Draws, size: tuple[int, int]) -> ScenePlan:
    """Draws one to three textures, and up to six things of any class, position, size, rotation and color."""
    share = draws.uniform()
    num_regions = 1 + sum(share >= limit for limit in TEXTURE_SHARES)
    stuff = draws.permutation(len(STUFF_CLASSES))[:num_regions]
    regions = tuple(_draw_region(library, draws, size, texture, i > 0) for i, texture in enumerate(stuff))
    num_things = 0 if draws.uniform() < EMPTY_SHARE else 1 + draws.below(MAX_THINGS)
    things = tuple(_draw_thing(library, draws, size) for _ in range(num_things))
    cosine, sine = draws.direction()
    distance = min(size) * draws.uniform(*SHADOW_LENGTHS)
    shadow = (round(distance * sine), round(distance * cosine))
    return ScenePlan(size, shadow, round(draws.uniform(*SHADOW_DEPTHS)), regions, things)


def _draw_region(library: Library, draws: Draws, size: tuple[int, int], stuff: int, has_boundary: bool) -> Region:
    height, width = size
    is_transposed = draws.below(2) == 1
    box_width, box_height = (height, width) if is_transposed else (width, height)
    picture_height, picture_width = library.textures[stuff].shape
    zoom = min(picture_width / box_width, picture_height / box_height, MAX_REDUCTION) * draws.uniform(0.65, 1.0)
    left = draws.uniform(0, picture_width - box_width * zoom)
    top = draws.uniform(0, picture_height - box_height * zoom)
    hue = TEXTURE_HUES[STUFF_CLASSES[stuff]] + draws.uniform(-HUE_SPREAD, HUE_SPREAD)
    boundary = None
    if has_boundary:
        shorter = min(size)
        amplitude = 0.0 if draws.uniform() < STRAIGHT_SHARE else shorter * draws.uniform(0.02, 0.07)
        boundary = Boundary(
            point=(width * draws.uniform(0.2, 0.8), height * draws.uniform(0.2, 0.8)),
            normal=draws.direction(),
            amplitude=amplitude,
            wavelength=shorter * draws.uniform(0.5, 1.2),
            phase=draws.uniform(),
        )
    return Region(
        stuff=stuff,
        box=(left, top, left + box_width * zoom, top + box_height * zoom),
        is_transposed=is_transposed,
        is_mirrored=draws.below(2) == 1,
        is_flipped=draws.below(2) == 1,
        color=_color(hue, draws.uniform(0.05, 0.45), draws.uniform(0.75, 1.0)),
        contrast=draws.uniform(0.8, 1.15),
        boundary=boundary,
    )


def _draw_thing(library: Library, draws: Draws, size: tuple[int, int]) -> Thing:
    height, width = size
    return Thing(
        label=draws.below(library.num_classes),
        number=draws.below(library.pictures_per_class),
        x=width * draws.uniform(0.03, 0.97),
        y=height * draws.uniform(0.03, 0.97),
        length=min(size) * draws.uniform(*THING_LENGTHS),
        half_turn=draws.uniform(-MAX_HALF_TURN, MAX_HALF_TURN),
        is_mirrored=draws.below(2) == 1,
        color=_color(draws.uniform(), draws.uniform(*library.saturations), draws.uniform(0.75, 1.0)),
    )


def _color(hue: float, saturation: float, value: float) -> tuple[float, float, float]:
    """Red, green and blue in 0..1 of a color in the HSV hexcone."""
    parts = (min(max(abs((6 * hue + shift) % 6 - 3) - 1, 0.0), 1.0) for shift in (0, 4, 2))
    red, green, blue = (value * (1 - saturation * (1 - part)) for part in parts)
    return red, green, blue
