"""The reference for tests: every operation in plain PyTorch that reads like the papers' equations, up to float64."""

from fastmask.reference.assign import assign
from fastmask.reference.attention import masked_attention
from fastmask.reference.class_loss import class_loss
from fastmask.reference.deformable_attention import deformable_attention, gathered_deformable_attention
from fastmask.reference.general import general_inference
from fastmask.reference.instance import INSTANCE_RULES, instance_inference
from fastmask.reference.mask_cost import mask_cost
from fastmask.reference.mask_loss import mask_loss
from fastmask.reference.panoptic import PANOPTIC_RULES, PanopticRule, panoptic_inference
from fastmask.reference.points import random_points, sample_points, uncertain_points
from fastmask.reference.rle import rle_encode
from fastmask.reference.semantic import label_dtype, semantic_inference

__all__ = [
    "INSTANCE_RULES",
    "PANOPTIC_RULES",
    "PanopticRule",
    "assign",
    "class_loss",
    "deformable_attention",
    "gathered_deformable_attention",
    "general_inference",
    "instance_inference",
    "label_dtype",
    "mask_cost",
    "mask_loss",
    "masked_attention",
    "panoptic_inference",
    "random_points",
    "rle_encode",
    "sample_points",
    "semantic_inference",
    "uncertain_points",
]
