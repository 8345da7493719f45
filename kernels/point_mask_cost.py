"""The matching cost of every query against every target, at points that all queries and targets of an image share.

Points are sorted by the cell of the logits in which they lie, so that neighboring lanes read neighboring logits. The
first launch samples the targets, once for all layers; the second samples the logits; the third adds the splits of the
points in order. At B=16, L=10, N=100 and 12,544 points there are 200 M samples of four logits and two special functions
each, from planes that fit in the caches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask.kernels._common import (
    COMPILER_OPTIONS,
    _plane,
    check_positions,
    kernel,
    pick_config,
    plane_arguments,
    target_arguments,
    term_arguments,
)
from fastmask.kernels._costs import CostConfig, CostSums, _pair_sums, _store_sums, add_up
from fastmask.kernels._layout import with_contiguous_planes
from fastmask.kernels._points import _between, _four_pixels, _load_points, _pixel_share, _point_terms, _sample, _weigh

CONFIGS = {None: CostConfig(rows=16, block=32, target_block=16)}


@triton.jit
def _shares_at(target_ptr, valid_ptr, image, offset, on, targets, void_value, M, plane,
               HAS_SEGMENTS: tl.constexpr, HAS_VOID: tl.constexpr):  # fmt: skip
    """``_pixel_share`` of the pixel at ``offset`` of each point: belonging ``[C, M]`` and void ``[C, 1]``."""
    on = on[:, None]
    of_target = on
    pixels = target_ptr + image * plane + offset[:, None]
    valid = pixels
    if not HAS_SEGMENTS:
        of_target = on & (targets < M)[None, :]
        pixels = target_ptr + (image * M + targets)[None, :] * plane + offset[:, None]
        if HAS_VOID:
            valid = valid_ptr + image * plane + offset[:, None]
    return _pixel_share(pixels, valid, on, of_target, targets[None, :], void_value, HAS_SEGMENTS, HAS_VOID)


@kernel
def _point_mask_cost_targets_kernel(
    points_ptr, target_ptr, valid_ptr, void_value, shares_ptr, areas_ptr,
    B, M, P, H, W, points_per_split,
    HAS_SEGMENTS: tl.constexpr, HAS_VOID: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The share of each target at each point; ``_point_mask_cost_fwd_kernel`` reads them for every row.

    points  (B, P, 2)
    shares  (B, blocks of BLOCK_M - 1 targets, P, BLOCK_M); the last column is the point's weight
    areas   (splits, B, blocks, BLOCK_M), the sums of the shares
    """
    image = tl.program_id(0).to(tl.int64)
    blocks = tl.num_programs(1)
    image_block = image * blocks + tl.program_id(1)
    slots = tl.arange(0, BLOCK_M)  # [BLOCK_M]
    targets = tl.program_id(1) * (BLOCK_M - 1) + slots
    plane = tl.cast(H, tl.int64) * W
    area = tl.zeros([BLOCK_M], dtype=tl.float32)
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
        t = _between(ta, tb, tc, td, right[:, None], lower[:, None])
        void_share = _between(va, vb, vc, vd, right[:, None], lower[:, None])
        t, v = _weigh(t, void_share, inside[:, None], HAS_VOID)
        t = tl.where((slots < BLOCK_M - 1)[None, :], tl.where((targets < M)[None, :], t, 0.0), v)
        area += tl.sum(t, 0)
        share_ptrs = shares_ptr + (image_block * P + i)[:, None] * BLOCK_M + slots[None, :]
        tl.store(share_ptrs, t, mask=inside[:, None])
    split_image = tl.program_id(2).to(tl.int64) * B + image
    tl.store(areas_ptr + (split_image * blocks + tl.program_id(1)) * BLOCK_M + slots, area)


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
        shares  (B, blocks, P, BLOCK_M), see ``_point_mask_cost_targets_kernel``
        sums    (splits, 2, B, blocks, R, BLOCK_M)
    """
    alpha = tl.cast(alpha, tl.float32)
    gamma = tl.cast(gamma, tl.float32)
    image = (tl.program_id(0) // row_blocks).to(tl.int64)
    rows = (tl.program_id(0) % row_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    image_block = image * tl.num_programs(1) + tl.program_id(1)
    slots = tl.arange(0, BLOCK_M)  # [BLOCK_M]
    row_ptrs = _plane(logits_ptr, rows // N, image, rows % N, stride_l, stride_b, stride_n, UNIT)

    probability = tl.zeros([BLOCK_R, BLOCK_M], dtype=tl.float32)
    loss = tl.zeros([BLOCK_R, BLOCK_M], dtype=tl.float32)
    begin = tl.program_id(2) * points_per_split
    for block in range(begin, begin + points_per_split, BLOCK_C):
        i = block + tl.arange(0, BLOCK_C)  # [BLOCK_C]
        px, py = _load_points(points_ptr, image * P + i, i < P)
        share_ptrs = shares_ptr + (image_block * P + i) * BLOCK_M
        v = tl.load(share_ptrs + BLOCK_M - 1, mask=i < P, other=0.0)
        t = tl.load(share_ptrs[:, None] + slots[None, :], mask=(i < P)[:, None], other=0.0)  # [BLOCK_C, BLOCK_M]
        inside = (rows < R)[:, None] & (i < P)[None, :]
        x = _sample(row_ptrs[:, None], px[None, :], py[None, :], h, w, inside)  # [BLOCK_R, BLOCK_C]
        x = tl.where((v > 0.0)[None, :], x, 0.0)  # a logit at a void point may be NaN
        p, _, foreground, background, _, _ = _point_terms(x, alpha, gamma, FOCAL, SQUARE)
        probability += _pair_sums(p, t, WHOLE=False)
        loss += _pair_sums(foreground, t, WHOLE=False)
        loss += _pair_sums(background, v[:, None] - t, WHOLE=False)

    _store_sums(sums_ptr, probability, loss, image_block, rows, B, R, BLOCK_M)


def sorted_by_cell(points: Tensor, h: int, w: int) -> Tensor:
    """Sorts the points ``(B, P, 2)`` of each image by their cell in the h x w grid."""
    column, row = (points[..., 0] * w).long(), (points[..., 1] * h).long()
    order = (row * w + column).argsort(dim=-1, stable=True)
    return points.gather(1, order[..., None].expand_as(points))


def point_mask_cost(
    class_logits: Tensor, mask_logits: Tensor, labels: Tensor, masks: Tensor | None, segments: Tensor | None,
    valid: Tensor | None, void_value: int, ignore_void: bool, points: Tensor,
    cost_class: float, cost_mask: float, cost_dice: float, mask_term: str, alpha: float, gamma: float,
) -> Tensor:  # fmt: skip
    """``fastmask::point_mask_cost``, (L, B, N, M) float32; launches only, so it can be captured in a CUDA graph."""
    layers, batch, queries, h, w = mask_logits.shape
    num_targets, num_points = labels.shape[1], points.shape[1]
    cost = mask_logits.new_empty((layers, batch, queries, num_targets), dtype=torch.float32)
    if cost.numel() == 0:
        return cost
    config = pick_config(CONFIGS, mask_logits.device)
    targets = target_arguments(masks, segments, valid, void_value, ignore_void)
    check_positions(targets, h * w)
    points = sorted_by_cell(points, h, w)
    sums = CostSums.empty(cost, num_points, config)
    _, blocks, _ = sums.target_programs
    shares = cost.new_empty((batch, blocks, num_points, sums.block_targets))
    of_points = {
        "points_ptr": points,
        "shares_ptr": shares,
        "B": batch,
        "P": num_points,
        "points_per_split": sums.per_split,
        "BLOCK_M": sums.block_targets,
        **COMPILER_OPTIONS,
    }
    _point_mask_cost_targets_kernel[sums.target_programs](
        **of_points, **targets, areas_ptr=sums.areas, M=num_targets, BLOCK_C=config.target_block, num_warps=4
    )
    _point_mask_cost_fwd_kernel[sums.programs](
        **of_points,
        **plane_arguments(with_contiguous_planes(mask_logits)),
        sums_ptr=sums.sums,
        N=queries,
        R=layers * queries,
        h=h,
        w=w,
        row_blocks=sums.row_blocks,
        **term_arguments(mask_term, alpha, gamma),
        BLOCK_R=config.rows,
        BLOCK_C=config.block,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    add_up(sums, class_logits, labels, cost, cost_class, cost_mask, cost_dice)
    return cost
