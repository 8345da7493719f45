"""Panoptic inference: the query that wins each pixel, and the areas of all queries, in one launch per batch.

Kept queries are staged first, in order, so that the loop over queries ends after the last of them. A thread holds
several pixels and several columns of queries, and the best query so far of each column; columns are compared once, at
the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask.kernels import _stage
from fastmask.kernels._common import COMPILER_OPTIONS, _exp2, _reciprocal, pick_config
from fastmask.kernels._launch import Launch, cached_plan, kernel
from fastmask.kernels._layout import with_contiguous_planes
from fastmask.kernels._resample import BLOCK_N, Resampling, _interpolate, _tile_taps
from fastmask.kernels._stage import Bands, count_nans, plan_bands, staged_bands


@dataclass(frozen=True)
class PanopticConfig:
    """Tuning: the size of the tile of pixels that a program owns."""

    tile_rows: int = 8
    tile_columns: int = 16
    num_warps: int = 4


CONFIGS = {None: PanopticConfig()}
QUERIES_AT_ONCE = 256  # of a program that orders them, which is compiled once for any number


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
def _panoptic_order_kernel(
    scores_ptr, count_ptr, order_ptr, placed_scores_ptr, kept_ptr, N, BLOCK: tl.constexpr
):  # fmt: skip
    """Places the kept queries of an image, those with a positive score, before the others, in order.

    scores  (B, N), count (B, N), of which those of other queries become 0
    order   (B, N), placed_scores (B, N), query and score at each place;  kept (B), how many are kept
    """
    first = tl.program_id(0).to(tl.int64) * N
    kept = 0
    for begin in range(0, N, BLOCK):
        n = begin + tl.arange(0, BLOCK)  # [BLOCK]
        kept += tl.sum((tl.load(scores_ptr + first + n, mask=n < N, other=0.0) > 0).to(tl.int32), 0)
    tl.store(kept_ptr + tl.program_id(0), kept)
    kept_before = 0
    for begin in range(0, N, BLOCK):
        n = begin + tl.arange(0, BLOCK)
        score = tl.load(scores_ptr + first + n, mask=n < N, other=0.0)
        keep = (score > 0).to(tl.int32)
        rank = kept_before + tl.cumsum(keep, 0) - keep
        place = first + tl.where(keep != 0, rank, kept + n - rank)
        tl.store(order_ptr + place, n.to(tl.int64), mask=n < N)
        tl.store(placed_scores_ptr + place, score, mask=n < N)
        tl.store(count_ptr + first + n, tl.zeros([BLOCK], dtype=tl.int32), mask=(n < N) & (keep == 0))
        kept_before += tl.sum(keep, 0)


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
        areas   (B, N, 3), by query; adds the pixels won, inside, and where ``winner`` is the query

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
    order_ptr += image * N
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
        some = (n < kept) & (area > 0)
        tl.atomic_add(areas_ptr + tl.load(order_ptr + n, mask=some, other=0) * 3 + 1, area, mask=some, sem="relaxed")

    winning = tl.max(best, 1)[:, None]
    # Later blocks hold higher places, so the minimum over the columns is the lowest place among equals.
    place = (mark >> 1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    place = tl.where((best == winning) & (mark >= 0), place, 1 << 30)
    lowest = tl.min(place, 1)  # [PIXELS]
    won = lowest < 1 << 30
    own = won
    if CLIP:
        own = won & (tl.max(tl.where(place == lowest[:, None], mark & 1, 0), 1) != 0)
    query = tl.load(order_ptr + lowest, mask=own, other=-1)
    tl.store(winner_ptr + at, query.to(tl.int32), mask=visible)

    # A tile has few winners, so they are counted one at a time.
    least = tl.min(lowest, 0)
    while least < 1 << 30:
        of_place = lowest == least
        area_ptr = areas_ptr + tl.load(order_ptr + least) * 3
        tl.atomic_add(area_ptr, tl.sum(of_place.to(tl.int32), 0), sem="relaxed")
        tl.atomic_add(area_ptr + 2, tl.sum((of_place & own).to(tl.int32), 0), sem="relaxed")
        lowest = tl.where(of_place, 1 << 30, lowest)
        least = tl.min(lowest, 0)


class PanopticSizes(NamedTuple):
    """The sizes and options of a call, of mask logits of this shape, strides and dtype."""

    device: torch.device
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    probabilities: bool
    clip_to_mask: bool
    mask_threshold: float
    resampling: Resampling


class PanopticPlan(NamedTuple):
    """The launches for some sizes: of the order, of the stages, and for each band that of the result."""

    order: Launch
    bands: Bands
    forward: tuple[Launch, ...]


@cached_plan
def plan(config: PanopticConfig, sizes: PanopticSizes, stage_bytes: int) -> PanopticPlan:
    batch, queries = sizes.shape[:2]
    bands = plan_bands(
        sizes.device, stage_bytes, sizes.shape, sizes.strides, sizes.dtype, sizes.probabilities, True, False, False,
        sizes.resampling, config.tile_rows,
    )  # fmt: skip
    threshold = sizes.mask_threshold
    if not sizes.probabilities:
        threshold = -math.log(1 / threshold - 1) if 0 < threshold < 1 else math.inf * (threshold - 0.5)
    size = sizes.resampling.out_rows, sizes.resampling.size[1]
    forward = []
    for band in bands.bands:
        programs, tiles = band.reader(batch, size, config.tile_rows, config.tile_columns)
        forward.append(
            _panoptic_fwd_kernel.plan(
                programs,
                **tiles,
                N=queries,
                threshold=threshold,
                PROBABILITIES=sizes.probabilities,
                CLIP=sizes.clip_to_mask,
                num_warps=config.num_warps,
            )
        )
    order = _panoptic_order_kernel.plan((batch,), N=queries, BLOCK=QUERIES_AT_ONCE, num_warps=1, **COMPILER_OPTIONS)
    return PanopticPlan(order, bands, tuple(forward))


def panoptic_winners(
    scores: Tensor, mask_logits: Tensor, resize_probabilities: bool, clip_to_mask: bool, mask_threshold: float,
    *geometry: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``fastmask::panoptic_winners``: the winner of each pixel (B, out_rows, W), areas (B, N, 3), and the number of NaN
    logits of each kept query (B, N). ``geometry``: see ``Resampling``."""
    batch, queries = scores.shape
    resampling = Resampling.of(*geometry)
    scores, mask_logits = scores.contiguous(), with_contiguous_planes(mask_logits)
    nan_logits = count_nans(mask_logits)
    shape = (batch, resampling.out_rows, resampling.size[1])
    winner = torch.empty(shape, dtype=torch.int32, device=scores.device)
    areas = torch.zeros((batch, queries, 3), dtype=torch.int32, device=scores.device)
    if batch == 0 or queries == 0:
        return winner.fill_(-1), areas, nan_logits
    config = pick_config(CONFIGS, mask_logits.device)
    sizes = PanopticSizes(
        mask_logits.device, mask_logits.shape, mask_logits.stride(), mask_logits.dtype, resize_probabilities,
        clip_to_mask, mask_threshold, resampling,
    )  # fmt: skip
    steps = plan(config, sizes, _stage.STAGE_BYTES)
    order = torch.empty(scores.shape, dtype=torch.int64, device=scores.device)
    placed_scores = torch.empty_like(scores)
    kept = torch.empty(batch, dtype=torch.int32, device=scores.device)
    steps.order(
        scores_ptr=scores, count_ptr=nan_logits, order_ptr=order, placed_scores_ptr=placed_scores, kept_ptr=kept
    )
    for launch, staged in zip(steps.forward, staged_bands(steps.bands, mask_logits, order), strict=True):
        launch(**staged, scores_ptr=placed_scores, order_ptr=order, kept_ptr=kept, winner_ptr=winner, areas_ptr=areas)
    return winner, areas, nan_logits
