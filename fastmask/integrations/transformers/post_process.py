"""The image processors' post-processing of MaskFormer and Mask2Former, with their arguments and results.

The two families differ in one step: Mask2Former's processor first brings the mask logits to 384 x 384. The class of
``outputs`` decides: Mask2FormerForUniversalSegmentationOutput, or any other with ``class_queries_logits (B, N, K+1)``
and ``masks_queries_logits (B, N, h, w)``. The processors of OneFormer and EoMT work differently; their outputs are
refused with a TypeError. Results lie on the device of the logits.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmask.functional import instance_inference, panoptic_inference, semantic_inference

MASK2FORMER_SIZE = (384, 384)
OTHER_FAMILIES = ("OneFormer", "Eomt")
SCORE_DIGITS = 6

Sizes = Sequence[tuple[int, int]]


def post_process_semantic_segmentation(
    outputs: Any, target_sizes: Sizes | None = None, return_segmentation_scores: bool = False
) -> list:
    """The class of each pixel, argmax_k of sum_n softmax(class_logits[n])[k] sigmoid(mask_logits[n]).

    Args:
        outputs: of the model.
        target_sizes: (H, W) of each image's result; by default the size of the mask logits, 384 x 384 for Mask2Former.
        return_segmentation_scores: also return the scores of all classes (transformers 5 and later).

    Returns:
        For each image ``(H, W)`` int64; or, with scores, transformers' SemanticSegmentationPostProcessorOutput with
        "segmentation" and "segmentation_scores" ``(K, H, W)``.

    Raises:
        ValueError: a number of sizes that is not B.
        TypeError: outputs of a model whose post-processing differs.
    """
    output = "scores" if return_segmentation_scores else "labels"
    maps: list[Tensor] = []
    for class_logits, mask_logits, size, padded_size in _groups(outputs, target_sizes):
        maps += semantic_inference(
            class_logits, mask_logits, size, order="scores", output=output, padded_size=padded_size
        )
    if not return_segmentation_scores:
        return [labels.long() for labels in maps]
    from transformers.image_processing_outputs import SemanticSegmentationPostProcessorOutput

    return [
        SemanticSegmentationPostProcessorOutput(
            data={"segmentation": scores.argmax(0), "segmentation_scores": scores},
        )
        for scores in maps
    ]


def post_process_instance_segmentation(
    outputs: Any,
    threshold: float = 0.5,
    mask_threshold: float = 0.5,
    overlap_mask_area_threshold: float = 0.8,
    target_sizes: Sizes | None = None,
    return_coco_annotation: bool | None = False,
    return_binary_maps: bool | None = False,
) -> list[dict[str, Any]]:
    """The N most probable (query, class) pairs of each image whose score reaches ``threshold``.

    Args:
        outputs: of the model.
        threshold: least score, class probability times the mean of sigmoid(x) over the mask x > 0.
        mask_threshold, overlap_mask_area_threshold: without effect, as in transformers.
        target_sizes: (H, W) of each image's result; by default the size of the mask logits, 384 x 384 for Mask2Former.
        return_coco_annotation: run lengths instead of a segment map.
        return_binary_maps: one binary map for each instance instead of a segment map.

    Returns:
        For each image {"segmentation", "segments_info"}: ``(H, W)`` float32 with segment ids from 0, and -1 where there
        is none, later instances upon earlier ones; or a list of run lengths; or ``(R, H, W)`` float32, unless there is
        no instance; and a list of {"id", "label_id", "was_fused", "score"}.

    Raises:
        ValueError: a number of sizes that is not B, or both other forms asked for at once.
        TypeError: outputs of a model whose post-processing differs.
    """
    if return_coco_annotation and return_binary_maps:
        raise ValueError("return_coco_annotation and return_binary_maps cannot both be True")
    results = []
    for class_logits, mask_logits, size, padded_size in _groups(outputs, target_sizes):
        num_queries = class_logits.shape[1]
        found = instance_inference(
            class_logits, mask_logits, size, top_k=num_queries, rule="huggingface", padded_size=padded_size
        )
        for image_classes, instances in zip(class_logits, found, strict=True):
            # transformers numbers and paints instances in the order that an unsorted topk gives.
            probabilities = image_classes.softmax(-1)[:, :-1].flatten().topk(num_queries, sorted=False).values
            order = probabilities.argsort(descending=True, stable=True).argsort()
            chosen = (instances["masks"].any(2).any(1) & (instances["scores"] >= threshold))[order]
            order = order[chosen]
            masks = instances["masks"][order]
            labels, scores = instances["labels"][order].tolist(), instances["scores"][order].tolist()
            segmentation = torch.full(size, -1.0, device=masks.device)
            for index, mask in enumerate(masks):
                segmentation.masked_fill_(mask, index)
            infos = [
                {"id": index, "label_id": label, "was_fused": False, "score": round(score, SCORE_DIGITS)}
                for index, (label, score) in enumerate(zip(labels, scores, strict=True))
            ]
            result: Tensor | list[list[int]] = segmentation
            if return_coco_annotation:
                result = _run_lengths(segmentation)
            elif return_binary_maps and len(masks) > 0:
                result = masks.float()
            results.append({"segmentation": result, "segments_info": infos})
    return results


def post_process_panoptic_segmentation(
    outputs: Any,
    threshold: float = 0.5,
    mask_threshold: float = 0.5,
    overlap_mask_area_threshold: float = 0.8,
    label_ids_to_fuse: Collection[int] | None = None,
    target_sizes: Sizes | None = None,
    *,
    fix: bool = False,
) -> list[dict[str, Any]]:
    """Each pixel belongs to the most probable of the confident queries.

    Args:
        outputs: of the model.
        threshold: the class probability that a query must exceed.
        mask_threshold: the probability at which a pixel belongs to a mask.
        overlap_mask_area_threshold: the visible share of its mask that a query must exceed.
        label_ids_to_fuse: classes whose segments are merged into one; none by default.
        target_sizes: (H, W) of each image's result; by default the size of the mask logits, 384 x 384 for Mask2Former.
        fix: correct two faults of transformers that are kept by default: after a merged segment the ids of later ones
            repeat, and the area of a mask is measured on probabilities multiplied by the class score.

    Returns:
        For each image {"segmentation", "segments_info"}: ``(H, W)`` int32 with segment ids from 1 and 0 where there is
        none (float32 and -1 everywhere if no query is confident), and a list of {"id", "label_id", "was_fused",
        "score"}.

    Raises:
        ValueError: a number of sizes that is not B, or thresholds outside 0..1.
        TypeError: outputs of a model whose post-processing differs.
    """
    results = []
    for class_logits, mask_logits, size, padded_size in _groups(outputs, target_sizes):
        found: Any = panoptic_inference(
            class_logits,
            mask_logits,
            size,
            rule="huggingface" if fix else "huggingface-exact",
            threshold=threshold,
            overlap_threshold=overlap_mask_area_threshold,
            mask_threshold=mask_threshold,
            stuff_classes=frozenset(label_ids_to_fuse or ()),
            padded_size=padded_size,
        )
        scores, classes = class_logits.softmax(-1).max(-1)
        confident = ((classes != class_logits.shape[-1] - 1) & (scores > threshold)).any(1).tolist()
        for any_query, (segmentation, segments) in zip(confident, found, strict=True):
            infos = [
                {
                    "id": segment["id"],
                    "label_id": segment["category_id"],
                    "was_fused": not segment["isthing"],
                    "score": round(segment["score"], SCORE_DIGITS),
                }
                for segment in segments
            ]
            if not any_query:
                segmentation = torch.full(size, -1.0, device=segmentation.device)
            results.append({"segmentation": segmentation, "segments_info": infos})
    return results


def _groups(
    outputs: Any, target_sizes: Sizes | None
) -> Iterator[tuple[Tensor, Tensor, tuple[int, int], tuple[int, int] | None]]:
    """(class_logits, mask_logits, size of the result, size that the logits are brought to first) of images in order
    that share a size."""
    name = type(outputs).__name__
    if name.startswith(OTHER_FAMILIES):
        raise TypeError(
            f"outputs is a {name}, whose post-processing differs; expected those of MaskFormer or Mask2Former"
        )
    class_logits, mask_logits = outputs.class_queries_logits.detach(), outputs.masks_queries_logits.detach()
    padded_size = MASK2FORMER_SIZE if name.startswith("Mask2Former") else None
    batch_size = class_logits.shape[0]
    if target_sizes is None:
        yield class_logits, mask_logits, padded_size or tuple(mask_logits.shape[-2:]), padded_size
        return
    sizes = [(int(height), int(width)) for height, width in target_sizes]
    if len(sizes) != batch_size:
        raise ValueError(f"target_sizes has {len(sizes)} sizes for {batch_size} images")
    if len(set(sizes)) == 1:
        yield class_logits, mask_logits, sizes[0], padded_size
        return
    for b, size in enumerate(sizes):
        yield class_logits[b : b + 1], mask_logits[b : b + 1], size, padded_size


def _run_lengths(segmentation: Tensor) -> list[list[int]]:
    """For each value in the map, lowest first: start (from 1) and length of each of its runs, row by row (COCO's RLE as
    transformers writes it)."""
    values = segmentation.flatten()
    runs = []
    for value in values.unique():
        inside = torch.nn.functional.pad((values == value).int(), (1, 1))
        edges = inside.diff().nonzero().squeeze(1)
        starts, ends = edges[::2], edges[1::2]
        runs.append(torch.stack([starts + 1, ends - starts], 1).flatten().tolist())
    return runs
