"""``fastmask::instance_masks``: binary masks of chosen queries; ``fastmask::rle_encode``: run lengths of binary masks.

Args of ``instance_masks``:
    mask_logits: ``(B, N, rows, w)`` float32, bfloat16 or float16.
    queries: ``(B, R)`` int64, the query of each mask, each interpolated once however often it occurs; -1 for padding.
    packed: masks as bits.
    The other arguments are the geometry that all inference operators share.

Returns of ``instance_masks``:
    masks: ``(B, R, out_rows, W)`` bool, whether the resampled logit x exceeds 0 (NaN does not); with ``packed``,
        ``(B, R, out_rows, ceil(W / 8))`` uint8, the first pixel in the lowest bit and bits beyond W zero. Zeros for
        padding. On a GPU rows of bytes are 8 * ceil(W / 8) apart.
    foreground_sum: ``(B, R)`` float32, the sum of sigmoid(x) over the mask.
    area: ``(B, R)`` int32, pixels of the mask.
    boxes: ``(B, R, 4)`` int32, (left, top, right, bottom) of the mask in pixels of the full result, right and bottom
        exclusive; zeros for an empty mask.
    nan_logits: ``(B, R)`` int32, how many of the given logits of the query are NaN.

``rle_encode`` runs on the CPU alone: run lengths are data for the host. It takes ``(R, H, W)`` bool or the packed
``(R, H, ceil(W / 8))`` uint8, and the width W. It returns the compressed counts of pycocotools, columns first, of all
masks one after the other, ``(T,)`` uint8; and ``(R + 1,)`` int64, where each begins and the last ends.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmask.ops._geometry import GEOMETRY
from fastmask.ops.library import Operator


def _fake(
    mask_logits: Tensor,
    queries: Tensor,
    packed: bool,
    grid: Sequence[int],
    padded_size: Sequence[int] | None,
    valid_size: Sequence[int] | None,
    size: Sequence[int],
    in_top: int,
    out_top: int,
    out_rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    groups = (size[1] + 7) // 8
    if packed:
        masks = queries.new_empty((*queries.shape, out_rows, groups), dtype=torch.uint8)
    else:
        pitch = size[1] if queries.device.type == "cpu" else 8 * groups
        masks = queries.new_empty((*queries.shape, out_rows, pitch), dtype=torch.bool)[..., : size[1]]
    return (
        masks,
        queries.new_empty(queries.shape, dtype=torch.float32),
        queries.new_empty(queries.shape, dtype=torch.int32),
        queries.new_empty((*queries.shape, 4), dtype=torch.int32),
        queries.new_empty(queries.shape, dtype=torch.int32),
    )


def _fake_rle(masks: Tensor, width: int) -> tuple[Tensor, Tensor]:
    length = torch.library.get_ctx().new_dynamic_size()
    return masks.new_empty(length, dtype=torch.uint8), masks.new_empty(masks.shape[0] + 1, dtype=torch.int64)


OPERATOR = Operator(
    "instance_masks",
    f"(Tensor mask_logits, Tensor queries, bool packed, {GEOMETRY}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake,
    native=("cpu",),
    triton="instance",
)
RLE_ENCODE = Operator(
    "rle_encode",
    "(Tensor masks, int width) -> (Tensor, Tensor)",
    _fake_rle,
    native=("cpu",),
    dtypes=(torch.bool, torch.uint8),
)
