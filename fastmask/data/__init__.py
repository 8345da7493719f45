"""Embedded data: scenes composed from real pixels, with exact panoptic truth."""

from fastmask.data.classes import CLASS_NAMES, PALETTE, STUFF_CLASSES, STUFF_LABELS, THING_CLASSES, THING_LABELS
from fastmask.data.scenes import ComposedScenes, Scene, collate_scenes

__all__ = [
    "CLASS_NAMES",
    "PALETTE",
    "STUFF_CLASSES",
    "STUFF_LABELS",
    "THING_CLASSES",
    "THING_LABELS",
    "ComposedScenes",
    "Scene",
    "collate_scenes",
]
