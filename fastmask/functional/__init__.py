"""The stateless API: checks arguments, picks a backend, and calls the registered operators.

``backend`` is "auto", "reference", "native" (C++/CUDA) or "triton". One that is asked for by name never falls back.
"""

from fastmask.functional.assign import assign
from fastmask.functional.class_loss import class_loss
from fastmask.functional.config import show_config
from fastmask.functional.embeddings import mask_products, matched_mask_logits
from fastmask.functional.general import general_inference
from fastmask.functional.instance import instance_inference
from fastmask.functional.linear_sum_assignment import linear_sum_assignment
from fastmask.functional.mask_cost import mask_cost
from fastmask.functional.mask_loss import mask_loss
from fastmask.functional.masked_attention import masked_attention
from fastmask.functional.panoptic import PanopticDetails, panoptic_inference
from fastmask.functional.point_mask_cost import point_mask_cost
from fastmask.functional.point_mask_loss import point_mask_loss
from fastmask.functional.semantic import SemanticDetails, semantic_inference
from fastmask.functional.semantic_views import SemanticView, merge_views
from fastmask.functional.uncertain_points import uncertain_points

__all__ = [
    "PanopticDetails",
    "SemanticDetails",
    "SemanticView",
    "assign",
    "class_loss",
    "general_inference",
    "instance_inference",
    "linear_sum_assignment",
    "mask_cost",
    "mask_loss",
    "mask_products",
    "masked_attention",
    "matched_mask_logits",
    "merge_views",
    "panoptic_inference",
    "point_mask_cost",
    "point_mask_loss",
    "semantic_inference",
    "show_config",
    "uncertain_points",
]
