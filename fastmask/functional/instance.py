"""Instance segmentation from class logits, and mask logits or embeddings."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from fastmask.functional._inference import prepare
from fastmask.ops.library import Operator

OPERATOR = Operator("instance_inference")


@torch.no_grad()
def instance_inference(
    class_logits: Tensor,
    mask_logits: Tensor | tuple[Tensor, Tensor],
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
        mask_logits: ``(B, N, h, w)`` floating point; or a pair of ``mask_embed (B, N, C)`` and ``pixel_embed
            (B, C, h, w)``, whose product over C they are.
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
    masks, _, dtype = prepare(OPERATOR, class_logits, mask_logits, size, padded_size, valid_size, backend)
    from fastmask import reference

    return reference.instance_inference(
        class_logits.to(dtype),
        masks.full_logits(dtype),
        size,
        top_k=top_k,
        rule=rule,
        stuff_classes=stuff_classes,
        padded_size=padded_size,
        valid_size=valid_size,
    )
