"""The operators as stateless functions, in the manner of ``torch.nn.functional``.

``backend`` is "auto", "reference", "native" (C++/CUDA) or "triton". A backend requested by name never falls back.
"""

from fastmask.ops._show_config import show_config
from fastmask.ops.assign import assign
from fastmask.ops.class_loss import class_loss
from fastmask.ops.deformable_attention import deformable_attention
from fastmask.ops.embeddings import mask_products, matched_mask_logits
from fastmask.ops.general import general_inference
from fastmask.ops.instance import instance_inference, run_lengths
from fastmask.ops.linear_sum_assignment import linear_sum_assignment
from fastmask.ops.mask_cost import mask_cost
from fastmask.ops.mask_loss import mask_loss
from fastmask.ops.masked_attention import masked_attention
from fastmask.ops.panoptic import PanopticDetails, panoptic_inference
from fastmask.ops.semantic import SemanticDetails, semantic_inference
from fastmask.ops.semantic_views import SemanticView, labels_of_scores, merge_views
from fastmask.ops.uncertain_points import uncertain_points

__all__ = [
    "PanopticDetails",
    "SemanticDetails",
    "SemanticView",
    "assign",
    "class_loss",
    "deformable_attention",
    "general_inference",
    "instance_inference",
    "labels_of_scores",
    "linear_sum_assignment",
    "mask_cost",
    "mask_loss",
    "mask_products",
    "masked_attention",
    "matched_mask_logits",
    "merge_views",
    "panoptic_inference",
    "run_lengths",
    "semantic_inference",
    "show_config",
    "uncertain_points",
]
