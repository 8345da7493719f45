"""Whole networks."""

from fastmask.models.backbone import build_backbone, known_backbones
from fastmask.models.config import MaskFormerConfig
from fastmask.models.maskformer import MaskFormer
from fastmask.models.per_pixel_baseline import PerPixelBaseline, PerPixelBaselineConfig
from fastmask.models.segmenter import Segmenter
from fastmask.models.segmenter_checkpoint import load_original_segmenter, save_original_segmenter
from fastmask.models.segmenter_config import SegmenterConfig

__all__ = [
    "MaskFormer",
    "MaskFormerConfig",
    "PerPixelBaseline",
    "PerPixelBaselineConfig",
    "Segmenter",
    "SegmenterConfig",
    "build_backbone",
    "known_backbones",
    "load_original_segmenter",
    "save_original_segmenter",
]
