"""Semantic, panoptic and instance results from class and mask logits."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from fastmask.functional._backend import choose_backend
from fastmask.functional._checks import check_floating, computing_dtype
from fastmask.ops.library import Operator

SEMANTIC = Operator("semantic_inference")
PANOPTIC = Operator("panoptic_inference")
INSTANCE = Operator("instance_inference")


@torch.no_grad()
def semantic_inference(
    class_logits: Tensor,
    mask_logits: Tensor,
    size: tuple[int, int],
    *,
    order: str = "masks",
    output: str = "labels",
    padded_size: tuple[int, int] | None = None,
    valid_size: tuple[int, int] | None = None,
    backend: str = "auto",
) -> Tensor:
    """score[k] = sum_n softmax(class_logits[n])[k] sigmoid(mask_logits[n]); label = argmax_k score[k].

    MaskFormer (arXiv:2107.06278), section 3.4, "semantic inference". Resizing is bilinear (align_corners=False).

    Args:
        class_logits: ``(B, N, K+1)`` floating point; the last class is "no object".
        mask_logits: ``(B, N, h, w)`` floating point.
        size: (H, W) of the result, in pixels.
        order: "masks" resizes the mask logits and then scores them, as the original code does before panoptic
            inference; "scores" scores the logits and resizes the scores, as Hugging Face's code does.
        output: "labels" or "scores".
        padded_size: (height, width) of the padded network input, to which the logits are upsampled first.
        valid_size: (height, width) of the image within it, at its top left, to which they are then cropped.
        backend: "auto" or "reference".

    Returns:
        "labels": ``(B, H, W)`` in the smallest of uint8, int16 and int32 that holds ``0..K-1``. "scores":
        ``(B, K, H, W)`` float32 (float64 for float64 logits). Carries no gradient.

    Raises:
        ValueError: shapes or options that do not fit.
        TypeError: logits that are not floating point.
        RuntimeError: the backend asked for cannot run.
    """
    class_logits, mask_logits = _prepare(SEMANTIC, class_logits, mask_logits, size, backend)
    from fastmask import reference

    return reference.semantic_inference(
        class_logits, mask_logits, size, order=order, output=output, padded_size=padded_size, valid_size=valid_size
    )


@torch.no_grad()
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
    backend: str = "auto",
) -> list[tuple[Tensor, list[dict[str, int | float | bool]]]]:
    """Each pixel goes to the confident query that is most probable there; weak and mostly hidden ones are dropped.

    MaskFormer (arXiv:2107.06278), section 3.4, "general inference". ``fastmask.reference.panoptic`` says how the rules
    differ.

    Args:
        class_logits: ``(B, N, K+1)`` floating point; the last class is "no object".
        mask_logits: ``(B, N, h, w)`` floating point.
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
    class_logits, mask_logits = _prepare(PANOPTIC, class_logits, mask_logits, size, backend)
    thresholds = {"threshold": threshold, "overlap_threshold": overlap_threshold, "mask_threshold": mask_threshold}
    for name, value in thresholds.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must lie in 0..1, got {value}")
    from fastmask import reference

    return reference.panoptic_inference(
        class_logits,
        mask_logits,
        size,
        rule=rule,
        **thresholds,
        stuff_classes=stuff_classes,
        padded_size=padded_size,
        valid_size=valid_size,
    )


@torch.no_grad()
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
    backend: str = "auto",
) -> list[dict[str, Tensor]]:
    """The most probable (query, class) pairs of each image, with binary masks and scores.

    score = class probability * mean of sigmoid(x) over the mask x > 0 (Mask2Former, arXiv:2112.01527).

    Args:
        class_logits: ``(B, N, K+1)`` floating point; the last class is "no object".
        mask_logits: ``(B, N, h, w)`` floating point.
        size: (H, W) of the masks, in pixels.
        top_k: how many pairs an image gives at most.
        rule: "mask2former" or "huggingface"; ``fastmask.reference.instance`` says how they differ.
        stuff_classes: classes that give no instances.
        padded_size, valid_size: as in ``semantic_inference``.
        backend: "auto" or "reference".

    Returns:
        For each image {"scores": ``(R,)``, "labels": ``(R,)`` int64, "masks": ``(R, H, W)`` bool}, R <= top_k, by
        falling class probability.

    Raises:
        ValueError: shapes or options that do not fit.
        TypeError: logits that are not floating point.
        RuntimeError: the backend asked for cannot run.
    """
    class_logits, mask_logits = _prepare(INSTANCE, class_logits, mask_logits, size, backend)
    from fastmask import reference

    return reference.instance_inference(
        class_logits,
        mask_logits,
        size,
        top_k=top_k,
        rule=rule,
        stuff_classes=stuff_classes,
        padded_size=padded_size,
        valid_size=valid_size,
    )


def _prepare(
    operator: Operator, class_logits: Tensor, mask_logits: Tensor, size: tuple[int, int], backend: str
) -> tuple[Tensor, Tensor]:
    """The logits in the dtype that the reference computes in, checked."""
    check_floating("class_logits", class_logits, 3, "(B, N, K+1)")
    check_floating("mask_logits", mask_logits, 4, "(B, N, h, w)")
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size must be (H, W), both at least 1, got {tuple(size)}")
    choose_backend(operator, backend, mask_logits)
    dtype = computing_dtype(class_logits, mask_logits)
    return class_logits.to(dtype), mask_logits.to(dtype)
