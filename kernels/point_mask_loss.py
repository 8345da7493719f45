"""The mask and dice losses of the matched pairs at each pair's points, forward and backward.

Each point reads four logits and four pixels of the targets, scattered in memory; at B=16, L=10, M=20 with 12,544 points
per pair there are 40 M points. From a segment map, four values suffice for target and void, which are one word.

Backward adds every point's gradient to four logits, and points are unordered. Floating-point atomics would add in a
different order each time. Instead the gradients are added as 64-bit integers, in units of 2^-40 of a bound on the
gradients of all of a pair's points, which is exact in any order. In global memory this would be 160 M atomics; shared
memory holds some rows of logits, and so a program sorts the points of a pair by rows first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask.kernels._common import (
    INTERPRETED,
    _plane,
    ceil_div,
    check_positions,
    pick_config,
    plane_sizes,
    power_of_two,
)
from fastmask.kernels._launch import Launch, cached_plan, kernel
from fastmask.kernels._layout import with_contiguous_planes, words
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
from fastmask.kernels._points import _point_taps, _point_terms, _sample, _target_at
from fastmask.kernels._quads import _target_of_quads, plan_quads, with_quads
from fastmask.kernels._shared_memory import (
    COUNTERS,
    SUMS,
    _add,
    _clear_sums,
    _count,
    _read_counters,
    _set_counters,
    _tables,
    _take,
)
from fastmask.kernels._taps import _halves

MAX_POINTS = 1 << 22  # per pair, so that sums in units of 2^-40 of the bound are less than 2^63


@dataclass(frozen=True)
class PointMaskLossConfig:
    """Tuning of forward and backward.

    Args:
        points: points that a program reads at a time.
        points_per_split: points that a forward program sums; a multiple of ``points``.
        sums: of those that a program of backward has in shared memory; at most SUMS.
        programs: of backward, each of which takes several pairs in turn, and has memory of its own: two for each
            multiprocessor.
        backward_points: points that a program of backward reads at a time; at least one a thread.
        registers: of each thread of backward, at most.
    """

    points: int = 256
    points_per_split: int = 1792
    sums: int = SUMS.value
    programs: int = 264
    num_warps: int = 4
    backward_points: int = 512
    backward_warps: int = 8
    registers: int = 128


CONFIGS = {None: PointMaskLossConfig()}


@kernel
def _point_mask_loss_fwd_kernel(
    logits_ptr, stride_l, stride_b, stride_n, assignment_ptr, labels_ptr, points_ptr,
    target_ptr, valid_ptr, void_value, sums_ptr,
    B, N, M, P, h, w, H, W, points_per_split, alpha, gamma,
    FOCAL: tl.constexpr, SQUARE: tl.constexpr, HAS_SEGMENTS: tl.constexpr, HAS_VOID: tl.constexpr,
    QUADS: tl.constexpr, UNIT: tl.constexpr, BLOCK_P: tl.constexpr,
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
            px, py = _halves(tl.load(points_ptr + pair * P + i, mask=inside, other=0))
            if QUADS:
                t, v = _target_of_quads(px, py, inside, image, target, target_ptr, H, W, HAS_VOID)
            else:
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


@triton.jit
def _clear_rows_without_pairs(
    grad_ptr, stride_l, stride_b, stride_n, assignment_ptr, labels_ptr, first, end, B, N, M, cells,
    UNIT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The gradient of those of the queries ``first`` to ``end``, of all layers and images, that no target has."""
    cells *= UNIT
    cell = tl.arange(0, BLOCK_C)
    for row_number in range(first, end):
        layer_image, query = row_number // N, row_number % N
        layer, image = layer_image // B, layer_image % B
        first_pair = tl.cast(layer_image, tl.int64) * M
        _, matches = _targets_of_query(assignment_ptr, labels_ptr, first_pair, image, query, M, BLOCK_M)
        if matches == 0:
            row_ptr = _plane(grad_ptr, layer, image, query, stride_l, stride_b, stride_n, UNIT)
            for c in range(0, cells, BLOCK_C):
                zero = tl.zeros([BLOCK_C], dtype=grad_ptr.dtype.element_ty)
                tl.store(row_ptr + c + cell, zero, mask=c + cell < cells)


@triton.jit
def _bin(y, there, h, bin_shift):
    """The bin of points: of the row of logits above each, of which the first is the one above the map. The last bin is
    for lanes without a point."""
    row, _ = _point_taps(y, h)
    return tl.where(there, (row + 1) >> bin_shift, COUNTERS - 1)


@triton.jit
def _sort_by_rows(points_ptr, sorted_ptr, P, h, bin_shift, counters, BLOCK_P: tl.constexpr):
    """Copies the P points of a pair, ordered by bins. Afterwards, each counter holds the end of its bin."""
    lane = tl.arange(0, BLOCK_P)
    bin = tl.arange(0, COUNTERS)
    _set_counters(counters, bin, bin * 0)
    tl.debug_barrier()
    for start in range(0, P, BLOCK_P):
        there = start + lane < P
        _, y = _halves(tl.load(points_ptr + start + lane, mask=there, other=0))
        _count(counters, _bin(y, there, h, bin_shift))
    tl.debug_barrier()
    counts = _read_counters(counters, bin)
    starts = tl.cumsum(counts, 0) - counts
    tl.debug_barrier()
    _set_counters(counters, bin, starts)
    tl.debug_barrier()
    for start in range(0, P, BLOCK_P):
        there = start + lane < P
        point = tl.load(points_ptr + start + lane, mask=there, other=0)
        _, y = _halves(point)
        tl.store(sorted_ptr + _count(counters, _bin(y, there, h, bin_shift)), point, mask=there)
    tl.debug_barrier()


@kernel
def _point_mask_loss_bwd_kernel(
    logits_ptr, stride_l, stride_b, stride_n, grad_ptr, grad_stride_l, grad_stride_b, grad_stride_n,
    assignment_ptr, labels_ptr, points_ptr, target_ptr, valid_ptr, void_value, grad_mask_ptr, grad_dice_ptr, sums_ptr,
    sorted_ptr, partial_ptr, counters_ptr, units_ptr,
    pairs, rows, B, N, M, P, h, w, H, W, cells, strip, band, bin_shift, alpha, gamma,
    FOCAL: tl.constexpr, SQUARE: tl.constexpr, HAS_SEGMENTS: tl.constexpr, HAS_VOID: tl.constexpr, QUADS: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_Z: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The gradient of the logits, of a query's pairs in order. The points of a pair are sorted by rows. Bands of rows,
    of strips of columns if the map is wide, are added up one after another in shared memory, in units of 2^-40 of the
    bound. There, a row begins with the column on the left, and ends with the one on the right, which nobody reads.

        grad      (L, B, N, h, w); strides, and cells = h * w, in units
        sorted    (programs, P), points as words of 64 bits
        partial   (programs, h, w), the gradient of a query's pairs before the last
        counters  (programs, COUNTERS), and units (programs, SUMS): the tables, if interpreted
    """
    alpha = tl.cast(alpha, tl.float32)
    gamma = tl.cast(gamma, tl.float32)
    program = tl.program_id(0).to(tl.int64)
    if INTERPRETED:
        counters_ptr += program * COUNTERS
        units_ptr += program * SUMS
    counters, units = _tables(counters_ptr, units_ptr)
    sorted_ptr += program * P
    partial_ptr += program * h * w
    lane = tl.arange(0, BLOCK_P)
    step = strip + 2
    for start in range(0, SUMS, BLOCK_P):
        _clear_sums(units, tl.minimum(start + lane, SUMS - 1))
    rows_per_pair = tl.cdiv(rows, pairs)
    for pair_number in range(tl.program_id(0), pairs, tl.num_programs(0)):
        first_row = pair_number * rows_per_pair
        _clear_rows_without_pairs(
            grad_ptr, grad_stride_l, grad_stride_b, grad_stride_n, assignment_ptr, labels_ptr,
            first_row, tl.minimum(first_row + rows_per_pair, rows), B, N, M, cells, UNIT, BLOCK_Z, BLOCK_M,
        )  # fmt: skip
        pair = tl.cast(pair_number, tl.int64)
        image, target, query, matched = _matched_query(assignment_ptr, labels_ptr, pair, B, N, M)
        layer_image = pair // M
        of_query, matches = _targets_of_query(assignment_ptr, labels_ptr, layer_image * M, image, query, M, BLOCK_M)
        # The program of a query's first pair adds up all of them.
        matches = tl.where(matched & (_next_target(of_query, -1, BLOCK_M) == target), matches, 0)
        plane_ptr = _plane(logits_ptr, layer_image // B, image, query, stride_l, stride_b, stride_n, UNIT)
        grad_plane_ptr = _plane(
            grad_ptr, layer_image // B, image, query, grad_stride_l, grad_stride_b, grad_stride_n, UNIT
        )
        for match in range(matches):
            if match > 0:
                target = _next_target(of_query, target, BLOCK_M)
            pair = layer_image * M + target
            mask_slope, of_v, of_t, bound = _pair_slopes(pair, sums_ptr, grad_mask_ptr, grad_dice_ptr, gamma, FOCAL)
            in_units = tl.where((bound > 0.0) & (bound < float("inf")), 1099511627776.0 / bound, 0.0)
            # With an infinite bound, the whole gradient is NaN.
            of_unit = tl.where(bound < float("inf"), bound * 9.094947017729282e-13, float("nan"))
            _sort_by_rows(points_ptr + pair * P, sorted_ptr, P, h, bin_shift, counters, BLOCK_P)
            for left_most in range(0, w, strip):
                begin = 0
                for first in range(0, h + 1, band):
                    # Points between the rows of logits first - 1 to first + band - 1.
                    last_bin = (tl.minimum(first + band, h + 1) - 1) >> bin_shift
                    end = tl.sum(_read_counters(counters, last_bin + tl.arange(0, 1)), 0)
                    for start in range(begin, end, BLOCK_P):
                        inside = start + lane < end
                        px, py = _halves(tl.load(sorted_ptr + start + lane, mask=inside, other=0))
                        if QUADS:
                            t, v = _target_of_quads(px, py, inside, image, target, target_ptr, H, W, HAS_VOID)
                        else:
                            t, v = _target_at(
                                px, py, inside, image, target, target_ptr, valid_ptr, void_value, M, H, W, HAS_SEGMENTS,
                                HAS_VOID,
                            )  # fmt: skip
                        x = _sample(plane_ptr, px, py, h, w, inside)
                        x = tl.where(v > 0.0, x, 0.0)
                        p, q, _, _, foreground_slope, background_slope = _point_terms(x, alpha, gamma, FOCAL, SQUARE)
                        slope = (v - t) * background_slope - t * foreground_slope
                        slope = tl.fma(mask_slope, slope, (v * of_v + t * of_t) * p * q)
                        column, right = _point_taps(px, w)
                        row, lower = _point_taps(py, h)
                        column = column - left_most + 1
                        there = inside & (column >= 0) & (column <= strip)
                        at = tl.where(there, (row + 1 - first) * step + column, 0)
                        slope = tl.where(there, slope * in_units, 0.0)
                        upper, lower = slope * (1.0 - lower), slope * lower
                        _add(units, at, (upper * (1.0 - right)).to(tl.int64))
                        _add(units, at + 1, (upper * right).to(tl.int64))
                        _add(units, at + step, (lower * (1.0 - right)).to(tl.int64))
                        _add(units, at + step + 1, (lower * right).to(tl.int64))
                    begin = end
                    tl.debug_barrier()
                    # All but the band's last row are complete. A row above or below the map is read, but not stored.
                    for some in range(0, band, BLOCK_R):
                        i = some + tl.arange(0, BLOCK_R)[:, None]
                        row = first - 1 + i
                        for columns in range(0, strip, BLOCK_C):
                            column = columns + tl.arange(0, BLOCK_C)[None, :]
                            there = (i < band) & (column < strip)
                            grad = _take(units, i * step + column + 1, there).to(tl.float32) * of_unit
                            there &= (row >= 0) & (row < h) & (left_most + column < w)
                            cell = row * w + left_most + column
                            if match > 0:
                                grad += tl.load(partial_ptr + cell, mask=there, other=0.0)
                            if match + 1 < matches:
                                tl.store(partial_ptr + cell, grad, mask=there)
                            else:
                                tl.store(grad_plane_ptr + cell, grad.to(grad_ptr.dtype.element_ty), mask=there)
                    tl.debug_barrier()
                    for columns in range(0, strip, BLOCK_P):
                        there = columns + lane < strip
                        last_row = _take(units, band * step + columns + lane + 1, there)
                        last_row = tl.where(first + band < h + 1, last_row, 0)
                        _add(units, tl.where(there, columns + lane + 1, 0), last_row)
                    tl.debug_barrier()


class ForwardPlan(NamedTuple):
    """The launches for some sizes, and the shape of the memory for parts of the sums."""

    parts: tuple[int, ...]
    quads: Launch | None
    forward: Launch
    reduction: Launch


class BackwardPlan(NamedTuple):
    quads: Launch | None
    backward: Launch


def shared_plan(sizes: PairSizes, points: int) -> tuple[Launch | None, dict[str, Any]]:
    """What forward and backward share: the launch that makes quads, and the arguments of their kernels."""
    targets, (h, w) = sizes.targets, sizes.shape[-2:]
    check_positions(targets, h * w, (targets.H + 1) * (targets.W + 1))
    if points > MAX_POINTS:
        raise ValueError(f"points has {points} points per pair; at most {MAX_POINTS} are supported")
    quads = plan_quads(sizes.shape[1], targets, sizes.num_targets)
    return quads, sizes.arguments() | {"P": points, "QUADS": quads is not None}


@cached_plan
def plan_forward(device: torch.device, config: PointMaskLossConfig, sizes: PairSizes, points: int) -> ForwardPlan:
    quads, arguments = shared_plan(sizes, points)
    pairs, splits = sizes.pairs, ceil_div(points, config.points_per_split)
    forward = _point_mask_loss_fwd_kernel.plan(
        (pairs, splits),
        **arguments,
        points_per_split=config.points_per_split,
        BLOCK_P=config.points,
        num_warps=config.num_warps,
    )
    return ForwardPlan((pairs, splits, 5), quads, forward, plan_reduction(sizes, splits))


@cached_plan
def plan_backward(
    device: torch.device, config: PointMaskLossConfig, sizes: PairSizes, points: int, grad_strides: tuple[int, ...]
) -> BackwardPlan:
    quads, arguments = shared_plan(sizes, points)
    layers, batch, queries, h, w = sizes.shape
    arguments |= plane_sizes(sizes.shape, sizes.strides, grad_strides)
    # One counter is for no points; a strip has two more columns, and a band one more row.
    bin_shift = (h // (COUNTERS.value - 1)).bit_length()
    strip = min(w, (config.sums >> (bin_shift + 1)) - 2)
    band = (config.sums // (strip + 2) - 1) >> bin_shift << bin_shift
    columns = power_of_two(strip, 1, 256)
    backward = _point_mask_loss_bwd_kernel.plan(
        (min(sizes.pairs, config.programs),),
        **arguments,
        pairs=sizes.pairs,
        rows=layers * batch * queries,
        cells=h * w // arguments["UNIT"],
        strip=strip,
        band=band,
        bin_shift=bin_shift,
        BLOCK_P=config.backward_points,
        BLOCK_R=max(config.backward_points // columns, 1),
        BLOCK_C=columns,
        BLOCK_Z=8 * config.backward_points,
        BLOCK_M=power_of_two(sizes.num_targets, 16, 1 << 30),
        num_warps=config.backward_warps,
        maxnreg=config.registers,
    )
    return BackwardPlan(quads, backward)


def point_pairs_of(
    mask_logits: Tensor, assignment: Tensor, *inputs: Any
) -> tuple[dict[str, Tensor | None], PairSizes, int]:
    """As ``pairs_of``, with the points among the tensors, and how many there are of each pair; in ``inputs`` they are
    before the mask term."""
    *targets, points, mask_term, alpha, gamma = inputs
    tensors, sizes = pairs_of(mask_logits, assignment, *targets, mask_term, alpha, gamma)
    return tensors | {"points_ptr": words(points)}, sizes, points.shape[3]


def point_mask_loss(mask_logits: Tensor, assignment: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``fastmask::point_mask_loss``: both losses (L, B, M), the sums (L, B, M, 4) for backward, and no slopes, whatever
    ``keep_slopes`` asks for."""
    *inputs, _ = inputs
    device = mask_logits.device
    tensors, sizes, points = point_pairs_of(with_contiguous_planes(mask_logits), assignment, *inputs)
    steps = plan_forward(device, pick_config(CONFIGS, device), sizes, points)
    tensors = with_quads(steps.quads, tensors)
    parts = torch.empty(steps.parts, dtype=torch.float32, device=device)
    if steps.parts[0] > 0:
        steps.forward(**tensors, sums_ptr=parts)
    sums = add_parts(steps.reduction, tensors["assignment_ptr"], tensors["labels_ptr"], parts)
    return *sums, parts.new_empty(0)


@gradient_of_pairs
def point_mask_loss_backward(
    grad: Tensor, of_pairs: dict[str, Tensor], _: Tensor, mask_logits: Tensor, assignment: Tensor, *inputs: Any
) -> None:
    """``fastmask::point_mask_loss_backward``."""
    device = grad.device
    tensors, sizes, points = point_pairs_of(mask_logits, assignment, *inputs)
    steps = plan_backward(device, pick_config(CONFIGS, device), sizes, points, grad.stride())
    programs = steps.backward.grid[0]
    tables = {"counters_ptr": None, "units_ptr": None}
    if INTERPRETED.value:
        tables["counters_ptr"] = torch.empty((programs, COUNTERS.value), dtype=torch.int32, device=device)
        tables["units_ptr"] = torch.empty((programs, SUMS.value), dtype=torch.int64, device=device)
    steps.backward(
        **with_quads(steps.quads, tensors),
        **of_pairs,
        **tables,
        grad_ptr=grad,
        sorted_ptr=torch.empty((programs, points), dtype=torch.int64, device=device),
        partial_ptr=torch.empty((programs, *sizes.shape[-2:]), dtype=torch.float32, device=device),
    )
