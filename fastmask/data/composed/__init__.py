"""Embedded data: scenes composed from real pixels and clips composed from real sounds, with exact truth."""

from fastmask.data.composed.classes import (
    CLASS_NAMES,
    PALETTE,
    STUFF_CLASSES,
    STUFF_LABELS,
    THING_CLASSES,
    THING_LABELS,
)
from fastmask.data.composed.clips import Clip, ComposedClips, collate_clips
from fastmask.data.composed.scenes import ComposedScenes, Scene, collate_scenes
from fastmask.data.composed.sounds import EVENT_CLASSES

__all__ = [
    "CLASS_NAMES",
    "EVENT_CLASSES",
    "PALETTE",
    "STUFF_CLASSES",
    "STUFF_LABELS",
    "THING_CLASSES",
    "THING_LABELS",
    "Clip",
    "ComposedClips",
    "ComposedScenes",
    "Scene",
    "collate_clips",
    "collate_scenes",
]
