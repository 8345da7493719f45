"""Checkpoints of other implementations, to models of ours and back."""

from fastmask.integrations.checkpoints.convert import convert_checkpoint
from fastmask.integrations.checkpoints.hugging_face import from_hugging_face_maskformer, to_hugging_face_maskformer
from fastmask.integrations.checkpoints.hugging_face_eomt import from_hugging_face_eomt, to_hugging_face_eomt
from fastmask.integrations.checkpoints.hugging_face_mask2former import (
    from_hugging_face_mask2former,
    to_hugging_face_mask2former,
)
from fastmask.integrations.checkpoints.original_mask2former import from_original_mask2former, to_original_mask2former
from fastmask.integrations.checkpoints.original_maskformer import from_original_maskformer, to_original_maskformer
from fastmask.integrations.checkpoints.original_segmenter import from_original_segmenter, save_original_segmenter

__all__ = [
    "convert_checkpoint",
    "from_hugging_face_eomt",
    "from_hugging_face_mask2former",
    "from_hugging_face_maskformer",
    "from_original_mask2former",
    "from_original_maskformer",
    "from_original_segmenter",
    "save_original_segmenter",
    "to_hugging_face_eomt",
    "to_hugging_face_mask2former",
    "to_hugging_face_maskformer",
    "to_original_mask2former",
    "to_original_maskformer",
]
