"""Whole networks."""

from fastmask.models.backbone import build_backbone, known_backbones
from fastmask.models.config import MaskFormerConfig
from fastmask.models.maskformer import MaskFormer

__all__ = ["MaskFormer", "MaskFormerConfig", "build_backbone", "known_backbones"]
