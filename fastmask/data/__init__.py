"""Data sets in their published layouts, and embedded ones that need no files."""

from fastmask.extras import extra

with extra("data"):
    import PIL as PIL

from fastmask.data.augment import Augmented
from fastmask.data.check import check_dataset, check_datasets
from fastmask.data.composed.classes import (
    CLASS_NAMES,
    PALETTE,
    STUFF_CLASSES,
    STUFF_LABELS,
    THING_CLASSES,
    THING_LABELS,
)
from fastmask.data.composed.clips import Clip, ComposedClips, collate_clips
from fastmask.data.composed.dataset import SceneDataset
from fastmask.data.composed.icon_classes import ICON_CLASSES
from fastmask.data.composed.scenes import ComposedScenes, Scene, collate_scenes
from fastmask.data.composed.sounds import EVENT_CLASSES
from fastmask.data.open import open_dataset
from fastmask.data.sample import DatasetInfo, Findings, Sample, SegmentationDataset, collate
from fastmask.data.shards import ShardDataset, ShardStream, write_shards
from fastmask.data.transforms import (
    ColorJitter,
    Compose,
    RandomCrop,
    RandomFlip,
    RandomSizeCrop,
    ResizeJitter,
    ResizeShortSide,
    Sometimes,
    detr_augmentation,
    jitter_augmentation,
    semantic_augmentation,
)

__all__ = [
    "CLASS_NAMES",
    "EVENT_CLASSES",
    "ICON_CLASSES",
    "PALETTE",
    "STUFF_CLASSES",
    "STUFF_LABELS",
    "THING_CLASSES",
    "THING_LABELS",
    "Augmented",
    "Clip",
    "ColorJitter",
    "Compose",
    "ComposedClips",
    "ComposedScenes",
    "DatasetInfo",
    "Findings",
    "RandomCrop",
    "RandomFlip",
    "RandomSizeCrop",
    "ResizeJitter",
    "ResizeShortSide",
    "Sample",
    "Scene",
    "SceneDataset",
    "SegmentationDataset",
    "ShardDataset",
    "ShardStream",
    "Sometimes",
    "check_dataset",
    "check_datasets",
    "collate",
    "collate_clips",
    "collate_scenes",
    "detr_augmentation",
    "jitter_augmentation",
    "open_dataset",
    "semantic_augmentation",
    "write_shards",
]
