"""Fused GPU and CPU kernels for mask-classification segmentation: MaskFormer, Segmenter and their descendants."""

from fastmask.functional import (
    assign,
    class_loss,
    deformable_attention,
    general_inference,
    instance_inference,
    linear_sum_assignment,
    mask_cost,
    mask_loss,
    masked_attention,
    panoptic_inference,
    semantic_inference,
    show_config,
    uncertain_points,
)
from fastmask.integrations import patch, unpatch
from fastmask.mask_term import MaskTerm
from fastmask.models import (
    Mask2Former,
    Mask2FormerConfig,
    MaskFormer,
    MaskFormerConfig,
    PerPixelBaseline,
    PerPixelBaselineConfig,
    Segmenter,
    SegmenterConfig,
    SoundEventConfig,
    SoundEventDetector,
)
from fastmask.modules import (
    FixedMatcher,
    HungarianMatcher,
    MaskedCrossAttention,
    MultiScaleDeformableAttention,
    PointSampling,
    SetCriterion,
)
from fastmask.targets import Targets
from fastmask.version import __version__

__all__ = [
    "FixedMatcher",
    "HungarianMatcher",
    "Mask2Former",
    "Mask2FormerConfig",
    "MaskFormer",
    "MaskFormerConfig",
    "MaskTerm",
    "MaskedCrossAttention",
    "MultiScaleDeformableAttention",
    "PerPixelBaseline",
    "PerPixelBaselineConfig",
    "PointSampling",
    "Segmenter",
    "SegmenterConfig",
    "SetCriterion",
    "SoundEventConfig",
    "SoundEventDetector",
    "Targets",
    "__version__",
    "assign",
    "class_loss",
    "deformable_attention",
    "general_inference",
    "instance_inference",
    "linear_sum_assignment",
    "mask_cost",
    "mask_loss",
    "masked_attention",
    "panoptic_inference",
    "patch",
    "semantic_inference",
    "show_config",
    "uncertain_points",
    "unpatch",
]
