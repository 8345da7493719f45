"""Panoptic segmentation from class and mask logits, by the rules of different code bases."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmask.reference._common import as_batch, check_choice, image_logits, reads_nan, resize_bilinear


@dataclass(frozen=True)
class PanopticRule:
    """The differences between the code bases; the defaults are MaskFormer's.

    Args:
        resize_probabilities: resize sigmoid(mask logits) rather than the logits.
        clip_to_mask: a segment keeps only the pixels where its own mask is at least ``mask_threshold``.
        strict_overlap: the overlap must exceed ``overlap_threshold``, compared in float32, rather than reach it.
        weighted_area: the mask's area is counted after its probabilities were multiplied by the class score.
        reuse_fused_id: a fused stuff region resets the id counter to its own id, so that ids of later segments may
            repeat, and is listed again in ``segments_info``.
        no_segment_value: the value of the whole map if no query passes ``threshold``.
    """

    resize_probabilities: bool = False
    clip_to_mask: bool = False
    strict_overlap: bool = False
    weighted_area: bool = False
    reuse_fused_id: bool = False
    no_segment_value: int = 0


PANOPTIC_RULES = {
    "maskformer": PanopticRule(),
    "mask2former": PanopticRule(clip_to_mask=True),
    "eomt": PanopticRule(clip_to_mask=True, strict_overlap=True),
    "huggingface": PanopticRule(resize_probabilities=True, strict_overlap=True),
    "huggingface-exact": PanopticRule(
        resize_probabilities=True, strict_overlap=True, weighted_area=True, reuse_fused_id=True, no_segment_value=-1
    ),
}


def panoptic_inference(
    class_logits: Tensor,
    mask_logits: Tensor,
    size: tuple[int, int],
    *,
    rule: str = "maskformer",
    threshold: float = 0.8,
    overlap_threshold: float = 0.8,
    mask_threshold: float = 0.5,
    stuff_classes: Collection[int] = (),
    padded_size: tuple[int, int] | None = None,
    valid_size: tuple[int, int] | None = None,
) -> list[tuple[Tensor, list[dict[str, int | float | bool]]]]:
    """Each pixel goes to the query i that maximizes p_i(c_i) m_i[h, w], where c_i is the query's most likely class.

    MaskFormer (arXiv:2107.06278), section 3.4, "general inference". Queries whose class is no-object, or whose p_i(c_i)
    does not exceed ``threshold``, are dropped first; then those whose visible part is too small: the area won, divided
    by the area where m_i >= ``mask_threshold``, is compared with ``overlap_threshold``. All stuff of a class is one
    segment. A query never wins a pixel where it reads a NaN mask logit; where every query reads one, there is no
    segment.

    ``rule`` names the code base (``PANOPTIC_RULES`` lists the differences): "maskformer", "mask2former"
    (arXiv:2112.01527), "eomt" (transformers' code for EoMT), "huggingface", or "huggingface-exact", which keeps two
    bugs of transformers for comparison: after fused stuff the ids of later segments repeat, and the area of a mask is
    measured on its score-weighted probabilities, so that a mask seems smaller than it is.

    Args:
        class_logits: ``(B, N, K+1)`` float, or ``(N, K+1)`` for one image.
        mask_logits: ``(B, N, h, w)`` float, or ``(N, h, w)``.
        size: (H, W) of the result.
        rule: a key of ``PANOPTIC_RULES``.
        threshold: the class score that a query must exceed.
        overlap_threshold: the visible share that a query's mask must have.
        mask_threshold: the probability at which a pixel belongs to a mask.
        stuff_classes: the classes whose segments are fused; all others are things.
        padded_size, valid_size: upsample the mask logits to the padded network input and crop the image from it, as
            the original code does (see ``semantic_inference``); None skips a step.

    Returns:
        For each image ``(segmentation, segments_info)``: ``(H, W)`` int32 with ids from 1 (0 without a segment), and a
        dict for each segment, in the order of queries: "id", "category_id", "isthing", "score" (p_i(c_i); for fused
        stuff, that of its first query) and "area" (the number of pixels with this id).

    Raises:
        ValueError: an unknown ``rule``, shapes that do not fit, or ``valid_size`` beyond the map.
    """
    check_choice("rule", rule, PANOPTIC_RULES)
    class_logits, mask_logits = as_batch(class_logits, mask_logits)
    differences = PANOPTIC_RULES[rule]
    num_classes = class_logits.shape[-1] - 1
    scores, classes = class_logits.softmax(-1).max(-1)  # [B, N]
    nan = reads_nan(mask_logits, padded_size, valid_size, size)
    mask_logits = image_logits(mask_logits, padded_size, valid_size)
    if differences.resize_probabilities:
        probabilities = resize_bilinear(mask_logits.sigmoid(), size)
    else:
        probabilities = resize_bilinear(mask_logits, size).sigmoid()
    probabilities = probabilities.masked_fill(nan, -1)
    keep = (classes != num_classes) & (scores > threshold)
    return [
        _segments(
            differences,
            probabilities[b, keep[b]],
            scores[b, keep[b]],
            classes[b, keep[b]].tolist(),
            overlap_threshold,
            mask_threshold,
            frozenset(stuff_classes),
        )
        for b in range(len(keep))
    ]


def _segments(
    rule: PanopticRule,
    probabilities: Tensor,
    scores: Tensor,
    classes: list[int],
    overlap_threshold: float,
    mask_threshold: float,
    stuff_classes: frozenset[int],
) -> tuple[Tensor, list[dict[str, int | float | bool]]]:
    """One image, from its kept queries: ``probabilities (Q, H, W)`` (-1 for NaN), ``scores (Q,)`` and classes."""
    value = 0 if classes else rule.no_segment_value
    segmentation = torch.full(probabilities.shape[1:], value, dtype=torch.int32, device=probabilities.device)
    if not classes:
        return segmentation, []
    weighted = probabilities * scores[:, None, None]
    winner = weighted.argmax(0).masked_fill((weighted < 0).all(0), -1)
    inside = (weighted if rule.weighted_area else probabilities) >= mask_threshold

    infos: list[dict[str, int | float | bool]] = []
    fused_ids: dict[int, int] = {}
    last_id = 0
    for query, category in enumerate(classes):
        won = winner == query
        region = won & inside[query] if rule.clip_to_mask else won
        if not (region.any() and inside[query].any()):
            continue
        if not _visible(rule, won.sum(), inside[query].sum(), overlap_threshold):
            continue
        fuse = category in fused_ids
        segment_id = fused_ids[category] if fuse else last_id + 1
        if not fuse or rule.reuse_fused_id:
            last_id = segment_id
            infos.append(
                {
                    "id": segment_id,
                    "category_id": category,
                    "isthing": category not in stuff_classes,
                    "score": scores[query].item(),
                }
            )
        if category in stuff_classes:
            fused_ids[category] = segment_id
        segmentation = segmentation.masked_fill(region, segment_id)
    for info in infos:
        info["area"] = int((segmentation == info["id"]).sum())
    return segmentation, infos


def _visible(rule: PanopticRule, area: Tensor, mask_area: Tensor, overlap_threshold: float) -> bool:
    if rule.strict_overlap:
        return (area.float() / mask_area.float()).item() > overlap_threshold
    return area.item() / mask_area.item() >= overlap_threshold
