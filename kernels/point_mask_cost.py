"""The matching cost of every query against every target, at points that all queries and targets of an image share.

Points are sorted by the cell of the logits in which they lie, so that neighboring lanes read neighboring logits. The
first launch samples the targets, once for all layers; the second samples the logits; the third adds the splits of the
points in order. At B=16, L=10, N=100 and 12,544 points there are 200 M samples of four logits and two or three special
functions each, from planes that fit in the caches. The machine code for sm_90 has 68 instructions per sample, 420 us at
128 lanes per clock; of them, 12 read the logits and 4 interpolate.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask.kernels._common import (
    COMPILER_OPTIONS,
    TargetSizes,
    Term,
    _counted,
    _plane,
    check_positions,
    pick_config,
    plane_sizes,
    target_planes,
    with_contiguous_rows,
)
from fastmask.kernels._costs import CostConfig, CostSums, CostWeights, _add_block, _store_sums, plan_reduction
from fastmask.kernels._launch import Launch, cached_plan, kernel
from fastmask.kernels._layout import with_contiguous_planes
from fastmask.kernels._points import _between, _four_pixels, _load_points, _weight

_CONFIG = CostConfig(rows=64, block=16, target_block=32, target_split=256, programs=2304, num_stages=1)
# 64 rows are what Hopper's tensor cores take; without those, they spill if there are many targets.
_FEWER_ROWS = replace(_CONFIG, rows=32)
CONFIGS = {8: _FEWER_ROWS, 12: _FEWER_ROWS, None: _CONFIG}


@triton.jit
def _shares_at(target_ptr, valid_ptr, image, offset, on, targets, void_value, M, plane,
               HAS_SEGMENTS: tl.constexpr, HAS_VOID: tl.constexpr):  # fmt: skip
    """The targets to which the pixel at ``offset`` of each point belongs ``[M, C]``, and whether it is void ``[C]``: 1
    or 0, and 0 for pixels that are not ``on`` the map."""
    at = image * plane + offset
    segment_ptrs = target_ptr + at
    valid_ptrs = segment_ptrs
    if HAS_VOID and not HAS_SEGMENTS:
        valid_ptrs = valid_ptr + at
    counted, segment = _counted(segment_ptrs, valid_ptrs, on, void_value, HAS_SEGMENTS, HAS_VOID)
    if HAS_SEGMENTS:
        belongs = counted[None, :] & (segment[None, :] == targets[:, None])
    else:
        mask_ptrs = target_ptr + (image * M + targets)[:, None] * plane + offset[None, :]
        belongs = tl.load(mask_ptrs, mask=counted[None, :] & (targets < M)[:, None], other=0) != 0
    return tl.where(belongs, 1.0, 0.0), tl.where(on & (counted == 0), 1.0, 0.0)


@kernel
def _point_mask_cost_targets_kernel(
    points_ptr, target_ptr, valid_ptr, void_value, shares_ptr, areas_ptr,
    B, M, P, H, W, points_per_split,
    HAS_SEGMENTS: tl.constexpr, HAS_VOID: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The share of each target at each point; ``_point_mask_cost_fwd_kernel`` reads them for every row.

    points  (B, P, 2)
    shares  (B, blocks of BLOCK_M - 1 targets, BLOCK_M, P); the last row is the points' weights
    areas   (splits, B, blocks, BLOCK_M), the sums of the shares
    """
    image = tl.program_id(0).to(tl.int64)
    blocks = tl.num_programs(1)
    image_block = image * blocks + tl.program_id(1)
    slots = tl.arange(0, BLOCK_M)  # [BLOCK_M]
    targets = tl.program_id(1) * (BLOCK_M - 1) + slots
    plane = tl.cast(H, tl.int64) * W
    area = tl.zeros([BLOCK_M, BLOCK_C], dtype=tl.float32)
    begin = tl.program_id(2) * points_per_split
    for block in range(begin, begin + points_per_split, BLOCK_C):
        i = block + tl.arange(0, BLOCK_C)  # [BLOCK_C]
        inside = i < P
        px, py = _load_points(points_ptr, image * P + i, inside)
        at, on_left, on_right, on_upper, on_lower, right, lower = _four_pixels(px, py, H, W, inside)
        ta, va = _shares_at(target_ptr, valid_ptr, image, at, on_upper & on_left, targets, void_value, M, plane,
                            HAS_SEGMENTS, HAS_VOID)  # fmt: skip
        tb, vb = _shares_at(target_ptr, valid_ptr, image, at + 1, on_upper & on_right, targets, void_value, M, plane,
                            HAS_SEGMENTS, HAS_VOID)  # fmt: skip
        tc, vc = _shares_at(target_ptr, valid_ptr, image, at + W, on_lower & on_left, targets, void_value, M, plane,
                            HAS_SEGMENTS, HAS_VOID)  # fmt: skip
        td, vd = _shares_at(target_ptr, valid_ptr, image, at + W + 1, on_lower & on_right, targets, void_value, M,
                            plane, HAS_SEGMENTS, HAS_VOID)  # fmt: skip
        t = _between(ta, tb, tc, td, right[None, :], lower[None, :])
        v = _weight(_between(va, vb, vc, vd, right, lower), inside, HAS_VOID)[None, :]  # [1, BLOCK_C]
        t = tl.where((slots < BLOCK_M - 1)[:, None], tl.where((targets < M)[:, None] & (v > 0.0), t, 0.0), v)
        area += t
        share_ptrs = shares_ptr + (image_block * BLOCK_M + slots)[:, None] * P + i[None, :]
        tl.store(share_ptrs, t, mask=inside[None, :])
    split_image = tl.program_id(2).to(tl.int64) * B + image
    tl.store(areas_ptr + (split_image * blocks + tl.program_id(1)) * BLOCK_M + slots, tl.sum(area, 1))


@triton.jit
def _sample_rows(row_ptrs, x, y, h, w, inside):
    """Bilinear samples ``[R, C]`` of the maps of R rows at C points, as ``_sample``. The four weights of a point are
    multiplied once for all rows."""
    at, on_left, on_right, on_upper, on_lower, right, lower = _four_pixels(x, y, h, w, inside)
    ptrs = row_ptrs[:, None] + at[None, :]
    a = tl.load(ptrs, mask=(on_upper & on_left)[None, :], other=0.0).to(tl.float32)
    b = tl.load(ptrs + 1, mask=(on_upper & on_right)[None, :], other=0.0).to(tl.float32)
    c = tl.load(ptrs + w, mask=(on_lower & on_left)[None, :], other=0.0).to(tl.float32)
    d = tl.load(ptrs + (w + 1), mask=(on_lower & on_right)[None, :], other=0.0).to(tl.float32)
    upper = tl.fma(b, ((1.0 - lower) * right)[None, :], a * ((1.0 - lower) * (1.0 - right))[None, :])
    return tl.fma(d, (lower * right)[None, :], tl.fma(c, (lower * (1.0 - right))[None, :], upper))


@kernel
def _point_mask_cost_fwd_kernel(
    logits_ptr, stride_l, stride_b, stride_n, points_ptr, shares_ptr, sums_ptr,
    B, N, R, P, h, w, points_per_split, row_blocks, alpha, gamma,
    FOCAL: tl.constexpr, SQUARE: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Sums over one split of the points i, for R = L * N rows of one image and a block of its targets m:

        sums[0] = sum_i p[i] T[i, m]
        sums[1] = sum_i F+[i] T[i, m] + F-[i] (v[i] - T[i, m])

    as in ``_mask_cost_fwd_kernel``, but T and v are shares (Mask2Former, arXiv:2112.01527, section 3.3). In the last
    column T is v, for sum_i v[i] p[i].

        logits  (L, B, N, h, w);  points  (B, P, 2)
        shares  (B, blocks, BLOCK_M, P), see ``_point_mask_cost_targets_kernel``
        sums    (splits, 2, B, blocks, R, BLOCK_M)
    """
    alpha = tl.cast(alpha, tl.float32)
    gamma = tl.cast(gamma, tl.float32)
    image = (tl.program_id(0) // row_blocks).to(tl.int64)
    rows = (tl.program_id(0) % row_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    image_block = image * tl.num_programs(1) + tl.program_id(1)
    slots = tl.arange(0, BLOCK_M)  # [BLOCK_M]
    # Rows that do not exist read the last one, which takes no predicates.
    read = tl.minimum(rows, R - 1)
    row_ptrs = _plane(logits_ptr, read // N, image, read % N, stride_l, stride_b, stride_n, UNIT)

    probability = tl.zeros([BLOCK_R, BLOCK_M], dtype=tl.float32)
    loss = tl.zeros([BLOCK_R, BLOCK_M], dtype=tl.float32)
    begin = tl.program_id(2) * points_per_split
    for block in range(begin, begin + points_per_split, BLOCK_C):
        i = block + tl.arange(0, BLOCK_C)  # [BLOCK_C]
        px, py = _load_points(points_ptr, image * P + i, i < P)
        share_ptrs = shares_ptr + (image_block * BLOCK_M + slots)[None, :] * P + i[:, None]
        t = tl.load(share_ptrs, mask=(i < P)[:, None], other=0.0)  # [BLOCK_C, BLOCK_M]
        v = tl.load(shares_ptr + (image_block * BLOCK_M + BLOCK_M - 1) * P + i, mask=i < P, other=0.0)
        # Logits at void points may be NaN, and are not read.
        x = _sample_rows(row_ptrs, px, py, h, w, v > 0.0)  # [BLOCK_R, BLOCK_C]
        not_t = v[:, None] - t
        probability, loss = _add_block(probability, loss, x, t, not_t, alpha, gamma, FOCAL, SQUARE, WHOLE=False)

    _store_sums(sums_ptr, probability, loss, image_block, rows, B, R, BLOCK_M)


def sorted_by_cell(points: Tensor, h: int, w: int) -> Tensor:
    """Sorts the points ``(B, P, 2)`` of each image by their cell in the h x w grid."""
    column, row = (points[..., 0] * w).int(), (points[..., 1] * h).int()
    order = (row * w + column).argsort(dim=-1, stable=True)
    return points.gather(1, order[..., None].expand_as(points))


class PointMaskCostPlan(NamedTuple):
    """The launches for some sizes, and the shapes of the memory between them."""

    sums: CostSums
    shares: tuple[int, ...]
    targets: Launch
    forward: Launch
    reduction: Launch


@cached_plan
def plan(
    device: torch.device, config: CostConfig, cost: tuple[int, ...], grid: tuple[int, int], strides: tuple[int, ...],
    points: int, classes: int, class_strides: tuple[int, ...], targets: TargetSizes, weights: CostWeights, term: Term,
) -> PointMaskCostPlan:  # fmt: skip
    layers, batch, queries, num_targets = cost
    h, w = grid
    check_positions(targets, h * w)
    sums = CostSums.of(cost, points, config)
    _, blocks, _ = sums.target_programs
    of_points = {"B": batch, "P": points, "BLOCK_M": sums.block_targets, **COMPILER_OPTIONS}
    return PointMaskCostPlan(
        sums,
        (batch, blocks, sums.block_targets, points),
        _point_mask_cost_targets_kernel.plan(
            sums.target_programs,
            **of_points,
            **targets._asdict(),
            M=num_targets,
            points_per_split=sums.per_target_split,
            BLOCK_C=config.target_block // (1 if sums.block_targets < 64 else 2),
            num_warps=4,
        ),
        _point_mask_cost_fwd_kernel.plan(
            sums.programs,
            **of_points,
            **plane_sizes(grid, strides),
            N=queries,
            R=layers * queries,
            h=h,
            w=w,
            points_per_split=sums.per_split,
            row_blocks=sums.row_blocks,
            **term.arguments(),
            BLOCK_R=config.rows,
            BLOCK_C=config.block,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        ),
        plan_reduction(sums, cost, classes, class_strides, weights),
    )


def point_mask_cost(
    class_logits: Tensor, mask_logits: Tensor, labels: Tensor, masks: Tensor | None, segments: Tensor | None,
    valid: Tensor | None, void_value: int, ignore_void: bool, points: Tensor,
    cost_class: float, cost_mask: float, cost_dice: float, mask_term: str, alpha: float, gamma: float,
) -> Tensor:  # fmt: skip
    """``fastmask::point_mask_cost``, (L, B, N, M) float32; launches only, so it can be captured in a CUDA graph."""
    *rows, h, w = mask_logits.shape
    device = mask_logits.device
    shape = (*rows, labels.shape[1])
    cost = torch.empty(shape, dtype=torch.float32, device=device)
    if 0 in shape:
        return cost
    mask_logits, class_logits = with_contiguous_planes(mask_logits), with_contiguous_rows(class_logits)
    target, counted, sizes = target_planes(masks, segments, valid, void_value, ignore_void)
    weights, term = CostWeights(cost_class, cost_mask, cost_dice), Term(mask_term, alpha, gamma)
    config = pick_config(CONFIGS, device)
    classes, class_strides = class_logits.shape[-1], class_logits.stride()
    steps = plan(
        device, config, shape, (h, w), mask_logits.stride(), points.shape[1], classes, class_strides, sizes, weights,
        term,
    )  # fmt: skip
    points = sorted_by_cell(points, h, w)
    shares = cost.new_empty(steps.shares)
    sums, areas = cost.new_empty(steps.sums.sums), cost.new_empty(steps.sums.areas)
    steps.targets(target_ptr=target, valid_ptr=counted, points_ptr=points, shares_ptr=shares, areas_ptr=areas)
    steps.forward(logits_ptr=mask_logits, points_ptr=points, shares_ptr=shares, sums_ptr=sums)
    steps.reduction(
        class_ptr=class_logits, labels_ptr=labels.contiguous(), sums_ptr=sums, areas_ptr=areas, cost_ptr=cost
    )
    return cost
