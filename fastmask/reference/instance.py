"""Instance segmentation from class and mask logits."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from fastmask.reference._common import (
    as_batch,
    check_choice,
    image_logits,
    reads_nan,
    resize_bilinear,
    resize_nearest,
)

INSTANCE_RULES = ("mask2former", "huggingface", "rf_detr")


def instance_inference(
    class_logits: Tensor,
    mask_logits: Tensor,
    size: tuple[int, int],
    *,
    top_k: int = 100,
    rule: str = "mask2former",
    stuff_classes: Collection[int] = (),
    padded_size: tuple[int, int] | None = None,
    valid_size: tuple[int, int] | None = None,
) -> list[dict[str, Tensor]]:
    """The ``top_k`` pairs (query n, class k) of highest P = softmax(class_logits[n])[k]; a query may give several.

    With x the query's mask logits, mask = x > 0 and score = P * sum(sigmoid(x) mask) / (sum(mask) + 1e-6)
    (Mask2Former, arXiv:2112.01527, and its code). The rules differ in the resolution of x and in the score:

    - "mask2former": x is upsampled bilinearly to the output size.
    - "huggingface": x stays at h x w; the binary mask is then resized to the output size by the "nearest" rule.
    - "rf_detr" (RF-DETR, arXiv:2511.09554): as "mask2former", but P = sigmoid(class_logits[n, k]), each of the K
      columns is a class, and score = P.

    A pixel that reads a NaN mask logit is never foreground, and a query with a NaN class logit has P = 0.

    Args:
        class_logits: ``(B, N, K+1)`` float, or ``(N, K+1)`` for one image; K columns for the rule "rf_detr".
        mask_logits: ``(B, N, h, w)`` float, or ``(N, h, w)``.
        size: (H, W) of the masks.
        top_k: the number of pairs; all N * K pairs if there are fewer.
        rule: a name above.
        stuff_classes: pairs of these classes are dropped from the ``top_k``, as Mask2Former does when it also does
            panoptic segmentation.
        padded_size, valid_size: upsample the mask logits to the padded network input and crop the image from it, as
            the original code does (see ``semantic_inference``; Hugging Face's code for Mask2Former has
            ``padded_size=(384, 384)``); None skips a step.

    Returns:
        For each image {"scores": ``(R,)`` in the promoted dtype of the logits, "labels" and "queries": ``(R,)`` int64,
        "masks": ``(R, H, W)`` bool}, by decreasing P; R is top_k less the pairs that ``stuff_classes`` drops. Masks may
        overlap, and may be empty (score 0).

    Raises:
        ValueError: an unknown ``rule``, ``top_k`` below 1, shapes that do not fit, or ``valid_size`` beyond the map.
    """
    check_choice("rule", rule, INSTANCE_RULES)
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    class_logits, mask_logits = as_batch(class_logits, mask_logits)
    grid = size
    if rule == "huggingface":
        grid = valid_size or padded_size or (mask_logits.shape[-2], mask_logits.shape[-1])
    nan = reads_nan(mask_logits, padded_size, valid_size, grid)
    mask_logits = resize_bilinear(image_logits(mask_logits, padded_size, valid_size), grid).masked_fill(nan, -1)
    stuff = torch.tensor(sorted(stuff_classes), dtype=torch.int64, device=class_logits.device)
    results = []
    for image_classes, image_masks in zip(class_logits, mask_logits, strict=True):
        probabilities = image_classes.sigmoid() if rule == "rf_detr" else image_classes.softmax(-1)[:, :-1]
        probabilities = probabilities.nan_to_num(nan=0.0)  # [N, K]
        best = probabilities.flatten().topk(min(top_k, probabilities.numel()))
        labels = best.indices % probabilities.shape[1]
        queries = best.indices // probabilities.shape[1]
        things = ~torch.isin(labels, stuff)
        x = image_masks[queries[things]]  # [R, h, w]
        masks = x > 0
        area = masks.to(x.dtype).sum((-2, -1))
        mask_scores = x.sigmoid().masked_fill(~masks, 0).sum((-2, -1)) / (area + 1e-6)
        results.append(
            {
                "scores": best.values[things] * (1 if rule == "rf_detr" else mask_scores),
                "labels": labels[things],
                "queries": queries[things],
                "masks": resize_nearest(masks, size),
            }
        )
    return results
