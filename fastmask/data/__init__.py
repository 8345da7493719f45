"""Data sets by their real layouts, and embedded ones that need no files."""

from fastmask.extras import extra

with extra("data"):
    import PIL as PIL

from fastmask.data.augment import Augmented
from fastmask.data.check import check_dataset, check_datasets
from fastmask.data.composed import (
    CLASS_NAMES,
    EVENT_CLASSES,
    PALETTE,
    STUFF_CLASSES,
    STUFF_LABELS,
    THING_CLASSES,
    THING_LABELS,
    Clip,
    ComposedClips,
    ComposedScenes,
    Scene,
    collate_clips,
    collate_scenes,
)
from fastmask.data.composed.dataset import SceneDataset
from fastmask.data.open import open_dataset
from fastmask.data.sample import DatasetInfo, Findings, Sample, SegmentationDataset, collate
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
]
