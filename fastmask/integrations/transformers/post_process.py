"""The image processors' post-processing of MaskFormer, Mask2Former, OneFormer, EoMT and RF-DETR, with their arguments
and results.

The class of ``outputs`` decides which processor's steps are taken: Mask2Former's first brings the mask logits to
384 x 384, EoMT's to the size of the network's input; any other object with ``class_queries_logits (B, N, K+1)`` and
``masks_queries_logits (B, N, h, w)`` counts as MaskFormer's. Results lie on the device of the logits.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastmask.functional import run_lengths
from fastmask.modules.final_predictions import FinalPredictions, Size

SCORE_DIGITS = 6

Sizes = Sequence[Size] | Tensor


def post_process_semantic_segmentation(
    outputs: Any,
    target_sizes: Sizes | None = None,
    return_segmentation_scores: bool = False,
    *,
    padded_size: Size | None = None,
    valid_sizes: Sequence[Size] | None = None,
) -> list:
    """The class of each pixel, argmax_k of sum_n softmax(class_logits[n])[k] sigmoid(mask_logits[n]).

    Args:
        outputs: of the model; of EoMT also with ``patch_offsets``, whose windows are merged.
        target_sizes: (H, W) of each image's result; by default the size to which the mask logits are brought first.
        return_segmentation_scores: also return the scores of all classes (transformers 5 and later).
        padded_size: (height, width) to which the mask logits are brought first, such as the size of the network's
            input; by default as the image processor does.
        valid_sizes: (height, width) of each image within it, without padding; by default as the image processor does,
            which only for EoMT cuts padding off.

    Returns:
        For each image ``(H, W)`` int64; or, with scores, transformers' SemanticSegmentationPostProcessorOutput with
        "segmentation" and "segmentation_scores" ``(K, H, W)``.

    Raises:
        ValueError: a number of sizes that is not B, or outputs of RF-DETR.
        TypeError: outputs without class and mask logits.
    """
    output = "scores" if return_segmentation_scores else "labels"
    maps: list[Tensor] = []
    for predictions, size in _groups(outputs, target_sizes, padded_size, valid_sizes):
        maps += predictions.semantic(size, output)
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
    *,
    fix: bool = False,
    top_k: int | None = None,
    padded_size: Size | None = None,
    valid_sizes: Sequence[Size] | None = None,
) -> list[dict[str, Any]]:
    """The most probable (query, class) pairs of each image whose score reaches ``threshold``; for EoMT, one class of
    each query.

    Args:
        outputs: of the model; OneFormer's only with ``fix``.
        threshold: least score: class probability times the mean of sigmoid(x) over the mask x > 0. For RF-DETR the
            class probability, a sigmoid, must exceed it.
        mask_threshold: the probability that a pixel of a mask must exceed. As in transformers, without effect unless
            ``fix`` is set, except for RF-DETR, whose processor takes the logit.
        overlap_mask_area_threshold: with ``fix``, the share of its mask that an instance must have left over from
            better ones. Without effect otherwise, as in transformers.
        target_sizes: (H, W) of each image's result; by default the size to which the mask logits are brought first,
            which is their own size for MaskFormer and RF-DETR.
        return_coco_annotation: run lengths instead of a segment map.
        return_binary_maps: one binary map for each instance instead of a segment map.
        fix: use the thresholds; resize logits instead of binary masks, directly to ``target_sizes`` unless there is a
            ``padded_size``; let better instances cover worse ones; and return run lengths that pycocotools can read.
        top_k: the largest number of pairs; N by default.
        padded_size, valid_sizes: as for :func:`post_process_semantic_segmentation`.

    Returns:
        For each image {"segmentation", "segments_info"}: ``(H, W)`` float32 with segment ids from 0, and -1 where there
        is none; or a list of run lengths; or ``(R, H, W)`` float32, unless there is no instance; and a list of {"id",
        "label_id", "was_fused", "score"}. Later instances cover earlier ones, which are the worse ones with ``fix``.
        For RF-DETR, unless ``fix`` is set, as its processor has it: ``(H, W)`` int32 with ids from 1, earlier instances
        upon later ones, and ``(R, H, W)`` bool.

    Raises:
        ValueError: a number of sizes that is not B, a threshold outside 0..1 with ``fix``, windows of images, or both
            other forms asked for at once.
        TypeError: outputs of OneFormer without ``fix``, or without class and mask logits.
    """
    if return_coco_annotation and return_binary_maps:
        raise ValueError("return_coco_annotation and return_binary_maps cannot both be True")
    if not (0 <= mask_threshold <= 1 and 0 <= overlap_mask_area_threshold <= 1):
        raise ValueError(
            f"mask_threshold and overlap_mask_area_threshold must lie in 0..1, got {mask_threshold} and "
            f"{overlap_mask_area_threshold}"
        )
    results = []
    for predictions, size in _groups(outputs, target_sizes, padded_size, valid_sizes, fix):
        rule = predictions.rule
        if rule == "oneformer":
            raise TypeError("outputs is OneFormer's, whose processor makes no instances; expected fix=True with it")
        as_rf_detr = rule == "rf_detr" and not fix
        for image, found in enumerate(_instances(predictions, size, mask_threshold, top_k, fix)):
            chosen = found["masks"].any(2).any(1)
            chosen &= found["scores"] > threshold if as_rf_detr else found["scores"] >= threshold
            order = _listed(predictions.class_logits[image], found, "fix" if fix else rule)
            order = order[chosen[order]]
            masks = found["masks"][order]
            segmentation = torch.full(size, -1.0, device=masks.device)
            if as_rf_detr or fix:
                least = overlap_mask_area_threshold if fix else 0.0
                kept = _paint_below(segmentation, masks, least, drop=fix or not return_binary_maps)
                order, masks = order[kept], masks[kept]
            else:
                for index, mask in enumerate(masks):
                    segmentation.masked_fill_(mask, index)
            first = 1 if as_rf_detr else 0
            infos: list[dict[str, Any]] = [
                {"id": index, "label_id": label, "was_fused": False, "score": round(score, SCORE_DIGITS)}
                for index, (label, score) in enumerate(
                    zip(found["labels"][order].tolist(), found["scores"][order].tolist(), strict=True), first
                )
            ]
            if as_rf_detr:
                segmentation = segmentation.int() + (segmentation >= 0)
            result: Tensor | list[Any] = segmentation
            if return_coco_annotation:
                result = run_lengths(masks) if fix else _runs_of_values(segmentation)
            elif return_binary_maps and (as_rf_detr or len(masks) > 0):
                result = masks if as_rf_detr else masks.float()
            results.append({"segmentation": result, "segments_info": infos})
    return results


def _instances(
    predictions: FinalPredictions, size: Size, mask_threshold: float, top_k: int | None, fix: bool
) -> list[dict[str, Any]]:
    """The instances of each image, masks by ``mask_threshold`` where it has an effect."""
    if predictions.rule == "eomt" and not fix:  # no class but the best one of each query
        logs = predictions.class_logits.float().log_softmax(-1)
        best = logs[..., :-1].max(-1, keepdim=True)
        alone = torch.full_like(logs, -torch.inf).scatter_(-1, best.indices, best.values)
        alone[..., -1] = (-best.values.expm1()).log()[..., 0]
        predictions = replace(predictions, class_logits=alone)
    options = {"top_k": top_k or predictions.class_logits.shape[1], "details": True}
    found: list[dict[str, Any]] = predictions.instances(size, **options)
    if mask_threshold != 0.5 and (fix or predictions.rule == "rf_detr"):
        assert isinstance(predictions.masks, Tensor)
        logits = predictions.masks.to(torch.promote_types(predictions.masks.dtype, torch.float32))
        least = torch.tensor(mask_threshold, dtype=torch.float64).logit().item()
        shifted = replace(predictions, masks=logits - least)
        for one, other in zip(found, shifted.instances(size, **options), strict=True):
            one["masks"] = other["masks"]
    return found


def _listed(class_logits: Tensor, found: dict[str, Any], rule: str) -> Tensor:
    """The order ``(R,)`` in which a processor lists the instances of an image, or by score for the rule "fix"."""
    scores = found["scores"]
    if rule == "fix":
        return scores.argsort(descending=True, stable=True)
    if rule == "eomt":
        return found["queries"].argsort()
    if rule == "rf_detr":
        return torch.arange(len(scores), device=scores.device)
    # transformers keeps the order that an unsorted topk gives.
    probabilities = class_logits.softmax(-1)[:, :-1].flatten().topk(len(scores), sorted=False).values
    return probabilities.argsort(descending=True, stable=True).argsort()


def _paint_below(segmentation: Tensor, masks: Tensor, least: float, drop: bool) -> Tensor:
    """Gives each mask the pixels that no earlier one has. Returns the indices of the masks that are kept: with ``drop``
    those that get more than the ``least`` share of their pixels."""
    kept: list[int] = []
    for index, mask in enumerate(masks):
        visible = mask & (segmentation < 0)
        if drop and not int(visible.sum()) > least * int(mask.sum()):
            continue
        segmentation.masked_fill_(visible, len(kept))
        kept.append(index)
    return torch.tensor(kept, dtype=torch.long, device=masks.device)


def post_process_panoptic_segmentation(
    outputs: Any,
    threshold: float = 0.5,
    mask_threshold: float = 0.5,
    overlap_mask_area_threshold: float = 0.8,
    label_ids_to_fuse: Collection[int] | None = None,
    target_sizes: Sizes | None = None,
    *,
    fix: bool = False,
    return_binary_maps: bool = False,
    padded_size: Size | None = None,
    valid_sizes: Sequence[Size] | None = None,
) -> list[dict[str, Any]]:
    """Each pixel belongs to the most probable of the confident queries.

    Args:
        outputs: of the model.
        threshold: the class probability that a query must exceed.
        mask_threshold: the probability at which a pixel belongs to a mask.
        overlap_mask_area_threshold: the visible share of its mask that a query must exceed.
        label_ids_to_fuse: classes whose segments are merged into one; none by default.
        target_sizes: (H, W) of each image's result; by default the size to which the mask logits are brought first.
        fix: correct two faults of transformers that are kept by default: after a merged segment the ids of later ones
            repeat, and the area of a mask is measured on probabilities multiplied by the class score. EoMT's processor
            has neither; its segments are then numbered as all others.
        return_binary_maps: one binary map ``(R, H, W)`` float32 for each segment instead of a segment map; needs
            ``fix``, since maps of ids that repeat cannot be told apart.
        padded_size, valid_sizes: as for :func:`post_process_semantic_segmentation`.

    Returns:
        For each image {"segmentation", "segments_info"}: ``(H, W)`` int32 with segment ids from 1 and 0 where there is
        none (float32 and -1 everywhere if no query is confident), and a list of {"id", "label_id", "was_fused",
        "score"}. For EoMT, unless ``fix`` is set, int64 with ids from 0 and -1 where there is none.

    Raises:
        ValueError: a number of sizes that is not B, thresholds outside 0..1, windows of images, outputs of RF-DETR, or
            binary maps without ``fix``.
        TypeError: outputs without class and mask logits.
    """
    if return_binary_maps and not fix:
        raise ValueError("return_binary_maps=True needs fix=True, because ids repeat without it")
    results = []
    for predictions, size in _groups(outputs, target_sizes, padded_size, valid_sizes):
        is_eomt = predictions.rule == "eomt"
        exact = {} if fix or predictions.rule not in ("huggingface", "oneformer") else {"rule": "huggingface-exact"}
        found: Any = predictions.panoptic(
            size,
            threshold=threshold,
            overlap_threshold=overlap_mask_area_threshold,
            mask_threshold=mask_threshold,
            stuff_classes=frozenset(label_ids_to_fuse or ()),
            **exact,
        )
        first = 0 if is_eomt and not fix else 1
        scores, classes = predictions.class_logits.softmax(-1).max(-1)
        confident = ((classes != predictions.class_logits.shape[-1] - 1) & (scores > threshold)).any(1).tolist()
        for any_query, (segmentation, segments) in zip(confident, found, strict=True):
            infos = [
                {
                    "id": segment["id"] - 1 + first,
                    "label_id": segment["category_id"],
                    "was_fused": not segment["isthing"],
                    "score": round(segment["score"], SCORE_DIGITS),
                }
                for segment in segments
            ]
            if return_binary_maps:
                ids = torch.tensor([segment["id"] for segment in segments], device=segmentation.device)
                segmentation = (segmentation == ids[:, None, None]).float()
            elif not any_query:
                segmentation = torch.full(size, -1.0, device=segmentation.device)
            elif first == 0:
                segmentation = segmentation.long() - 1
            results.append({"segmentation": segmentation, "segments_info": infos})
    return results


def _groups(
    outputs: Any,
    target_sizes: Sizes | None,
    padded_size: Size | None,
    valid_sizes: Sequence[Size] | None,
    as_original: bool = False,
) -> Iterator[tuple[FinalPredictions, Size]]:
    """The predictions for images in order that share a size, and that size. ``as_original`` replaces the steps of the
    processors of MaskFormer, Mask2Former and OneFormer by those of Mask2Former's authors."""
    predictions = FinalPredictions.from_outputs(outputs, padded_size=padded_size, valid_sizes=valid_sizes)
    if as_original and predictions.rule in ("huggingface", "oneformer"):
        predictions = FinalPredictions.from_outputs(
            outputs, rule="mask2former", padded_size=padded_size, valid_sizes=valid_sizes
        )
    count = predictions.num_images
    if target_sizes is None:
        if predictions.windows is not None or valid_sizes is not None:
            raise ValueError("target_sizes must be given for windows, and with valid_sizes")
        assert isinstance(predictions.masks, Tensor)
        height, width = predictions.padded_size or predictions.masks.shape[-2:]
        sizes = [(int(height), int(width))] * count
    else:
        sizes = [(int(height), int(width)) for height, width in target_sizes]
    if len(sizes) != count:
        raise ValueError(f"target_sizes has {len(sizes)} sizes for {count} images")
    if predictions.windows is None and len(set(sizes)) == 1 and len(set(map(tuple, valid_sizes or ()))) <= 1:
        yield predictions, sizes[0]
        return
    for image, size in enumerate(sizes):
        yield predictions.of_image(image), size


def _runs_of_values(segmentation: Tensor) -> list[list[int]]:
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
