"""Semantic inference: the class of every pixel, without storing masks or scores; see ``_semantic_fwd_kernel``.

Precision: score[k] = sum_n P[n, k] s[n] is a tensor-core product of factors in 0..1. fp16 has three bits more than bf16
and is as fast; its range is short, so both factors are scaled to the top of it:

- P[n] is divided by its largest value and s[n] multiplied by it: s[n] then bounds what query n adds to any class;
- a pixel's s is multiplied by a power of two, computed from the logits that the pixel reads, so that the largest s[n]
  of the cells that it reads is in 1/4..1. The winning class scores at least the largest s[n] of the pixel, so what fp16
  loses below 2^-14 is small relative to the winner, even if all scores are small.

bfloat16 logits take one product, of factors with a rounding error of 2^-12; the PyTorch reference in bfloat16 rounds
factors, logits and result by 2^-9. float32 and float16 logits take three products, of the high and low parts of both
factors, without low * low: an error of 2^-22 in total, at half the cost of three tf32 products. The tensor cores add in
float32 and truncate, one or three times per 16 queries, by half a unit in the last place of the sum on average.

Order "scores" resamples a mixture of sigmoids. As that is linear in the sigmoids, these are staged, once for each
logit, and resampled; scores exist only for a program's tile.

If the result has 4 times as many rows as the logits, or 8 times, and so on, fours of its rows lie between the same two
rows of logits. A thread then interpolates these two at a column once, and between them for four pixels.

Time at B=8, N=100, K=150, 512 x 512 from 128 x 128, on 132 SMs at 1.98 GHz (210 M pairs of a pixel and a query, 237 M
with the padding of N to 112 and of rows to 516), for bfloat16 / float32 logits, calculated and not measured:

- special functions, an exponential and a reciprocal per pair: 113 us at 16 lanes per clock (100 us without padding);
- tensor cores, with K padded to 160: 75 GFLOP, 95 us / 285 us at 790 TFLOP/s;
- instructions of the machine code for sm_90, at 128 lanes per clock: 12.1 / 25 per pair in the loop, of which 3.3 are
  the interpolation, 85 / 177 us; and 832 / 1,184 per pixel around it, of which finding the best of 160 classes is two
  thirds, 52 / 75 us. The bottleneck for bfloat16 is issue slots, 138 us; for float32 the tensor cores;
- before that: staging, which also counts NaN logits (56 MB, 13 us), sorting queries and computing class tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask.kernels import _stage
from fastmask.kernels._best_class import _best_class
from fastmask.kernels._common import (
    COMPILER_OPTIONS,
    INTERPRETED,
    _exp2,
    _reciprocal,
    ceil_div,
    pick_config,
    power_of_two,
)
from fastmask.kernels._launch import Launch, cached_plan, kernel
from fastmask.kernels._layout import with_contiguous_planes
from fastmask.kernels._resample import (
    BLOCK_N,
    MIN_NORMAL,
    Resampling,
    _group_taps,
    _interpolate,
    _tile_taps,
)
from fastmask.kernels._stage import Bands, padded_queries, plan_bands, staged_bands
from fastmask.targets import label_dtype


@dataclass(frozen=True)
class SemanticConfig:
    """Tuning of the main kernel.

    Args:
        tile_rows, tile_columns: the size of the tile of pixels that a program owns; a multiple of 4 rows.
        classes: the most classes whose scores a program holds at a time; more take more passes over the queries.
        min_skipped: a tile checks whether the remaining queries matter only if they are at least so many blocks,
        negligible: and if they add at most so much to any class.
    """

    tile_rows: int
    tile_columns: int
    num_warps: int
    classes: int = 192
    min_skipped: int = 4
    negligible: float = 0.1


# By the number of fp16 parts of each factor; of one part, whether fours of rows share what they read, without details.
# The sums of 128 pixels in 4 warps leave registers for few taps, and none for details.
CONFIGS = {
    "one part, fours": {None: SemanticConfig(tile_rows=4, tile_columns=32, num_warps=4)},
    "one part": {None: SemanticConfig(tile_rows=8, tile_columns=16, num_warps=8)},
    "two parts": {None: SemanticConfig(tile_rows=4, tile_columns=16, num_warps=4)},
}


@triton.jit
def _to_half(x):
    """Converts float32 to fp16, opaquely to the compiler, which would otherwise convert the four staged values behind
    each x, rather than x, to the layout of a product's factor."""
    if INTERPRETED:
        result = x.to(tl.float16)
    else:
        result = tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=tl.float16, is_pure=False, pack=2
        )
    return result


@triton.jit
def _once(x):
    """x, opaquely to the compiler, which would otherwise compute it again in each layout that needs it."""
    if INTERPRETED:
        result = x
    else:
        result = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=False, pack=1)
    return result


@triton.jit
def _factors(z, weight, scale, unit, PROBABILITIES: tl.constexpr, PARTS: tl.constexpr):
    """The high and low parts of weight * sigmoid * 2^exponent, of interpolated probabilities or of -log2(e) x."""
    s = z * scale[:, None] if PROBABILITIES else _reciprocal(_exp2(z) + unit[:, None])
    s *= weight
    high = _to_half(s)
    low = high
    if PARTS == 2:
        low = _to_half(s - high.to(tl.float32))
    return high, low


@triton.jit
def _between(above, below, share, PARTS: tl.constexpr):
    """Interpolates two rows. Their difference is subtracted once for all rows between them, and rounded; where it is
    much larger than the result, that is more than float32 logits' products may lose."""
    if PARTS == 1:
        return tl.fma(below - above, share, above)
    return tl.fma(below, share, tl.fma(above, -share, above))


@triton.jit
def _stack(rows):
    """Four tensors ``[GROUPS, BLOCK_N]``, one after another."""
    x = tl.join(tl.join(rows[0], rows[2]), tl.join(rows[1], rows[3]))  # [GROUPS, BLOCK_N, 2, 2]
    return tl.reshape(tl.permute(x, (2, 3, 0, 1)), [4 * x.shape[0], x.shape[1]])


@triton.jit
def _of_pixels(x, ALIKE: tl.constexpr):
    """``[GROUPS]`` as ``[PIXELS]``."""
    return tl.reshape(tl.broadcast_to(x[None, :], [ALIKE, x.shape[0]]), [ALIKE * x.shape[0]])


@triton.jit
def _placed_rows(probabilities_ptr, order_ptr, n, classes, held, N, K):
    """The probabilities ``[BLOCK_N, BLOCK_K]`` of the queries at places ``n``."""
    query = tl.load(order_ptr + n, mask=n < N, other=0)
    p_ptrs = probabilities_ptr + query[:, None] * K + classes[None, :]
    return tl.load(p_ptrs, mask=(n < N)[:, None] & held[None, :], other=0.0)


@kernel
def _semantic_classes_kernel(
    probabilities_ptr, order_ptr, largest_ptr, weight_ptr, high_ptr, low_ptr, stop_ptr, rest_ptr,
    N, K, blocks, min_skipped, negligible,
    SKIP: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Class probabilities in the order of the stage, each query's divided by its largest, as factors of products.

    probabilities  (B, N, K);  order (B, N), by decreasing largest (B, N)
    weight         (B, blocks * BLOCK_N), a copy of largest, 0 where there is no query
    high, low      (B, class blocks, blocks * BLOCK_N, WIDTH) fp16; their sum is the quotient to 22 bits
    stop           (B), after how many blocks of queries to check whether the rest matters; all blocks means never
    rest           (B), the most that the rest adds to any class

    There is a program for each block of queries, and a last one for stop and rest.
    """
    image = tl.program_id(0).to(tl.int64)
    class_block = tl.program_id(1)
    block = tl.program_id(2)
    negligible = tl.cast(negligible, tl.float32)
    k = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    classes = class_block * WIDTH + k
    held = (k < WIDTH) & (classes < K)
    probabilities_ptr += image * N * K
    order_ptr += image * N
    if block < blocks:
        n = block * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        largest = tl.load(largest_ptr + image * N + n, mask=n < N, other=0.0)
        p = _placed_rows(probabilities_ptr, order_ptr, n, classes, held, N, K)
        share = tl.where((largest > 0.0)[:, None], tl.div_rn(p, tl.maximum(largest, MIN_NORMAL)[:, None]), 0.0)
        high = share.to(tl.float16)
        at = ((image * tl.num_programs(1) + class_block) * blocks * BLOCK_N + n)[:, None] * WIDTH + k[None, :]
        tl.store(high_ptr + at, high, mask=(k < WIDTH)[None, :])
        if PARTS == 2:
            tl.store(low_ptr + at, (share - high.to(tl.float32)).to(tl.float16), mask=(k < WIDTH)[None, :])
        if class_block == 0:
            tl.store(weight_ptr + image * blocks * BLOCK_N + n, largest)
    else:
        stop = blocks
        rest = 0.0
        if SKIP:
            suffix = tl.zeros([BLOCK_K], dtype=tl.float32)
            for done in range(1, blocks):
                n = (blocks - done) * BLOCK_N + tl.arange(0, BLOCK_N)
                suffix += tl.sum(_placed_rows(probabilities_ptr, order_ptr, n, classes, held, N, K), 0)
                bound = tl.max(suffix, 0)
                small = (done >= min_skipped) & (bound <= negligible)
                stop = tl.where(small, blocks - done, stop)
                rest = tl.where(small, bound * (1.0 + 2.0**-9), rest)  # the factors are rounded
        if class_block == 0:
            tl.store(stop_ptr + image, stop)
            tl.store(rest_ptr + image, rest)


@kernel
def _semantic_fwd_kernel(
    stage_ptr, peak_ptr, row_index_ptr, row_weight_ptr, column_index_ptr, column_weight_ptr,
    weight_ptr, high_ptr, low_ptr, stop_ptr, rest_ptr, result_ptr, score_ptr, margin_ptr,
    K, blocks, cells, columns, top, count, lead, H, W, tiles_x, slack,
    TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr, ALIKE: tl.constexpr, PROBABILITIES: tl.constexpr, PARTS: tl.constexpr,
    SCORES: tl.constexpr, DETAILS: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr,
    CLASS_BLOCKS: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """score[k] = sum_n P[n, k] sigmoid(x[n]) for one tile of pixels, label = the lowest argmax_k score[k] (MaskFormer,
    arXiv:2107.06278, section 3.4). Interpolates x or, with PROBABILITIES, sigmoid(x) from the stage.

        stage           (B, cells, blocks * BLOCK_N), peak (B, cells); see ``_stage_kernel``
        row_index, ...  the taps of the ``count`` rows of a band and of all W columns; see ``_taps_kernel``
        weight, high, low, stop, rest  see ``_semantic_classes_kernel``
        result          (B, H, W) labels or (B, K, H, W) scores; the band's rows are those from ``top`` on
        score, margin   (B, H, W) float32, the winner's score and its lead over the next class

    Classes are split into two blocks, as neither 150 nor 133 is near a power of two. Queries are in order of decreasing
    probability of their most likely class. After ``stop`` blocks of them, the rest cannot change a label if the winner
    leads by more than ``rest`` and rounding. If it does so at every pixel of the tile, the program stops; otherwise it
    adds the rest. Labels are the same as with all queries.
    """
    slack = tl.cast(slack, tl.float32)
    image = tl.program_id(1).to(tl.int64)
    PIXELS: tl.constexpr = TILE_Y * TILE_X
    WIDTH: tl.constexpr = BLOCK_A + BLOCK_B
    padded_n = blocks * BLOCK_N
    if ALIKE == 1:
        inside, at, cells_of_taps, weights = _tile_taps(
            row_index_ptr, row_weight_ptr, column_index_ptr, column_weight_ptr, columns, top, count, H, W, tiles_x,
            TAPS_Y, TAPS_X, TILE_Y, TILE_X,
        )  # fmt: skip
    else:
        inside, at, upper, lower, weights, shares = _group_taps(
            row_index_ptr, row_weight_ptr, column_index_ptr, column_weight_ptr, columns, top, count, lead, H, W,
            tiles_x, TAPS_X, TILE_Y, TILE_X,
        )  # fmt: skip
        cells_of_taps = upper + lower
    offsets = ()
    factors = ()
    peak = tl.full([PIXELS // ALIKE], float("-inf"), dtype=tl.float32)
    for tap in tl.static_range(TAPS_Y * TAPS_X):
        offsets = offsets + (cells_of_taps[tap] * padded_n,)  # noqa: RUF005 (Triton has no stars)
        peak = tl.maximum(peak, tl.load(peak_ptr + image * cells + cells_of_taps[tap]))
    for tap in tl.static_range(TAPS_Y * TAPS_X if ALIKE == 1 else TAPS_X):
        factors = factors + (weights[tap] * (1.0 if PROBABILITIES else -1.44269504),)  # noqa: RUF005
    peak = _once(peak)
    # weight * sigmoid(x) * 2^exponent is at most one, for every query.
    exponent = tl.minimum(-tl.ceil(peak), 100.0)
    unit = _exp2(-exponent)
    scale = _exp2(exponent)
    bias = exponent * 0.0 if PROBABILITIES else -exponent
    if ALIKE == 1:
        pixel_unit, pixel_scale = unit, scale
    else:
        pixel_unit, pixel_scale = _of_pixels(unit, ALIKE), _of_pixels(scale, ALIKE)

    a = tl.arange(0, BLOCK_A)  # [BLOCK_A]
    b = BLOCK_A + tl.arange(0, BLOCK_B if BLOCK_B else 1)  # [BLOCK_B]
    stage_ptr += image * cells * padded_n
    weight_ptr += image * padded_n
    stop = tl.maximum(tl.load(stop_ptr + image), 1)  # at least 1, which the compiler does not know: it would zero twice
    best = tl.full([PIXELS], -1.0, dtype=tl.float32)
    second = tl.full([PIXELS], 0.0, dtype=tl.float32)
    label = tl.zeros([PIXELS], dtype=tl.int32)
    for class_block in range(CLASS_BLOCKS):
        table = (image * CLASS_BLOCKS + class_block) * padded_n * WIDTH
        scores_a = tl.zeros([PIXELS, BLOCK_A], dtype=tl.float32)
        scores_b = tl.zeros([PIXELS, BLOCK_B if BLOCK_B else 1], dtype=tl.float32)
        end = stop
        block = 0
        while block < end:
            n = block * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
            # Loaded early, so that the values arrive while the masks are computed.
            table_row = (n * WIDTH)[:, None]
            high_a = tl.load(high_ptr + table + (table_row + a[None, :]))  # [BLOCK_N, BLOCK_A]
            if BLOCK_B:
                high_b = tl.load(high_ptr + table + (table_row + b[None, :]))  # [BLOCK_N, BLOCK_B]
            if PARTS == 2:
                low_a = tl.load(low_ptr + table + (table_row + a[None, :]))
                if BLOCK_B:
                    low_b = tl.load(low_ptr + table + (table_row + b[None, :]))
            weight = tl.load(weight_ptr + n)[None, :]

            block_ptr = stage_ptr + block * BLOCK_N
            start = tl.broadcast_to(bias[:, None], [PIXELS // ALIKE, BLOCK_N])
            if ALIKE == 1:
                z = _interpolate(start, block_ptr, offsets, factors, TAPS_Y * TAPS_X)
                high, low = _factors(z, weight, scale, unit, PROBABILITIES, PARTS)
            else:
                above = _interpolate(start, block_ptr, offsets[:TAPS_X], factors, TAPS_X)
                below = _interpolate(start, block_ptr, offsets[TAPS_X:], factors, TAPS_X)
                high_rows = ()
                low_rows = ()
                for row in tl.static_range(4):
                    z = _between(above, below, shares[row][:, None], PARTS)
                    high, low = _factors(z, weight, scale, unit, PROBABILITIES, PARTS)
                    high_rows = high_rows + (high,)  # noqa: RUF005
                    low_rows = low_rows + (low,)  # noqa: RUF005
                high = _stack(high_rows)
                if PARTS == 2:
                    low = _stack(low_rows)
            if PARTS == 2:
                scores_a = tl.dot(low, high_a, scores_a)
                scores_a = tl.dot(high, low_a, scores_a)
                if BLOCK_B:
                    scores_b = tl.dot(low, high_b, scores_b)
                    scores_b = tl.dot(high, low_b, scores_b)
            scores_a = tl.dot(high, high_a, scores_a)
            if BLOCK_B:
                scores_b = tl.dot(high, high_b, scores_b)

            block += 1
            if (block == stop) & (stop < blocks):
                winner = tl.max(scores_a, 1)
                if BLOCK_B:
                    winner = tl.maximum(winner, tl.max(scores_b, 1))
                margin = tl.load(rest_ptr + image) * pixel_scale + winner * slack + padded_n * 2.0**-24
                near = winner - margin
                rivals = tl.sum((scores_a >= near[:, None]).to(tl.int32), 1)
                if BLOCK_B:
                    rivals += tl.sum((scores_b >= near[:, None]).to(tl.int32), 1)
                # Reduced over two axes, one of length one, so that the compiler may choose another layout: on sm_100,
                # Triton up to 3.7 fails to reduce along axis 0 in a layout that comes from tensor memory.
                if tl.max(rivals[:, None]) > 1:
                    end = blocks

        first = class_block * WIDTH
        if SCORES:
            score_ptrs = result_ptr + (image * K * H * W + (at - image * H * W))[:, None]
            plane = tl.cast(H, tl.int64) * W
            tl.store(
                score_ptrs + (first + a)[None, :] * plane, scores_a * pixel_unit[:, None],
                mask=inside[:, None] & (first + a < K)[None, :],
            )  # fmt: skip
            if BLOCK_B:
                tl.store(
                    score_ptrs + (first + b)[None, :] * plane, scores_b * pixel_unit[:, None],
                    mask=inside[:, None] & (first + b < K)[None, :],
                )  # fmt: skip
        else:
            winner, winning = _best_class(scores_a, scores_b, BLOCK_A, BLOCK_B)
            if DETAILS:
                runner_up = tl.max(tl.where(a[None, :] == winning[:, None], 0.0, scores_a), 1)
                if BLOCK_B:
                    runner_up = tl.maximum(
                        runner_up, tl.max(tl.where(b[None, :] == winning[:, None], 0.0, scores_b), 1)
                    )
                second = tl.maximum(tl.maximum(second, runner_up), tl.minimum(best, winner))
            label = tl.where(winner > best, first + winning, label)
            best = tl.maximum(best, winner)
    if not SCORES:
        tl.store(result_ptr + at, label.to(result_ptr.dtype.element_ty), mask=inside)
        if DETAILS:
            tl.store(score_ptr + at, best * pixel_unit, mask=inside)
            tl.store(margin_ptr + at, (best - second) * pixel_unit, mask=inside)


def class_blocks(count: int, most: int) -> tuple[int, int, int]:
    """The number of blocks of classes, and the two widths into which a block is split: powers of two, at least 16; the
    second may be 0."""
    blocks = ceil_div(count, most)
    size = ceil_div(count, blocks)
    large = power_of_two(size, 16, 1 << 30)
    if size <= large - large // 4 and large >= 64:
        return blocks, large // 2, power_of_two(size - large // 2, 16, large // 2)
    return blocks, large, 0


class SemanticSizes(NamedTuple):
    """The sizes and options of a call: probabilities (B, N, K) and mask logits of these strides and dtype."""

    device: torch.device
    classes: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    probabilities: bool
    scores: bool
    details: bool
    skip: bool
    resampling: Resampling


class SemanticPlan(NamedTuple):
    """The launches for some sizes: of the class tables, whose factors have the shape ``high`` in ``parts``; of the
    stages; and for each band that of the result."""

    classes: Launch
    high: tuple[int, ...]
    parts: int
    bands: Bands
    forward: tuple[Launch, ...]


@cached_plan
def plan(config: SemanticConfig, sizes: SemanticSizes, stage_bytes: int) -> SemanticPlan:
    batch, queries = sizes.shape[:2]
    padded_n = padded_queries(queries)
    parts = 1 if sizes.dtype == torch.bfloat16 else 2
    count, block_a, block_b = class_blocks(sizes.classes, config.classes)
    width = block_a + block_b
    classes = _semantic_classes_kernel.plan(
        (batch, count, padded_n // BLOCK_N.value + 1),
        N=queries,
        K=sizes.classes,
        blocks=padded_n // BLOCK_N.value,
        min_skipped=config.min_skipped,
        negligible=config.negligible,
        SKIP=sizes.skip and not (sizes.scores or sizes.details) and count == 1,
        PARTS=parts,
        WIDTH=width,
        BLOCK_K=power_of_two(width, 16, 1 << 30),
        num_warps=4,
        **COMPILER_OPTIONS,
    )
    bands = plan_bands(
        sizes.device, stage_bytes, sizes.shape, sizes.strides, sizes.dtype, sizes.probabilities, False, True, True,
        sizes.resampling, config.tile_rows,
    )  # fmt: skip
    forward = []
    for band in bands.bands:
        size = sizes.resampling.out_rows, sizes.resampling.size[1]
        programs, tiles = band.reader(batch, size, config.tile_rows, config.tile_columns, band.lead)
        forward.append(
            _semantic_fwd_kernel.plan(
                programs,
                **tiles,
                lead=band.lead,
                ALIKE=band.alike,
                K=sizes.classes,
                slack=tiles["blocks"] * 3 * 2.0**-21,  # bounds the rounding error of the sums of three products
                PROBABILITIES=sizes.probabilities,
                PARTS=parts,
                SCORES=sizes.scores,
                DETAILS=sizes.details,
                CLASS_BLOCKS=count,
                BLOCK_A=block_a,
                BLOCK_B=block_b,
                num_warps=config.num_warps,
            )
        )
    return SemanticPlan(classes, (batch, count, padded_n, width), parts, bands, tuple(forward))


def class_tables(steps: SemanticPlan, probabilities: Tensor) -> tuple[Tensor, dict[str, Tensor | None]]:
    """The order of the queries, and the class probabilities in the form that the main kernel reads, by the names of its
    arguments; see ``_semantic_classes_kernel``."""
    probabilities, device = probabilities.contiguous(), probabilities.device
    batch, _, padded_n, _ = steps.high
    largest, order = probabilities.amax(-1).sort(dim=-1, descending=True, stable=True)
    tables = {
        "weight_ptr": torch.empty((batch, padded_n), dtype=torch.float32, device=device),
        "high_ptr": torch.empty(steps.high, dtype=torch.float16, device=device),
        "low_ptr": torch.empty(steps.high, dtype=torch.float16, device=device) if steps.parts == 2 else None,
        "stop_ptr": torch.empty(batch, dtype=torch.int32, device=device),
        "rest_ptr": torch.empty(batch, dtype=torch.float32, device=device),
    }
    steps.classes(probabilities_ptr=probabilities, order_ptr=order, largest_ptr=largest, **tables)
    return order, tables


def semantic_inference(
    probabilities: Tensor,
    mask_logits: Tensor,
    order: str,
    output: str,
    details: bool,
    *geometry: Any,
    skip: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``fastmask::semantic_inference``: labels (B, out_rows, W) or scores (B, K, out_rows, W); the winning score and
    its margin, (B, out_rows, W) or empty; and the number of NaN logits of each query, (B, N).

    Args:
        geometry: see ``Resampling``.
        skip: check whether the least probable queries matter before computing them; the result is the same.
    """
    batch, queries, classes = probabilities.shape
    resampling = Resampling.of(*geometry)
    fours = resampling.alike(order == "scores") == 4 and not details
    kind = "two parts" if mask_logits.dtype != torch.bfloat16 else "one part, fours" if fours else "one part"
    config = pick_config(CONFIGS[kind], mask_logits.device)
    scores = output == "scores"
    shape = (batch, resampling.out_rows, resampling.size[1])
    if scores:
        result = probabilities.new_empty((batch, classes, *shape[1:]))
    else:
        result = probabilities.new_empty(shape, dtype=label_dtype(classes))
    score = probabilities.new_empty(shape if details else 0)
    margin = torch.empty_like(score)
    mask_logits = with_contiguous_planes(mask_logits)
    nan_logits = torch.zeros((batch, queries), dtype=torch.int32, device=mask_logits.device)
    if queries == 0 or batch == 0:
        return result.zero_(), score.zero_(), margin.zero_(), nan_logits
    sizes = SemanticSizes(
        mask_logits.device, classes, mask_logits.shape, mask_logits.stride(), mask_logits.dtype, order == "scores",
        scores, details, skip, resampling,
    )  # fmt: skip
    steps = plan(config, sizes, _stage.STAGE_BYTES)
    query_order, tables = class_tables(steps, probabilities)
    bands = staged_bands(steps.bands, mask_logits, query_order, tables["weight_ptr"], nan_logits)
    for launch, staged in zip(steps.forward, bands, strict=True):
        launch(
            **staged,
            **tables,
            result_ptr=result,
            score_ptr=score if details else None,
            margin_ptr=margin if details else None,
        )
    return result, score, margin, nan_logits
