"""Semantic segmentation by the hard assignment of pixels to queries."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask.ops._mask_source import prepare
from fastmask.ops.panoptic import PANOPTIC_WINNERS, kept_queries, pixel_winners
from fastmask.targets import label_dtype


@torch.no_grad()
def general_inference(
    class_logits: Tensor,
    mask_logits: Tensor | tuple[Tensor, Tensor],
    size: tuple[int, int],
    *,
    ignore_index: int = 255,
    padded_size: tuple[int, int] | None = None,
    valid_size: tuple[int, int] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Each pixel goes to the query i that maximizes p_i(c_i) m_i[h, w], and gets its most likely class c_i.

    MaskFormer (arXiv:2107.06278), section 3.4, "general inference" for semantic segmentation. Queries with a NaN class
    logit, or whose most likely class is "no object", take no part; segments of the same class are merged.
    ``fastmask.semantic_inference`` is the paper's other rule, which sums over queries instead.

    Args:
        class_logits: ``(B, N, K+1)`` floating point; the last class is "no object".
        mask_logits: ``(B, N, h, w)`` floating point; or a pair ``mask_embed (B, N, C)`` and ``pixel_embed
            (B, C, h, w)`` to multiply over C.
        size: (H, W) of the result, in pixels.
        ignore_index: the label of pixels that no query wins, in ``0..2^31-1``.
        padded_size, valid_size: as in ``semantic_inference``.
        backend: "auto", "reference", "native" or "triton".

    Returns:
        ``(B, H, W)`` labels in the smallest of uint8, int16 and int32 that holds the classes and ``ignore_index``.

    Raises:
        ValueError: shapes, devices or options that do not fit.
        TypeError: logits that are not floating point.
        RuntimeError: the requested backend cannot run.
    """
    if ignore_index < 0:
        raise ValueError(f"ignore_index must be at least 0, got {ignore_index}")
    if ignore_index >= 2**31:
        raise ValueError(f"ignore_index must fit in int32, got {ignore_index}")
    masks, backend, dtype = prepare(PANOPTIC_WINNERS, class_logits, mask_logits, size, padded_size, valid_size, backend)
    if backend == "reference":
        from fastmask import reference

        steps = {"padded_size": padded_size, "valid_size": valid_size}
        logits = masks.full_logits(dtype)
        return reference.general_inference(class_logits.to(dtype), logits, size, ignore_index=ignore_index, **steps)
    masks, scores, classes, _ = kept_queries(class_logits.to(dtype), masks, threshold=0.0)
    winner = pixel_winners(backend, scores, masks)[0]
    # Pixels without a winner have index -1; an extra first entry serves them.
    num_classes = class_logits.shape[-1] - 1
    table = torch.nn.functional.pad(classes, (1, 0), value=ignore_index)
    table = table.to(label_dtype(max(num_classes, ignore_index + 1)))
    return table.gather(1, winner.flatten(1).long() + 1).view(winner.shape)
