"""Semantic segmentation by the hard assignment of pixels to queries."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask.reference._common import as_batch, image_logits, reads_nan, resize_bilinear
from fastmask.reference.semantic import label_dtype


def general_inference(
    class_logits: Tensor,
    mask_logits: Tensor,
    size: tuple[int, int],
    *,
    ignore_index: int = 255,
    padded_size: tuple[int, int] | None = None,
    valid_size: tuple[int, int] | None = None,
) -> Tensor:
    """Each pixel goes to the query i that maximizes p_i(c_i) m_i[h, w], and gets its most likely class c_i.

    MaskFormer (arXiv:2107.06278), section 3.4, "general inference" for semantic segmentation: queries whose most likely
    class is "no object" take no part, and segments of the same class are merged. Ties take the lowest query. A query
    never wins where it reads a NaN; a query with a NaN class logit never wins at all.

    Args:
        class_logits: ``(B, N, K+1)`` float, or ``(N, K+1)`` for one image.
        mask_logits: ``(B, N, h, w)`` float, or ``(N, h, w)``.
        size: (H, W) of the result.
        ignore_index: the label of pixels that no query wins.
        padded_size, valid_size: as in ``semantic_inference``.

    Returns:
        ``(B, H, W)`` labels in the smallest of uint8, int16 and int32 that holds the classes and ``ignore_index``.
    """
    class_logits, mask_logits = as_batch(class_logits, mask_logits)
    batch_size, num_queries, num_classes = class_logits.shape[0], class_logits.shape[1], class_logits.shape[2] - 1
    scores, classes = class_logits.softmax(-1).max(-1)
    nan = reads_nan(mask_logits, padded_size, valid_size, size)
    masks = resize_bilinear(image_logits(mask_logits, padded_size, valid_size), size).sigmoid()
    takes_part = (classes != num_classes) & (scores > 0)  # NaN is not above 0
    weighted = (scores[..., None, None] * masks).masked_fill(nan | ~takes_part[..., None, None], -1)
    labels = classes.new_full((batch_size, *size), ignore_index)
    if num_queries > 0:
        best, winner = weighted.max(1)
        won = classes.gather(1, winner.flatten(1)).view_as(winner)
        labels = torch.where(best >= 0, won, labels)
    return labels.to(label_dtype(max(num_classes, ignore_index + 1)))
