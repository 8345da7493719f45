"""Panoptic segmentation from class logits, and mask logits or embeddings."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from fastmask.functional._inference import prepare
from fastmask.ops.library import Operator

OPERATOR = Operator("panoptic_inference")


@torch.no_grad()
def panoptic_inference(
    class_logits: Tensor,
    mask_logits: Tensor | tuple[Tensor, Tensor],
    size: tuple[int, int],
    *,
    rule: str = "maskformer",
    threshold: float = 0.8,
    overlap_threshold: float = 0.8,
    mask_threshold: float = 0.5,
    stuff_classes: Collection[int] = (),
    padded_size: tuple[int, int] | None = None,
    valid_size: tuple[int, int] | None = None,
    backend: str = "auto",
) -> list[tuple[Tensor, list[dict[str, int | float | bool]]]]:
    """Each pixel goes to the confident query that is most probable there; weak and mostly hidden ones are dropped.

    MaskFormer (arXiv:2107.06278), section 3.4, "general inference". ``fastmask.reference.panoptic`` says how the rules
    differ.

    Args:
        class_logits: ``(B, N, K+1)`` floating point; the last class is "no object".
        mask_logits: ``(B, N, h, w)`` floating point; or a pair of ``mask_embed (B, N, C)`` and ``pixel_embed
            (B, C, h, w)``, whose product over C they are.
        size: (H, W) of the result, in pixels.
        rule: "maskformer", "mask2former", "huggingface" (corrected) or "huggingface-exact" (as shipped).
        threshold: the class probability, 0..1, that a query must exceed.
        overlap_threshold: the least visible share, 0..1, of a query's mask.
        mask_threshold: the probability, 0..1, at which a pixel belongs to a mask.
        stuff_classes: the classes whose segments are merged into one; all others are things.
        padded_size, valid_size: as in ``semantic_inference``.
        backend: "auto" or "reference".

    Returns:
        For each image (segmentation, segments_info): ``(H, W)`` int32 with segment ids from 1 and 0 where there is
        none, and a list of {"id", "category_id", "isthing", "score", "area"}; area in pixels.

    Raises:
        ValueError: shapes or options that do not fit.
        TypeError: logits that are not floating point.
        RuntimeError: the backend asked for cannot run.
    """
    masks, _, dtype = prepare(OPERATOR, class_logits, mask_logits, size, padded_size, valid_size, backend)
    thresholds = {"threshold": threshold, "overlap_threshold": overlap_threshold, "mask_threshold": mask_threshold}
    for name, value in thresholds.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must lie in 0..1, got {value}")
    from fastmask import reference

    return reference.panoptic_inference(
        class_logits.to(dtype),
        masks.full_logits(dtype),
        size,
        rule=rule,
        **thresholds,
        stuff_classes=stuff_classes,
        padded_size=padded_size,
        valid_size=valid_size,
    )
