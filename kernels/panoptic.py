"""Panoptic inference: the query that wins each pixel, and the areas of all queries, in one launch per batch.

Kept queries are staged first, in order, so that the loop over queries ends after the last of them. A thread holds
several pixels and several columns of queries, and the best query so far of each column; columns are compared once, at
the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask.kernels._common import _exp2, _reciprocal, kernel, pick_config
from fastmask.kernels._layout import with_contiguous_planes
from fastmask.kernels._resample import BLOCK_N, Resampling, _interpolate, _tile_taps
from fastmask.kernels._stage import count_nans, staged_bands


@dataclass(frozen=True)
class PanopticConfig:
    """Tuning: the size of the tile of pixels that a program owns."""

    tile_rows: int = 8
    tile_columns: int = 16
    num_warps: int = 4


CONFIGS = {None: PanopticConfig()}


@triton.jit
def _column_counts(inside, PIXELS: tl.constexpr):
    """How many of ``[PIXELS, BLOCK_N]`` are true in each column. Threads exchange the counts of four columns as the
    bytes of one integer."""
    byte = tl.arange(0, 4)[None, None, :] * 8
    flags = tl.reshape(inside.to(tl.int32), [PIXELS, BLOCK_N // 4, 4])
    packed = tl.sum(tl.sum(flags << byte, 2), 0)  # [BLOCK_N / 4]
    counts = (packed[:, None] >> (tl.arange(0, 4)[None, :] * 8)) & 255
    return tl.reshape(counts, [BLOCK_N])


@kernel
def _panoptic_fwd_kernel(
    stage_ptr, row_index_ptr, row_weight_ptr, column_index_ptr, column_weight_ptr,
    scores_ptr, order_ptr, kept_ptr, winner_ptr, areas_ptr,
    N, blocks, cells, columns, top, count, H, W, tiles_x, threshold,
    TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr, PROBABILITIES: tl.constexpr, CLIP: tl.constexpr,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr,
):  # fmt: skip
    """winner = argmax_n scores[n] sigmoid(x[n]) over the kept queries, the lowest among equals, for one tile of pixels
    (MaskFormer, arXiv:2107.06278, section 3.4). Interpolates x or, with PROBABILITIES, sigmoid(x) from the stage.

        stage   (B, cells, blocks * BLOCK_N), NaN where logits are NaN; taps as in ``_semantic_fwd_kernel``
        scores  (B, N) and order (B, N), score and query at each place of the stage;  kept (B), how many places count
        winner  (B, H, W), -1 where nothing was kept or all is NaN; with CLIP also where the winner is not ``inside``
        areas   (B, N, 3), by place; adds the pixels won, inside, and where ``winner`` is the query

    A pixel is inside a mask where x, or sigmoid(x), is at least ``threshold``. Probabilities below 2^-126 are 0.
    """
    threshold = tl.cast(threshold, tl.float32)
    padded_n = blocks * BLOCK_N
    image = tl.program_id(1).to(tl.int64)
    PIXELS: tl.constexpr = TILE_Y * TILE_X
    visible, at, taps, shares = _tile_taps(
        row_index_ptr, row_weight_ptr, column_index_ptr, column_weight_ptr, columns, top, count, H, W, tiles_x,
        TAPS_Y, TAPS_X, TILE_Y, TILE_X,
    )  # fmt: skip
    offsets = ()
    weights = ()
    for tap in tl.static_range(TAPS_Y * TAPS_X):
        offsets = offsets + (taps[tap] * padded_n,)  # noqa: RUF005 (Triton has no stars)
        share = shares[tap] * (1.0 if PROBABILITIES else -1.44269504)
        # With NaN, pixels beyond the result are inside no mask, and no query wins them.
        weights = weights + (tl.where(visible, share, float("nan")),)  # noqa: RUF005

    stage_ptr += image * cells * padded_n
    scores_ptr += image * N
    areas_ptr += image * N * 3
    kept = tl.load(kept_ptr + image)
    best = tl.full([PIXELS, BLOCK_N], -1.0, dtype=tl.float32)
    mark = tl.full([PIXELS, BLOCK_N], -1, dtype=tl.int32)  # twice the block, plus one if the pixel is inside
    for block in range(tl.cdiv(kept, BLOCK_N)):
        n = block * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        score = tl.load(scores_ptr + n, mask=n < kept, other=float("-inf"))  # wins nothing
        z = tl.zeros([PIXELS, BLOCK_N], dtype=tl.float32)
        z = _interpolate(z, stage_ptr + block * BLOCK_N, offsets, weights, TAPS_Y * TAPS_X)
        if PROBABILITIES:
            inside = z >= threshold
            product = score[None, :] * z
        else:
            inside = z <= threshold * -1.44269504
            product = score[None, :] * _reciprocal(1.0 + _exp2(z))
        better = product > best
        best = tl.where(better, product, best)
        mark = tl.where(better, 2 * block + inside.to(tl.int32) if CLIP else 2 * block, mark)
        area = _column_counts(inside, PIXELS)
        tl.atomic_add(areas_ptr + n * 3 + 1, area, mask=(n < kept) & (area > 0), sem="relaxed")

    winning = tl.max(best, 1)[:, None]
    # Later blocks hold higher places, so the minimum over the columns is the lowest place among equals.
    place = (mark >> 1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    place = tl.where((best == winning) & (mark >= 0), place, 1 << 30)
    lowest = tl.min(place, 1)  # [PIXELS]
    won = lowest < 1 << 30
    own = won
    if CLIP:
        own = won & (tl.max(tl.where(place == lowest[:, None], mark & 1, 0), 1) != 0)
    query = tl.load(order_ptr + image * N + lowest, mask=own, other=-1)
    tl.store(winner_ptr + at, query.to(tl.int32), mask=visible)

    # A tile has few winners, so they are counted one at a time.
    least = tl.min(lowest, 0)
    while least < 1 << 30:
        of_place = lowest == least
        tl.atomic_add(areas_ptr + least * 3, tl.sum(of_place.to(tl.int32), 0), sem="relaxed")
        tl.atomic_add(areas_ptr + least * 3 + 2, tl.sum((of_place & own).to(tl.int32), 0), sem="relaxed")
        lowest = tl.where(of_place, 1 << 30, lowest)
        least = tl.min(lowest, 0)


def panoptic_winners(
    scores: Tensor, mask_logits: Tensor, resize_probabilities: bool, clip_to_mask: bool, mask_threshold: float,
    *geometry: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``fastmask::panoptic_winners``: the winner of each pixel (B, out_rows, W), areas (B, N, 3), and the number of NaN
    logits of each kept query (B, N). ``geometry``: see ``Resampling``."""
    batch, queries = scores.shape
    resampling = Resampling(*geometry)
    scores, mask_logits = scores.contiguous(), with_contiguous_planes(mask_logits)
    keep = scores > 0
    nan_logits = count_nans(mask_logits) * keep
    shape = (batch, resampling.out_rows, resampling.size[1])
    winner = torch.full(shape, -1, dtype=torch.int32, device=scores.device)
    areas = torch.zeros((batch, queries, 3), dtype=torch.int32, device=scores.device)
    if batch == 0 or queries == 0:
        return winner, areas, nan_logits
    config = pick_config(CONFIGS, mask_logits.device)
    order = keep.logical_not().to(torch.uint8).argsort(dim=-1, stable=True)
    placed_scores = scores.gather(1, order)
    kept = keep.sum(-1, dtype=torch.int32)
    threshold = mask_threshold
    if not resize_probabilities:
        threshold = -math.log(1 / mask_threshold - 1) if 0 < mask_threshold < 1 else math.inf * (mask_threshold - 0.5)
    for band in staged_bands(mask_logits, order, None, resize_probabilities, True, resampling, config.tile_rows):
        programs, tiles = band.launch(winner, config.tile_rows, config.tile_columns)
        _panoptic_fwd_kernel[programs](
            **tiles,
            scores_ptr=placed_scores,
            order_ptr=order,
            kept_ptr=kept,
            winner_ptr=winner,
            areas_ptr=areas,
            N=queries,
            threshold=threshold,
            PROBABILITIES=resize_probabilities,
            CLIP=clip_to_mask,
            num_warps=config.num_warps,
        )
    places = order.argsort(dim=-1)
    return winner, areas.gather(1, places[:, :, None].expand(-1, -1, 3)), nan_logits
