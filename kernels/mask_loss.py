"""The mask and dice losses of the matched pairs, and their gradient.

Forward is one launch over the pixels and one that adds up their sums; backward is one launch that writes each logit's
gradient once.

The output pixels of a row are divided into cells: cell c holds the outputs nearest to logit c, which are interpolated
from the logits c - 1, c and c + 1. A thread that owns a cell needs only those three logits, whatever the ratio of the
sizes. In backward it sums three gradients, one for each: a gather without atomics that visits each output pixel once.

Time at B=16, L=6, M=20, 128 x 128 logits and 512 x 512 targets (503 M output pixels), on 132 SMs: two special-function
instructions per pixel take 240 us each way; all 58 instructions of forward, in the machine code for sm_90, are 870 us
of issue slots, and backward's 62 are 1.0 ms. The logits of all pairs are 63 MB, the segment maps 4 MB: memory is not
the bottleneck.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask.kernels._common import (
    _counted,
    _plane,
    _power,
    _sigmoid_of_magnitude,
    check_positions,
    kernel,
    pick_config,
    power_of_two,
)
from fastmask.kernels._layout import with_contiguous_planes
from fastmask.kernels._pairs import (
    _matched_query,
    _next_target,
    _store_part,
    _targets_of_query,
    add_parts,
    gradient_of_pairs,
    pair_arguments,
)


@dataclass(frozen=True)
class MaskLossConfig:
    """Tuning of forward and backward.

    Args:
        cells: the most cells of a row that a program owns.
        cells_per_warp: the cells that one of its warps owns.
        outputs: the most outputs of a cell for which the loop is unrolled.
        programs: the number of forward programs to reach by splitting the rows, if there are enough rows.
        min_rows: the fewest output rows per forward program.
        backward_rows: rows of logits per backward program.
    """

    cells: int = 512
    cells_per_warp: int = 64
    outputs: int = 8
    programs: int = 8192
    min_rows: int = 32
    backward_rows: int = 32


CONFIGS = {None: MaskLossConfig()}


@triton.jit
def _row_taps(y, h, H, half_step_y):
    """PyTorch's bilinear rule with align_corners=False: both rows of logits of output row y, and the second's weight.

    The source position (y + 1/2) h / H - 1/2 is an exact integer in units of half_step_y = 1 / (2 H); the rounding
    error of a float32 would grow with the position, and large logits would amplify it. Clamping the position at both
    ends, instead of the rows, gives the same sum.
    """
    source = tl.minimum(tl.maximum((2 * y + 1) * h - H, 0), 2 * H * (h - 1))
    first = source // (2 * H)
    return first, tl.minimum(first + 1, h - 1), (source - first * (2 * H)).to(tl.float32) * half_step_y


@triton.jit
def _cell_start(cell, w, W):
    """The first output of a cell: the smallest j with floor((2 j + 1) w / (2 W)) >= cell."""
    start = (2 * cell.to(tl.int64) * W + w - 1) // (2 * w)
    return tl.minimum(tl.maximum(start, 0), W).to(tl.int32)


@triton.jit
def _row_logits(row_ptr, cell, w):
    """A row's logits before, at and after each cell; the edges repeat."""
    last = w - 1
    before = tl.load(row_ptr + tl.minimum(tl.maximum(cell - 1, 0), last)).to(tl.float32)
    middle = tl.load(row_ptr + tl.minimum(tl.maximum(cell, 0), last)).to(tl.float32)
    after = tl.load(row_ptr + tl.minimum(tl.maximum(cell + 1, 0), last)).to(tl.float32)
    return before, middle, after


@triton.jit
def _between_rows(plane_ptr, first, second, weight, cell, w):
    """The logits before, at and after each cell, interpolated between two rows. A row of weight 0 is not read, as
    0 * inf is NaN: the other row then serves as both, with half the weight each."""
    second = tl.where(weight == 0.0, first, second)
    weight = tl.where(weight == 0.0, 0.5, weight)
    before_0, middle_0, after_0 = _row_logits(plane_ptr + first.to(tl.int64) * w, cell, w)
    before_1, middle_1, after_1 = _row_logits(plane_ptr + second.to(tl.int64) * w, cell, w)
    before = tl.fma(before_1, weight, before_0 * (1.0 - weight))
    middle = tl.fma(middle_1, weight, middle_0 * (1.0 - weight))
    after = tl.fma(after_1, weight, after_0 * (1.0 - weight))
    return before, middle, after


@triton.jit
def _target_row(y, start, image, target, M, H, W, target_ptr, valid_ptr, HAS_SEGMENTS: tl.constexpr,
                HAS_VOID: tl.constexpr):  # fmt: skip
    """Pointers to the first output of each cell, in row y of the segment map or mask, and of the valid pixels."""
    plane = tl.cast(H, tl.int64) * W
    row = y * W + start
    target_ptrs = target_ptr + (image if HAS_SEGMENTS else image * M + target) * plane + row
    valid_ptrs = target_ptrs
    if HAS_VOID and not HAS_SEGMENTS:
        valid_ptrs = valid_ptr + image * plane + row
    return target_ptrs, valid_ptrs


@triton.jit
def _offset(start, k, cell, w, W, half_step_x):
    """The offset of output start + k of each cell from the cell's logit, exact as in ``_row_taps``. Its magnitude is
    the bilinear weight of the neighboring logit: the one before if the offset is negative, else the one after."""
    output = start.to(tl.int64) + k
    offset = (2 * output + 1) * w - (2 * cell + 1).to(tl.int64) * W
    return offset.to(tl.float32) * half_step_x


@triton.jit
def _upsampled(offset, before, middle, after):
    weight = tl.abs(offset)
    neighbor = tl.where(offset < 0.0, before, tl.where(offset > 0.0, after, 0.0))  # 0 * inf is NaN
    return tl.fma(neighbor, weight, middle * (1.0 - weight))


@triton.jit
def _pixel_terms(x, k, inside, target_ptrs, valid_ptrs, target, void_value, alpha, gamma, FOCAL: tl.constexpr,
                 SQUARE: tl.constexpr, HAS_SEGMENTS: tl.constexpr, HAS_VOID: tl.constexpr):  # fmt: skip
    """For outputs k with upsampled logit x: whether they belong to the target, whether they count, p_t, 1 - p_t, the
    cross-entropy -log p_t, and for the focal loss alpha_t (1 - p_t)^gamma.

    With z = x inside the target and -x outside, the same formulas hold for both kinds of pixel: p_t = sigmoid(z).
    """
    counted, segment = _counted(target_ptrs + k, valid_ptrs + k, inside, void_value, HAS_SEGMENTS, HAS_VOID)
    belongs = segment == target if HAS_SEGMENTS else tl.load(target_ptrs + k, mask=counted, other=0) != 0
    magnitude = tl.abs(x)
    large, small, softplus = _sigmoid_of_magnitude(magnitude, RELATIVE=True)
    right = (x >= 0.0) == belongs
    p_t = tl.where(right, large, small)
    q = tl.where(right, small, large)
    cross_entropy = tl.where(right, 0.0, magnitude) + softplus
    modulation = q
    if FOCAL:
        softplus_z = tl.where(right, magnitude, 0.0) + softplus
        modulation = tl.where(belongs, alpha, 1.0 - alpha) * _power(q, softplus_z, gamma, SQUARE)
    return belongs, counted, p_t, q, cross_entropy, modulation


@kernel
def _mask_loss_fwd_kernel(
    logits_ptr, stride_l, stride_b, stride_n, assignment_ptr, labels_ptr,
    target_ptr, valid_ptr, void_value, sums_ptr,
    B, N, M, h, w, H, W, half_step_y, half_step_x, rows_per_split, chunks, alpha, gamma,
    FOCAL: tl.constexpr, SQUARE: tl.constexpr, HAS_SEGMENTS: tl.constexpr, HAS_VOID: tl.constexpr,
    ONE_CHUNK: tl.constexpr, UNIT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sums over some output rows and cells of one pair, in parts that ``_mask_loss_reduce_kernel`` adds: the loss,
    sum p t, sum p, sum t and the number of counted pixels.

    The loss of a pixel is alpha_t (1-p_t)^gamma (-log p_t) (RetinaNet, arXiv:1708.02002, equation 5) or -log p_t.

        logits      (L, B, N, h, w), strides and w in units
        assignment  (L, B, M), labels (B, M)
        target      (B, H, W) segments or (B, M, H, W) masks;  valid  (B, H, W)
        sums        (L * B * M, parts, 5); not written for targets without a query
    """
    alpha = tl.cast(alpha, tl.float32)
    gamma = tl.cast(gamma, tl.float32)
    w = w * UNIT
    half_step_y = tl.cast(half_step_y, tl.float32)
    half_step_x = tl.cast(half_step_x, tl.float32)
    pair = tl.program_id(0).to(tl.int64)
    image, target, query, matched = _matched_query(assignment_ptr, labels_ptr, pair, B, N, M)
    if matched:
        plane_ptr = _plane(logits_ptr, pair // M // B, image, query, stride_l, stride_b, stride_n, UNIT)
        cell = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
        start = _cell_start(cell, w, W)
        outputs = tl.where(cell < w, _cell_start(cell + 1, w, W) - start, 0)

        zero = tl.zeros([BLOCK_C], dtype=tl.float32)
        losses, intersections, outsides = zero, zero, zero
        target_pixels = tl.zeros([BLOCK_C], dtype=tl.int32)
        counted_pixels = tl.zeros([BLOCK_C], dtype=tl.int32)
        y_begin = tl.program_id(2) * rows_per_split
        for y in range(y_begin, tl.minimum(y_begin + rows_per_split, H)):
            first, second, weight = _row_taps(y, h, H, half_step_y)
            before, middle, after = _between_rows(plane_ptr, first, second, weight, cell, w)
            target_ptrs, valid_ptrs = _target_row(
                y, start, image, target, M, H, W, target_ptr, valid_ptr, HAS_SEGMENTS, HAS_VOID
            )
            # Each row is summed separately, so that fewer roundings have the magnitude of the total.
            row_loss, row_intersection, row_outside = zero, zero, zero
            for chunk in range(1 if ONE_CHUNK else chunks):
                for i in tl.static_range(BLOCK_K):
                    k = chunk * BLOCK_K + i
                    x = _upsampled(_offset(start, k, cell, w, W, half_step_x), before, middle, after)
                    belongs, counted, p_t, q, cross_entropy, modulation = _pixel_terms(
                        x, k, k < outputs, target_ptrs, valid_ptrs, target, void_value, alpha, gamma,
                        FOCAL, SQUARE, HAS_SEGMENTS, HAS_VOID,
                    )  # fmt: skip
                    if FOCAL:
                        cross_entropy *= modulation
                    row_loss += tl.where(counted, cross_entropy, 0.0)
                    row_intersection += tl.where(counted & belongs, p_t, 0.0)
                    row_outside += tl.where(counted & ~belongs, q, 0.0)
                    target_pixels += (counted & belongs).to(tl.int32)
                    if HAS_VOID:
                        counted_pixels += counted.to(tl.int32)
            if not HAS_VOID:
                counted_pixels += outputs
            losses += row_loss
            intersections += row_intersection
            outsides += row_outside

        parts = tl.num_programs(1) * tl.num_programs(2)
        part_ptr = sums_ptr + (pair * parts + tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * 5
        loss, intersection, outside = tl.sum(losses, 0), tl.sum(intersections, 0), tl.sum(outsides, 0)
        target_area, counted_area = tl.sum(target_pixels, 0).to(tl.float32), tl.sum(counted_pixels, 0).to(tl.float32)
        _store_part(part_ptr, loss, intersection, intersection + outside, target_area, counted_area)


def launch_arguments(
    config: MaskLossConfig, mask_logits: Tensor, *inputs: Any, grad: Tensor | None = None
) -> dict[str, Any]:
    """The arguments that the forward and backward kernels share; ``inputs`` as in ``pair_arguments``."""
    h, w = mask_logits.shape[-2:]
    arguments = pair_arguments(mask_logits, *inputs, grad=grad, sizes=(w,))
    check_positions(arguments, 2 * arguments["H"] * h)
    cells = power_of_two(w, 32, config.cells)
    outputs = triton.cdiv(arguments["W"], w)  # the most outputs per cell
    block_outputs = power_of_two(outputs, 1, config.outputs)
    return arguments | {
        "w": w // arguments["UNIT"],
        "half_step_y": 0.5 / arguments["H"],
        "half_step_x": 0.5 / arguments["W"],
        "chunks": triton.cdiv(outputs, block_outputs),
        "ONE_CHUNK": outputs <= block_outputs,
        "BLOCK_C": cells,
        "BLOCK_K": block_outputs,
        "num_warps": max(1, cells // config.cells_per_warp),
    }


def mask_loss(mask_logits: Tensor, assignment: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``fastmask::mask_loss``: both losses (L, B, M), the sums (L, B, M, 4) for backward, and no slopes, whatever
    ``keep_slopes`` asks for."""
    *inputs, _ = inputs
    config = pick_config(CONFIGS, mask_logits.device)
    arguments = launch_arguments(config, with_contiguous_planes(mask_logits), assignment, *inputs)
    column_blocks = triton.cdiv(mask_logits.shape[-1], arguments["BLOCK_C"])
    height = arguments["H"]
    pairs = assignment.numel()
    splits = config.programs // max(pairs * column_blocks, 1)
    splits = max(1, min(splits, triton.cdiv(height, config.min_rows)))
    rows_per_split = triton.cdiv(height, splits)
    splits = triton.cdiv(height, rows_per_split)
    parts = mask_logits.new_empty((pairs, splits * column_blocks, 5), dtype=torch.float32)
    if pairs > 0:
        _mask_loss_fwd_kernel[(pairs, column_blocks, splits)](
            **arguments, sums_ptr=parts, rows_per_split=rows_per_split
        )
    return add_parts(arguments, parts)


@triton.jit
def _pair_slopes(pair, sums_ptr, grad_mask_ptr, grad_dice_ptr):
    """For a pair with U = sum p + sum t + 1 and I = 2 sum p t + 1: -grad_mask / pixels, and grad_dice times the slope
    d dice / dp = (I - 2 t U) / U^2 outside and inside the target. Float64 is cheap, once for thousands of pixels."""
    intersection = tl.load(sums_ptr + pair * 4).to(tl.float64)
    prediction = tl.load(sums_ptr + pair * 4 + 1).to(tl.float64)
    target = tl.load(sums_ptr + pair * 4 + 2).to(tl.float64)
    pixels = tl.maximum(tl.load(sums_ptr + pair * 4 + 3).to(tl.float64), 1.0)
    both = prediction + target + 1.0
    overlap = 2.0 * intersection + 1.0
    dice = tl.load(grad_dice_ptr + pair).to(tl.float64) / (both * both)
    mask = -(tl.load(grad_mask_ptr + pair).to(tl.float64) / pixels)
    return mask.to(tl.float32), (dice * overlap).to(tl.float32), (dice * (overlap - 2.0 * both)).to(tl.float32)


@triton.jit
def _row_gradient(
    y, before, middle, after, mask_slope, dice_outside, dice_inside, cell, start, outputs, image, target,
    target_ptr, valid_ptr, void_value, M, H, w, W, half_step_x, chunks, alpha, gamma,
    FOCAL: tl.constexpr, SQUARE: tl.constexpr, HAS_SEGMENTS: tl.constexpr, HAS_VOID: tl.constexpr,
    ONE_CHUNK: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sums over the outputs of each cell of row y: the gradients of the logits before, at and after the cell.

    With z as in ``_pixel_terms``: d focal / dz = -alpha_t q^gamma (gamma p_t (-log p_t) + q), q = 1 - p_t,
    d cross-entropy / dz = -q, and dp / dx = p_t q.
    """
    target_ptrs, valid_ptrs = _target_row(
        y, start, image, target, M, H, W, target_ptr, valid_ptr, HAS_SEGMENTS, HAS_VOID
    )
    to_before = tl.zeros([BLOCK_C], dtype=tl.float32)
    to_middle = tl.zeros([BLOCK_C], dtype=tl.float32)
    to_after = tl.zeros([BLOCK_C], dtype=tl.float32)
    for chunk in range(1 if ONE_CHUNK else chunks):
        for i in tl.static_range(BLOCK_K):
            k = chunk * BLOCK_K + i
            offset = _offset(start, k, cell, w, W, half_step_x)
            x = _upsampled(offset, before, middle, after)
            belongs, counted, p_t, q, cross_entropy, modulation = _pixel_terms(
                x, k, k < outputs, target_ptrs, valid_ptrs, target, void_value, alpha, gamma,
                FOCAL, SQUARE, HAS_SEGMENTS, HAS_VOID,
            )  # fmt: skip
            slope = q
            if FOCAL:
                slope = modulation * (gamma * p_t * cross_entropy + q)
            slope *= tl.where(belongs, mask_slope, -mask_slope)
            g = tl.where(counted, tl.where(belongs, dice_inside, dice_outside) * p_t * q + slope, 0.0)
            to_middle += g * (1.0 - tl.abs(offset))
            to_before += g * tl.maximum(-offset, 0.0)
            to_after += g * tl.maximum(offset, 0.0)
    # The edges repeat: the logit beyond an edge is that of the edge's cell.
    to_middle += tl.where(cell == 0, to_before, 0.0)
    to_middle += tl.where(cell == w - 1, to_after, 0.0)
    return to_before, to_middle, to_after


@kernel
def _mask_loss_bwd_kernel(
    logits_ptr, stride_l, stride_b, stride_n, grad_ptr, grad_stride_l, grad_stride_b, grad_stride_n,
    grad_mask_ptr, grad_dice_ptr, sums_ptr, assignment_ptr, labels_ptr, target_ptr, valid_ptr, void_value,
    B, N, M, h, w, H, W, half_step_y, half_step_x, rows_per_split, chunks, alpha, gamma,
    FOCAL: tl.constexpr, SQUARE: tl.constexpr, HAS_SEGMENTS: tl.constexpr, HAS_VOID: tl.constexpr,
    ONE_CHUNK: tl.constexpr, UNIT: tl.constexpr, HALO: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Gradient of sum grad_mask mask + grad_dice dice with respect to some rows and columns of one query's logits.

    Output rows are visited in order. The gradients of the two rows of logits around an output row are kept in
    registers, three per cell; a row that no later output reaches is gathered from its cells and written. A query
    without a target gets zeros; one with several targets gets the sum, in their order.

        logits, grad          (L, B, N, h, w), strides and w in units
        grad_mask, grad_dice  (L, B, M);  sums  (L, B, M, 4), of forward
        assignment            (L, B, M), labels (B, M)
        target                (B, H, W) segments or (B, M, H, W) masks;  valid  (B, H, W)
    """
    alpha = tl.cast(alpha, tl.float32)
    gamma = tl.cast(gamma, tl.float32)
    half_step_y = tl.cast(half_step_y, tl.float32)
    half_step_x = tl.cast(half_step_x, tl.float32)
    w = w * UNIT
    row = tl.program_id(0).to(tl.int64)
    query = row % N
    image = row // N % B
    layer = row // N // B
    first_pair = (layer * B + image) * M
    row_begin = tl.program_id(2) * rows_per_split
    row_end = tl.minimum(row_begin + rows_per_split, h)
    plane_ptr = _plane(logits_ptr, layer, image, query, stride_l, stride_b, stride_n, UNIT)
    grad_plane_ptr = _plane(grad_ptr, layer, image, query, grad_stride_l, grad_stride_b, grad_stride_n, UNIT)

    lane = tl.arange(0, BLOCK_C)
    cell = tl.program_id(1) * (BLOCK_C - 2 * HALO) - HALO + lane  # [BLOCK_C]
    owned = (lane >= HALO) & (lane < BLOCK_C - HALO) & (cell < w)

    of_query, matches = _targets_of_query(assignment_ptr, labels_ptr, first_pair, image, query, M, BLOCK_M)
    if matches == 0:
        for i in range(row_begin, row_end):
            zeros = tl.zeros([BLOCK_C], dtype=grad_ptr.dtype.element_ty)
            tl.store(grad_plane_ptr + tl.cast(i, tl.int64) * w + cell, zeros, mask=owned)
    else:
        start = _cell_start(cell, w, W)
        outputs = tl.where((cell >= 0) & (cell < w), _cell_start(cell + 1, w, W) - start, 0)
        first_target = _next_target(of_query, -1, BLOCK_M)
        first_mask, first_outside, first_inside = _pair_slopes(
            first_pair + first_target, sums_ptr, grad_mask_ptr, grad_dice_ptr
        )

        # Outputs between the middles of rows row_begin - 1 and row_end, and some more for the rounding of positions.
        y_begin = (tl.maximum(2 * row_begin - 2, 0).to(tl.int64) * H) // (2 * h)
        y_begin = tl.maximum(y_begin - H // (2 * h) - 1, 0).to(tl.int32)
        y_end = tl.minimum((2 * row_end + 1).to(tl.int64) * H // (2 * h) + 1, H).to(tl.int32)

        zero = tl.zeros([BLOCK_C], dtype=tl.float32)
        upper_before, upper_middle, upper_after = zero, zero, zero
        lower_before, lower_middle, lower_after = zero, zero, zero
        top = tl.maximum(row_begin - 1, 0)  # the row of logits to which the upper sums belong
        for y in range(y_begin, y_end + 1):
            first, second, weight = _row_taps(y, h, H, half_step_y)
            first = tl.where(y == y_end, row_end, first)
            for finished in range(top, first):
                if (finished >= row_begin) & (finished < row_end):
                    from_left = tl.gather(upper_after, tl.maximum(lane - 1, 0), 0)
                    from_right = tl.gather(upper_before, tl.minimum(lane + 1, BLOCK_C - 1), 0)
                    grad = upper_middle + tl.where(lane > 0, from_left, 0.0)
                    grad += tl.where(lane < BLOCK_C - 1, from_right, 0.0)
                    at = grad_plane_ptr + tl.cast(finished, tl.int64) * w + cell
                    tl.store(at, grad.to(grad_ptr.dtype.element_ty), mask=owned)
                upper_before, upper_middle, upper_after = lower_before, lower_middle, lower_after
                lower_before, lower_middle, lower_after = zero, zero, zero
            if (y < y_end) & (first >= top):
                top = first
                before, middle, after = _between_rows(plane_ptr, first, second, weight, cell, w)
                to_before, to_middle, to_after = zero, zero, zero
                target, mask_slope, dice_outside, dice_inside = first_target, first_mask, first_outside, first_inside
                for match in range(matches):
                    if match > 0:
                        target = _next_target(of_query, target, BLOCK_M)
                        mask_slope, dice_outside, dice_inside = _pair_slopes(
                            first_pair + target, sums_ptr, grad_mask_ptr, grad_dice_ptr
                        )
                        # Read again; otherwise the terms of all pixels would occupy 226 registers for a second match.
                        before, middle, after = _between_rows(plane_ptr, first, second, weight, cell, w)
                    match_before, match_middle, match_after = _row_gradient(
                        y, before, middle, after, mask_slope, dice_outside, dice_inside, cell, start, outputs, image,
                        target, target_ptr, valid_ptr, void_value, M, H, w, W, half_step_x, chunks, alpha, gamma,
                        FOCAL, SQUARE, HAS_SEGMENTS, HAS_VOID, ONE_CHUNK, BLOCK_C, BLOCK_K,
                    )  # fmt: skip
                    to_before += match_before
                    to_middle += match_middle
                    to_after += match_after
                upper_before += to_before * (1.0 - weight)
                upper_middle += to_middle * (1.0 - weight)
                upper_after += to_after * (1.0 - weight)
                lower_before += to_before * weight
                lower_middle += to_middle * weight
                lower_after += to_after * weight


@gradient_of_pairs
def mask_loss_backward(
    grad: Tensor, of_pairs: dict[str, Tensor], mask_logits: Tensor, assignment: Tensor, *inputs: Any
) -> None:
    """``fastmask::mask_loss_backward``."""
    config = pick_config(CONFIGS, mask_logits.device)
    arguments = launch_arguments(config, mask_logits, assignment, *inputs, grad=grad)
    h, w, cells = *mask_logits.shape[-2:], arguments["BLOCK_C"]
    halo = 0 if w <= cells else 1  # extra cells at both ends of a program's columns, whose outputs reach into these
    rows_per_split = min(config.backward_rows, h)
    _mask_loss_bwd_kernel[
        (mask_logits[..., 0, 0].numel(), triton.cdiv(w, cells - 2 * halo), triton.cdiv(h, rows_per_split))
    ](
        **arguments,
        **of_pairs,
        rows_per_split=rows_per_split,
        HALO=halo,
        BLOCK_M=power_of_two(arguments["M"], 16, 1 << 30),
        maxnreg=255,  # otherwise ptxas takes 168, so that twelve warps fit instead of eight, and spills
    )
