"""transformers: faster training of its mask-classification models, and the post-processing of its image processors."""

from fastmask.integrations.transformers.post_process import (
    post_process_instance_segmentation,
    post_process_panoptic_segmentation,
    post_process_semantic_segmentation,
)

__all__ = [
    "post_process_instance_segmentation",
    "post_process_panoptic_segmentation",
    "post_process_semantic_segmentation",
]
