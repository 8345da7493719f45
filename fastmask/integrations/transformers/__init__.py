"""transformers: faster training of its segmentation models and detectors, labels as maps instead of masks, the
post-processing of its image processors, and validation from logits under its Trainer."""

from fastmask.integrations.transformers.post_process import (
    post_process_instance_segmentation,
    post_process_panoptic_segmentation,
    post_process_semantic_segmentation,
)
from fastmask.integrations.transformers.segmentation import collate_segmentation, segmentation_targets
from fastmask.integrations.transformers.trainer import TrainerMetrics

__all__ = [
    "TrainerMetrics",
    "collate_segmentation",
    "post_process_instance_segmentation",
    "post_process_panoptic_segmentation",
    "post_process_semantic_segmentation",
    "segmentation_targets",
]
