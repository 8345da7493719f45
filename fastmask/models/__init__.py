"""The networks: MaskFormer, Mask2Former, EoMT, Segmenter, the per-pixel baselines and the sound event detector."""

from fastmask.models._registry import load_model, make_model, preset_names
from fastmask.models.backbones import build_backbone, known_backbones
from fastmask.models.eomt import EoMT, EoMTConfig
from fastmask.models.mask2former import Mask2Former, Mask2FormerConfig
from fastmask.models.maskformer import MaskFormer, MaskFormerConfig
from fastmask.models.model_card import ModelCard
from fastmask.models.per_pixel import PerPixelBaseline, PerPixelBaselineConfig
from fastmask.models.segmenter import Segmenter, SegmenterConfig
from fastmask.models.sound import SoundEventConfig, SoundEventDetector

__all__ = [
    "EoMT",
    "EoMTConfig",
    "Mask2Former",
    "Mask2FormerConfig",
    "MaskFormer",
    "MaskFormerConfig",
    "ModelCard",
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
