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

from fastmask.kernels._common import COMPILER_OPTIONS, _reciprocal, kernel, pick_config
from fastmask.kernels._layout import with_contiguous_planes
from fastmask.kernels._resample import BLOCK_N, _exp2, _interpolate, _tile_taps, count_nans, staged_bands


@dataclass(frozen=True)
class PanopticConfig:
    """Tuning: the pixels of the result that a program owns."""

    tile_rows: int = 8
    tile_columns: int = 16
    num_warps: int = 4


CONFIGS = {None: PanopticConfig()}


@triton.jit
def _column_counts(inside, PIXELS: tl.constexpr, BLOCK_N: tl.constexpr):
    """How many of [PIXELS, BLOCK_N] are true in each column. Four columns' counts travel in one integer between the
    threads, a byte each."""
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
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """winner = argmax_n scores[n] sigmoid(x[n]) over the queries kept, the lowest of equals, for one tile of pixels
    (MaskFormer, arXiv:2107.06278, section 3.4); x is interpolated from the stage, or sigmoid(x) is (PROBABILITIES).

        stage   (B, cells, blocks * BLOCK_N), NaN where logits are; taps as in ``_semantic_fwd_kernel``
        scores  (B, N) and order (B, N), score and query at each place of the stage;  kept (B), how many places count
        winner  (B, H, W), -1 where nothing was kept or all is NaN; with CLIP also where the winner is not ``inside``
        areas   (B, N, 3) by place is increased by the pixels won, inside, and where ``winner`` is the query

    A pixel is inside a mask where x, or sigmoid(x), is at least ``threshold``. Probabilities below 2^-126 are 0.
    """
    threshold = tl.cast(threshold, tl.float32)
    padded_n = blocks * BLOCK_N
    image = tl.program_id(1).to(tl.int64)
    PIXELS: tl.constexpr = TILE_Y * TILE_X
    pixel = tl.arange(0, PIXELS)  # [PIXELS]
    y = tl.program_id(0) // tiles_x * TILE_Y + pixel // TILE_X
    x = tl.program_id(0) % tiles_x * TILE_X + pixel % TILE_X
    visible = (y < count) & (x < W)
    at = image * H * W + (top + y).to(tl.int64) * W + x
    y = tl.minimum(y, count - 1)
    x = tl.minimum(x, W - 1)
    taps, shares = _tile_taps(
        row_index_ptr, row_weight_ptr, column_index_ptr, column_weight_ptr, y, x, count, columns, W, TAPS_Y, TAPS_X
    )
    offsets = ()
    weights = ()
    for tap in tl.static_range(TAPS_Y * TAPS_X):
        offsets = offsets + (taps[tap] * padded_n,)  # noqa: RUF005 (Triton has no stars)
        share = shares[tap] * (1.0 if PROBABILITIES else -1.44269504)
        # NaN is inside no mask and wins nothing, as pixels beyond the result should.
        weights = weights + (tl.where(visible, share, float("nan")),)  # noqa: RUF005

    stage_ptr += image * cells * padded_n
    scores_ptr += image * N
    areas_ptr += image * N * 3
    kept = tl.load(kept_ptr + image)
    best = tl.full([PIXELS, BLOCK_N], -1.0, dtype=tl.float32)
    mark = tl.full([PIXELS, BLOCK_N], -1, dtype=tl.int32)  # twice the block, and one where the pixel is inside
    for block in range(tl.cdiv(kept, BLOCK_N)):
        n = block * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        score = tl.load(scores_ptr + n, mask=n < kept, other=float("-inf"))  # wins nothing
        z = tl.zeros([PIXELS, BLOCK_N], dtype=tl.float32)
        z = _interpolate(z, stage_ptr, n, offsets, weights, TAPS_Y * TAPS_X)
        if PROBABILITIES:
            inside = z >= threshold
            product = score[None, :] * z
        else:
            inside = z <= threshold * -1.44269504
            product = score[None, :] * _reciprocal(1.0 + _exp2(z))
        better = product > best
        best = tl.where(better, product, best)
        mark = tl.where(better, 2 * block + inside.to(tl.int32) if CLIP else 2 * block, mark)
        area = _column_counts(inside, PIXELS, BLOCK_N)
        tl.atomic_add(areas_ptr + n * 3 + 1, area, mask=(n < kept) & (area > 0), sem="relaxed")

    winning = tl.max(best, 1)[:, None]
    # Places rise with the block first, so the lowest of equals is the least of these.
    place = (mark >> 1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    place = tl.where((best == winning) & (mark >= 0), place, 1 << 30)
    lowest = tl.min(place, 1)  # [PIXELS]
    won = lowest < 1 << 30
    own = won
    if CLIP:
        own = won & (tl.max(tl.where(place == lowest[:, None], mark & 1, 0), 1) != 0)
    query = tl.load(order_ptr + image * N + lowest, mask=own, other=-1)
    tl.store(winner_ptr + at, query.to(tl.int32), mask=visible)

    # A tile has few winners: they are counted one after the other.
    least = tl.min(lowest, 0)
    while least < 1 << 30:
        of_place = lowest == least
        tl.atomic_add(areas_ptr + least * 3, tl.sum(of_place.to(tl.int32), 0), sem="relaxed")
        tl.atomic_add(areas_ptr + least * 3 + 2, tl.sum((of_place & own).to(tl.int32), 0), sem="relaxed")
        lowest = tl.where(of_place, 1 << 30, lowest)
        least = tl.min(lowest, 0)


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
    scores, mask_logits = scores.contiguous(), with_contiguous_planes(mask_logits)
    keep = scores > 0
    nan_logits = count_nans(mask_logits) * keep
    winner = torch.full((batch, height, width), -1, dtype=torch.int32, device=scores.device)
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
    geometry = grid, padded_size, valid_size, size, in_top, out_top, out_rows
    for band in staged_bands(mask_logits, order, None, resize_probabilities, True, *geometry, config.tile_rows):
        tiles_x = triton.cdiv(width, config.tile_columns)
        _panoptic_fwd_kernel[(triton.cdiv(band.count, config.tile_rows) * tiles_x, batch)](
            stage_ptr=band.stage,
            **band.taps.arguments(),
            scores_ptr=placed_scores,
            order_ptr=order,
            kept_ptr=kept,
            winner_ptr=winner,
            areas_ptr=areas,
            N=queries,
            blocks=band.padded_n // BLOCK_N,
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
    places = order.argsort(dim=-1)
    return winner, areas.gather(1, places[:, :, None].expand(-1, -1, 3)), nan_logits
