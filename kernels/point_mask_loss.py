"""The mask and dice losses of the matched pairs at each pair's points, forward and backward.

Each point reads four logits and four pixels of the targets, scattered in memory; at B=16, L=10, M=20 with 12,544 points
per pair there are 40 M points. From a segment map, four values suffice for target and void.

Backward adds every point's gradient to four logits, and points are unordered. Floating-point atomics would add in a
different order each time. Instead each pair's gradients are added as 64-bit integers, in units of 2^-40 of a bound
on the gradients of all its points, which is exact in any order; a last launch converts them to the logits' dtype. They
take 8 bytes per pair and logit: 419 MB at these sizes with 128 x 128 logits, whose gradient takes 524 MB.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask.kernels._common import (
    COMPILER_OPTIONS,
    _plane,
    ceil_div,
    check_positions,
    pick_config,
    plane_sizes,
    power_of_two,
)
from fastmask.kernels._launch import Launch, cached_plan, kernel
from fastmask.kernels._layout import with_contiguous_planes
from fastmask.kernels._pairs import (
    PairSizes,
    _matched_query,
    _next_target,
    _store_part,
    _targets_of_query,
    add_parts,
    gradient_of_pairs,
    pairs_of,
    plan_reduction,
)
from fastmask.kernels._points import _four_pixels, _load_points, _point_terms, _sample, _target_at

MAX_POINTS = 1 << 22  # per pair, so that sums in units of 2^-40 of the bound are less than 2^63


@dataclass(frozen=True)
class PointMaskLossConfig:
    """Tuning of forward and backward.

    Args:
        points: points that a program reads at a time.
        points_per_split: points that a forward program sums; a multiple of ``points``.
        cells: logits that a program of backward's last kernel writes.
    """

    points: int = 256
    points_per_split: int = 2048
    cells: int = 1024
    num_warps: int = 4


CONFIGS = {None: PointMaskLossConfig()}


@kernel
def _point_mask_loss_fwd_kernel(
    logits_ptr, stride_l, stride_b, stride_n, assignment_ptr, labels_ptr, points_ptr,
    target_ptr, valid_ptr, void_value, sums_ptr,
    B, N, M, P, h, w, H, W, points_per_split, alpha, gamma,
    FOCAL: tl.constexpr, SQUARE: tl.constexpr, HAS_SEGMENTS: tl.constexpr, HAS_VOID: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Sums over some points of one pair, in parts that ``_mask_loss_reduce_kernel`` adds: the loss t F+ + (v - t) F-,
    p t, v p, t and v (Mask2Former, arXiv:2112.01527, section 3.3).

        logits      (L, B, N, h, w)
        assignment  (L, B, M), labels (B, M), points (L, B, M, P, 2)
        target      (B, H, W) segments or (B, M, H, W) masks;  valid  (B, H, W)
        sums        (L * B * M, parts, 5); not written for targets without a query
    """
    alpha = tl.cast(alpha, tl.float32)
    gamma = tl.cast(gamma, tl.float32)
    pair = tl.program_id(0).to(tl.int64)
    image, target, query, matched = _matched_query(assignment_ptr, labels_ptr, pair, B, N, M)
    if matched:
        plane_ptr = _plane(logits_ptr, pair // M // B, image, query, stride_l, stride_b, stride_n, UNIT)
        zero = tl.zeros([BLOCK_P], dtype=tl.float32)
        losses, intersections, predictions, target_shares, weights = zero, zero, zero, zero, zero
        begin = tl.program_id(1) * points_per_split
        for block in range(begin, begin + points_per_split, BLOCK_P):
            i = block + tl.arange(0, BLOCK_P)  # [BLOCK_P]
            inside = i < P
            px, py = _load_points(points_ptr, pair * P + i, inside)
            t, v = _target_at(
                px, py, inside, image, target, target_ptr, valid_ptr, void_value, M, H, W, HAS_SEGMENTS, HAS_VOID
            )
            x = _sample(plane_ptr, px, py, h, w, inside)
            x = tl.where(v > 0.0, x, 0.0)  # a logit at a void point may be NaN
            p, _, foreground, background, _, _ = _point_terms(x, alpha, gamma, FOCAL, SQUARE)
            losses += tl.fma(t, foreground, (v - t) * background)
            intersections += p * t
            predictions += p * v
            target_shares += t
            weights += v
        part_ptr = sums_ptr + (pair * tl.num_programs(1) + tl.program_id(1)) * 5
        loss, intersection, prediction = tl.sum(losses, 0), tl.sum(intersections, 0), tl.sum(predictions, 0)
        _store_part(part_ptr, loss, intersection, prediction, tl.sum(target_shares, 0), tl.sum(weights, 0))


@triton.jit
def _pair_slopes(pair, sums_ptr, grad_mask_ptr, grad_dice_ptr, gamma, FOCAL: tl.constexpr):
    """The factors of a point's gradient, and a bound on it. With U = sum v p + sum t + 1 and I = 2 sum p t + 1:
    d mask / dx = mask_slope (t dF+/dx + (v - t) dF-/dx) and d dice / dx = (v of_v + t of_t) p (1 - p), where
    of_v = I / U^2 and of_t = -2 / U, times the gradient of the dice loss."""
    intersection = tl.load(sums_ptr + pair * 4)
    both = tl.load(sums_ptr + pair * 4 + 1) + tl.load(sums_ptr + pair * 4 + 2) + 1.0
    mask_slope = tl.load(grad_mask_ptr + pair) / tl.maximum(tl.load(sums_ptr + pair * 4 + 3), 1.0)
    grad_dice = tl.load(grad_dice_ptr + pair)
    of_v = grad_dice * (2.0 * intersection + 1.0) / (both * both)
    of_t = -2.0 * grad_dice / both
    bound = tl.abs(mask_slope)
    if FOCAL:
        bound *= 1.0 + gamma
    bound += 0.25 * (tl.abs(of_v) + tl.abs(of_t))
    # A power of two, so that division by it is exact, and at least twice the bound: weights may round up to above one.
    bound = 4.0 * (bound.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return mask_slope, of_v, of_t, bound


@kernel
def _point_mask_loss_bwd_kernel(
    logits_ptr, stride_l, stride_b, stride_n, assignment_ptr, labels_ptr, points_ptr,
    target_ptr, valid_ptr, void_value, grad_mask_ptr, grad_dice_ptr, sums_ptr, units_ptr,
    B, N, M, P, h, w, H, W, alpha, gamma,
    FOCAL: tl.constexpr, SQUARE: tl.constexpr, HAS_SEGMENTS: tl.constexpr, HAS_VOID: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Adds the gradients of some points of one pair to the four logits around each, in units of 2^-40 of the bound.

    units  (L * B * M, h, w) int64, initially zero
    """
    alpha = tl.cast(alpha, tl.float32)
    gamma = tl.cast(gamma, tl.float32)
    pair = tl.program_id(0).to(tl.int64)
    image, target, query, matched = _matched_query(assignment_ptr, labels_ptr, pair, B, N, M)
    mask_slope, of_v, of_t, bound = _pair_slopes(pair, sums_ptr, grad_mask_ptr, grad_dice_ptr, gamma, FOCAL)
    # With an infinite bound, the last kernel makes the whole gradient NaN.
    if matched & (bound > 0.0) & (bound < float("inf")):
        plane_ptr = _plane(logits_ptr, pair // M // B, image, query, stride_l, stride_b, stride_n, UNIT)
        i = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
        inside = i < P
        px, py = _load_points(points_ptr, pair * P + i, inside)
        t, v = _target_at(
            px, py, inside, image, target, target_ptr, valid_ptr, void_value, M, H, W, HAS_SEGMENTS, HAS_VOID
        )
        x = _sample(plane_ptr, px, py, h, w, inside)
        x = tl.where(v > 0.0, x, 0.0)
        p, q, _, _, foreground_slope, background_slope = _point_terms(x, alpha, gamma, FOCAL, SQUARE)
        slope = tl.fma(mask_slope, (v - t) * background_slope - t * foreground_slope, (v * of_v + t * of_t) * p * q)
        units = slope / bound * 1099511627776.0
        at, on_left, on_right, on_upper, on_lower, right, lower = _four_pixels(px, py, h, w, inside & (v > 0.0))
        unit_ptrs = units_ptr + pair * h * w + at
        upper_units = units * (1.0 - lower)
        lower_units = units * lower
        tl.atomic_add(unit_ptrs, (upper_units * (1.0 - right)).to(tl.int64), mask=on_upper & on_left, sem="relaxed")
        tl.atomic_add(unit_ptrs + 1, (upper_units * right).to(tl.int64), mask=on_upper & on_right, sem="relaxed")
        tl.atomic_add(unit_ptrs + w, (lower_units * (1.0 - right)).to(tl.int64), mask=on_lower & on_left, sem="relaxed")
        tl.atomic_add(unit_ptrs + w + 1, (lower_units * right).to(tl.int64), mask=on_lower & on_right, sem="relaxed")


@kernel
def _point_mask_loss_grad_kernel(
    grad_ptr, stride_l, stride_b, stride_n, assignment_ptr, labels_ptr,
    grad_mask_ptr, grad_dice_ptr, sums_ptr, units_ptr, B, N, M, cells, gamma,
    FOCAL: tl.constexpr, UNIT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The gradient of one query's logits, summed over its pairs in order; zero without pairs.

    grad  (L, B, N, cells), strides and cells in units
    """
    gamma = tl.cast(gamma, tl.float32)
    cells = cells * UNIT
    row = tl.program_id(0).to(tl.int64)
    query = row % N
    layer_image = row // N
    image = layer_image % B
    of_query, matches = _targets_of_query(assignment_ptr, labels_ptr, layer_image * M, image, query, M, BLOCK_M)
    cell = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    grad = tl.zeros([BLOCK_C], dtype=tl.float32)
    target = -1
    for _ in range(matches):
        target = _next_target(of_query, target, BLOCK_M)
        pair = layer_image * M + target
        _, _, _, bound = _pair_slopes(pair, sums_ptr, grad_mask_ptr, grad_dice_ptr, gamma, FOCAL)
        units = tl.load(units_ptr + pair * cells + cell, mask=cell < cells, other=0)
        grad += tl.where(bound < float("inf"), units.to(tl.float32) * 9.094947017729282e-13 * bound, float("nan"))
    grad_plane_ptr = _plane(grad_ptr, layer_image // B, image, query, stride_l, stride_b, stride_n, UNIT)
    tl.store(grad_plane_ptr + cell, grad.to(grad_ptr.dtype.element_ty), mask=cell < cells)


class PointMaskLossPlan(NamedTuple):
    """The launches for some sizes, and the shape of the memory for parts of the sums."""

    parts: tuple[int, ...]
    forward: Launch
    reduction: Launch
    backward: Launch


@cached_plan
def plan(device: torch.device, config: PointMaskLossConfig, sizes: PairSizes, points: int) -> PointMaskLossPlan:
    check_positions(sizes.targets, sizes.shape[-2] * sizes.shape[-1])
    if points > MAX_POINTS:
        raise ValueError(f"points has {points} points per pair; at most {MAX_POINTS} are supported")
    arguments = sizes.arguments() | {"P": points, "BLOCK_P": config.points, "num_warps": config.num_warps}
    pairs, splits, per_split = sizes.pairs, ceil_div(points, config.points_per_split), config.points_per_split
    return PointMaskLossPlan(
        (pairs, splits, 5),
        _point_mask_loss_fwd_kernel.plan((pairs, splits), **arguments, points_per_split=per_split),
        plan_reduction(sizes, splits),
        _point_mask_loss_bwd_kernel.plan((pairs, ceil_div(points, config.points)), **arguments),
    )


@cached_plan
def plan_gradient(
    device: torch.device, config: PointMaskLossConfig, sizes: PairSizes, strides: tuple[int, ...]
) -> Launch:
    """The launch that writes the gradient, which has these strides."""
    layers, batch, queries, h, w = sizes.shape
    planes = plane_sizes(sizes.shape, strides)
    term = sizes.term.arguments()
    return _point_mask_loss_grad_kernel.plan(
        (layers * batch * queries, ceil_div(h * w, config.cells)),
        **planes,
        **sizes.counts(),
        gamma=term["gamma"],
        FOCAL=term["FOCAL"],
        cells=h * w // planes["UNIT"],
        BLOCK_C=config.cells,
        BLOCK_M=power_of_two(sizes.num_targets, 16, 1 << 30),
        num_warps=config.num_warps,
        **COMPILER_OPTIONS,
    )


def planned(
    mask_logits: Tensor, assignment: Tensor, *inputs: Any
) -> tuple[PointMaskLossConfig, PairSizes, PointMaskLossPlan, dict[str, Tensor | None]]:
    """The configuration, the sizes, their plan, and the tensors that forward and backward share; ``inputs`` as in
    ``pairs_of``, with the points before the mask term."""
    *targets, points, mask_term, alpha, gamma = inputs
    config = pick_config(CONFIGS, mask_logits.device)
    tensors, sizes = pairs_of(mask_logits, assignment, *targets, mask_term, alpha, gamma)
    tensors["points_ptr"] = points.contiguous()
    return config, sizes, plan(mask_logits.device, config, sizes, points.shape[3]), tensors


def point_mask_loss(mask_logits: Tensor, assignment: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``fastmask::point_mask_loss``: both losses (L, B, M), the sums (L, B, M, 4) for backward, and no slopes, whatever
    ``keep_slopes`` asks for."""
    *inputs, _ = inputs
    _, _, steps, tensors = planned(with_contiguous_planes(mask_logits), assignment, *inputs)
    parts = torch.empty(steps.parts, dtype=torch.float32, device=mask_logits.device)
    if steps.parts[0] > 0:
        steps.forward(**tensors, sums_ptr=parts)
    sums = add_parts(steps.reduction, tensors["assignment_ptr"], tensors["labels_ptr"], parts)
    return *sums, parts.new_empty(0)


@gradient_of_pairs
def point_mask_loss_backward(
    grad: Tensor, of_pairs: dict[str, Tensor], _: Tensor, mask_logits: Tensor, assignment: Tensor, *inputs: Any
) -> None:
    """``fastmask::point_mask_loss_backward``."""
    config, sizes, steps, tensors = planned(mask_logits, assignment, *inputs)
    *_, h, w = sizes.shape
    of_pairs["units_ptr"] = torch.zeros((sizes.pairs, h * w), dtype=torch.int64, device=grad.device)
    steps.backward(**tensors, **of_pairs)
    launch = plan_gradient(grad.device, config, sizes, grad.stride())
    matches = {name: tensors[name] for name in ("assignment_ptr", "labels_ptr")}
    launch(grad_ptr=grad, **matches, **of_pairs)
