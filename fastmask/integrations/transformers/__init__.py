"""transformers: faster training of its segmentation models and detectors, labels as maps instead of masks, and the
post-processing of its image processors."""

from fastmask.integrations.transformers.post_process import (
    post_process_instance_segmentation,
    post_process_panoptic_segmentation,
    post_process_semantic_segmentation,
)
from fastmask.integrations.transformers.segmentation import collate_segmentation, segmentation_targets

__all__ = [
    "collate_segmentation",
    "post_process_instance_segmentation",
    "post_process_panoptic_segmentation",
    "post_process_semantic_segmentation",
    "segmentation_targets",
]
