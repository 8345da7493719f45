"""Whole networks."""

from fastmask.models.auto import load_model, make_model, preset_names
from fastmask.models.backbone import build_backbone, known_backbones
from fastmask.models.config import MaskFormerConfig
from fastmask.models.maskformer import MaskFormer
from fastmask.models.per_pixel_baseline import PerPixelBaseline, PerPixelBaselineConfig
from fastmask.models.segmenter import Segmenter
from fastmask.models.segmenter_config import SegmenterConfig
from fastmask.models.sound_config import SoundEventConfig
from fastmask.models.sound_event_detector import SoundEventDetector

__all__ = [
    "MaskFormer",
    "MaskFormerConfig",
    "PerPixelBaseline",
    "PerPixelBaselineConfig",
    "Segmenter",
    "SegmenterConfig",
    "SoundEventConfig",
    "SoundEventDetector",
    "build_backbone",
    "known_backbones",
    "load_model",
    "make_model",
    "preset_names",
]
