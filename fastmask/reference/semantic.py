"""Semantic segmentation from class and mask logits."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask.reference._common import as_batch, check_choice, image_logits, resize_bilinear

ORDERS = ("masks", "scores")
OUTPUTS = ("labels", "scores")


def semantic_inference(
    class_logits: Tensor,
    mask_logits: Tensor,
    size: tuple[int, int],
    *,
    order: str = "masks",
    output: str = "labels",
    padded_size: tuple[int, int] | None = None,
    valid_size: tuple[int, int] | None = None,
) -> Tensor:
    """score[k] = sum_n softmax(class_logits[n])[k] sigmoid(mask_logits[n]), label = argmax_k score[k].

    MaskFormer (arXiv:2107.06278), section 3.4, "semantic inference"; the no-object class K takes part in the softmax
    only. Resizing is bilinear with align_corners=False; ``order`` chooses what is resized:

    - ``order="masks"``: the mask logits are resized, then scored. With ``padded_size`` and ``valid_size`` this is the
      original code with SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE, which it always uses for panoptic segmentation.
    - ``order="scores"``: the mask logits are scored, then the scores are resized. With ``padded_size`` and
      ``valid_size`` this is the original code without that option, its default for semantic data sets; with neither
      it is Hugging Face's code for MaskFormer, and with ``padded_size=(384, 384)`` that for Mask2Former.

    Args:
        class_logits: ``(B, N, K+1)`` float, or ``(N, K+1)`` for one image.
        mask_logits: ``(B, N, h, w)`` float, or ``(N, h, w)``.
        size: (H, W) of the result.
        order: "masks" or "scores".
        output: "labels" or "scores".
        padded_size: (height, width) of the padded network input, to which the mask logits are upsampled first; None
            skips this step.
        valid_size: (height, width) of the image within it, at its top left, to which they are then cropped; None
            skips this step.

    Returns:
        "labels": ``(B, H, W)`` in the smallest of uint8, int16 and int32 that holds ``0..K-1``; ties take the lowest
        class. "scores": ``(B, K, H, W)`` in the promoted dtype of the logits. For one image B is 1.

    Raises:
        ValueError: an unknown ``order`` or ``output``, shapes that do not fit, or ``valid_size`` beyond the map.
    """
    check_choice("order", order, ORDERS)
    check_choice("output", output, OUTPUTS)
    class_logits, mask_logits = as_batch(class_logits, mask_logits)
    dtype = torch.promote_types(class_logits.dtype, mask_logits.dtype)
    class_logits = class_logits.to(dtype)
    mask_logits = image_logits(mask_logits.to(dtype), padded_size, valid_size)
    if order == "masks":
        scores = _scores(class_logits, resize_bilinear(mask_logits, size))
    else:
        scores = resize_bilinear(_scores(class_logits, mask_logits), size)
    if output == "scores":
        return scores
    return scores.argmax(1).to(label_dtype(scores.shape[1]))


def label_dtype(num_classes: int) -> torch.dtype:
    """The smallest of uint8, int16 and int32 that holds the classes ``0..num_classes-1``."""
    if num_classes <= 2**8:
        return torch.uint8
    return torch.int16 if num_classes <= 2**15 else torch.int32


def _scores(class_logits: Tensor, mask_logits: Tensor) -> Tensor:
    """``(B, K, h, w)`` from ``(B, N, K+1)`` and ``(B, N, h, w)``."""
    return torch.einsum("bnk,bnhw->bkhw", class_logits.softmax(-1)[..., :-1], mask_logits.sigmoid())
