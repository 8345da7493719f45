"""Panoptic inference: the query that wins each pixel, and the areas of all queries, in one launch for the batch.

The queries that were kept are staged first, in their order, so that the loop over them ends where they do. A thread
holds pixels and queries both, and remembers for each of its columns of queries the best so far; columns meet once at
the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask.kernels._common import COMPILER_OPTIONS, _reciprocal, pick_config
from fastmask.kernels._resample import BLOCK_N, _exp2, _widen, count_nans, staged_bands


@dataclass(frozen=True)
class PanopticConfig:
    """Tuning: the pixels of the result that a program owns."""

    tile_rows: int = 8
    tile_columns: int = 16
    num_warps: int = 4


CONFIGS = {None: PanopticConfig()}


@triton.jit
def _panoptic_fwd_kernel(
    stage_ptr, row_index_ptr, row_weight_ptr, column_index_ptr, column_weight_ptr,
    scores_ptr, order_ptr, kept_ptr, winner_ptr, areas_ptr,
    N, padded_n, cells, columns, top, count, H, W, tiles_x, threshold,
    TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr, PROBABILITIES: tl.constexpr, CLIP: tl.constexpr,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """winner = argmax_n scores[n] sigmoid(x[n]) over the queries kept, the lowest of equals, for one tile of pixels
    (MaskFormer, arXiv:2107.06278, section 3.4); x is interpolated from the stage, or sigmoid(x) is (PROBABILITIES).

        stage   (B, cells, padded_n), NaN where logits are; taps as in ``_semantic_fwd_kernel``
        scores  (B, N);  order (B, N), the query at each place of the stage;  kept (B), how many places count
        winner  (B, H, W), -1 where nothing was kept or all is NaN; with CLIP also where the winner is not ``inside``
        areas   (B, N, 3) is increased by the pixels won, inside, and where ``winner`` is the query

    A pixel is inside a mask where x, or sigmoid(x), is at least ``threshold``. Logits below -80 count as -80, so that
    no product is 0.
    """
    threshold = tl.cast(threshold, tl.float32)
    image = tl.program_id(1).to(tl.int64)
    PIXELS: tl.constexpr = TILE_Y * TILE_X
    pixel = tl.arange(0, PIXELS)  # [PIXELS]
    y = tl.program_id(0) // tiles_x * TILE_Y + pixel // TILE_X
    x = tl.program_id(0) % tiles_x * TILE_X + pixel % TILE_X
    visible = (y < count) & (x < W)
    at = image * H * W + (top + y).to(tl.int64) * W + x
    y = tl.minimum(y, count - 1)
    x = tl.minimum(x, W - 1)
    offsets = ()
    weights = ()
    for ty in tl.static_range(TAPS_Y):
        row = tl.load(row_index_ptr + ty * count + y) * columns
        weight_y = tl.load(row_weight_ptr + ty * count + y)
        for tx in tl.static_range(TAPS_X):
            offsets = offsets + ((row + tl.load(column_index_ptr + tx * W + x)) * padded_n,)
            weights = weights + (weight_y * tl.load(column_weight_ptr + tx * W + x),)

    stage_ptr += image * cells * padded_n
    order_ptr += image * N
    areas_ptr += image * N * 3
    kept = tl.load(kept_ptr + image)
    best = tl.zeros([PIXELS, BLOCK_N], dtype=tl.float32)
    mark = tl.full([PIXELS, BLOCK_N], -1, dtype=tl.int32)  # twice the block, and one where the pixel is inside
    for block in range(tl.cdiv(kept, BLOCK_N)):
        n = block * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        query = tl.load(order_ptr + n, mask=n < kept, other=0)
        score = tl.load(scores_ptr + image * N + query, mask=n < kept, other=0.0)
        z = tl.zeros([PIXELS, BLOCK_N], dtype=tl.float32)
        for tap in tl.static_range(TAPS_Y * TAPS_X):
            value = tl.load(stage_ptr + (offsets[tap][:, None] + n[None, :]))
            z = tl.fma(_widen(value), weights[tap][:, None], z)
        inside = z >= threshold
        if PROBABILITIES:
            product = score[None, :] * tl.where(z == z, tl.maximum(z, 1e-30), 0.0)
        else:
            probability = _reciprocal(1.0 + _exp2(tl.maximum(z, -80.0) * -1.44269504))
            product = score[None, :] * tl.where(z == z, probability, 0.0)
        better = product > best
        best = tl.where(better, product, best)
        mark = tl.where(better, 2 * block + inside.to(tl.int32), mark)
        area = tl.sum((inside & visible[:, None]).to(tl.int32), 0)  # [BLOCK_N]
        tl.atomic_add(areas_ptr + query * 3 + 1, area, mask=(n < kept) & (area > 0), sem="relaxed")

    winning = tl.max(best, 1)[:, None]
    column = tl.arange(0, BLOCK_N)[None, :]
    # Places rise with the block first, so the lowest of equals is the least of these.
    place = tl.where((best == winning) & (mark >= 0), (mark >> 1) * BLOCK_N + column, 1 << 30)
    lowest = tl.min(place, 1)  # [PIXELS]
    won = visible & (lowest < 1 << 30)
    own = won
    if CLIP:
        own = tl.max(tl.where(place == lowest[:, None], mark & 1, 0), 1) != 0
        own = won & own
    query = tl.load(order_ptr + lowest, mask=won, other=0).to(tl.int32)
    tl.store(winner_ptr + at, tl.where(own, query, -1), mask=visible)

    # A tile has few winners: they are counted one after the other.
    left = tl.where(won, query, 1 << 30)
    least = tl.min(left, 0)
    while least < 1 << 30:
        of_query = left == least
        tl.atomic_add(areas_ptr + least * 3, tl.sum(of_query.to(tl.int32), 0), sem="relaxed")
        tl.atomic_add(areas_ptr + least * 3 + 2, tl.sum((of_query & own).to(tl.int32), 0), sem="relaxed")
        left = tl.where(of_query, 1 << 30, left)
        least = tl.min(left, 0)


def panoptic_winners(
    scores: Tensor,
    mask_logits: Tensor,
    resize_probabilities: bool,
    clip_to_mask: bool,
    mask_threshold: float,
    grid: list[int],
    padded_size: list[int] | None,
    valid_size: list[int] | None,
    size: list[int],
    in_top: int,
    out_top: int,
    out_rows: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """``fastmask::panoptic_winners``: the winner (B, out_rows, W) of each pixel, areas (B, N, 3) and how many logits of
    each query that was kept are NaN (B, N)."""
    batch, queries = scores.shape
    height, width = out_rows, size[1]
    keep = scores > 0
    nan_logits = count_nans(mask_logits) * keep
    winner = torch.full((batch, height, width), -1, dtype=torch.int32, device=scores.device)
    areas = torch.zeros((batch, queries, 3), dtype=torch.int32, device=scores.device)
    if batch == 0 or queries == 0:
        return winner, areas, nan_logits
    config = pick_config(CONFIGS, mask_logits.device)
    order = (~keep).to(torch.uint8).argsort(dim=-1, stable=True)
    kept = keep.sum(-1, dtype=torch.int32)
    threshold = mask_threshold
    if not resize_probabilities:
        threshold = -math.log(1 / mask_threshold - 1) if 0 < mask_threshold < 1 else math.inf * (mask_threshold - 0.5)
    geometry = grid, padded_size, valid_size, size, in_top, out_top, out_rows
    for band in staged_bands(mask_logits, order, None, resize_probabilities, True, *geometry, config.tile_rows):
        tiles_x = triton.cdiv(width, config.tile_columns)
        _panoptic_fwd_kernel[(triton.cdiv(band.count, config.tile_rows) * tiles_x, batch)](
            stage_ptr=band.stage,
            **band.taps.arguments(),
            scores_ptr=scores.contiguous(),
            order_ptr=order,
            kept_ptr=kept,
            winner_ptr=winner,
            areas_ptr=areas,
            N=queries,
            padded_n=band.padded_n,
            cells=band.cells,
            columns=band.columns,
            top=band.top,
            count=band.count,
            H=height,
            W=width,
            tiles_x=tiles_x,
            threshold=threshold,
            PROBABILITIES=resize_probabilities,
            CLIP=clip_to_mask,
            TILE_Y=config.tile_rows,
            TILE_X=config.tile_columns,
            BLOCK_N=BLOCK_N,
            num_warps=config.num_warps,
            num_stages=1,
            **COMPILER_OPTIONS,
        )
    return winner, areas, nan_logits
