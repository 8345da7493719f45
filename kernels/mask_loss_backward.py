"""The gradient of the mask and dice losses: one launch, each logit's gradient written once.

See ``mask_loss`` for the cells. About 62 instructions an output pixel in the machine code for sm_90, two of them
special functions: 1.0 ms of issue slots at the sizes named there.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastmask.kernels._common import _plane, kernel, pick_config, power_of_two, target_arguments
from fastmask.kernels._layout import empty_gradient, with_contiguous_planes
from fastmask.kernels.mask_loss import (
    CONFIGS,
    _between_rows,
    _cell_start,
    _offset,
    _pixel_terms,
    _row_taps,
    _target_row,
    _upsampled,
    launch_arguments,
)


@triton.jit
def _pair_slopes(pair, sums_ptr, grad_mask_ptr, grad_dice_ptr):
    """Of a pair, with U = sum p + sum t + 1 and I = 2 sum p t + 1: -grad_mask / pixels, and grad_dice times the slope
    d dice / dp = (I - 2 t U) / U^2 outside and inside the target. In float64, once for thousands of pixels."""
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
    """Sums over the outputs of each cell of output row y: gradient of the logits before, of and after the cell.

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
    # The edges are continued: what lies beyond them is the cell's own logit.
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

    Output rows go by in order. The gradients of the two rows of logits that an output row lies between stay in
    registers, three for each cell; a row that no later output reaches is gathered from its cells and written. Queries
    without a target get zeros, those with several the sum in the order of the targets.

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

    m = tl.arange(0, BLOCK_M)  # [BLOCK_M]
    assigned = tl.load(assignment_ptr + first_pair + m, mask=m < M, other=-1)
    of_query = (assigned == query) & (tl.load(labels_ptr + image * M + m, mask=m < M, other=-1) >= 0)
    matches = tl.sum(of_query.to(tl.int32), 0)
    if matches == 0:
        for i in range(row_begin, row_end):
            zeros = tl.zeros([BLOCK_C], dtype=grad_ptr.dtype.element_ty)
            tl.store(grad_plane_ptr + tl.cast(i, tl.int64) * w + cell, zeros, mask=owned)
    else:
        start = _cell_start(cell, w, W)
        outputs = tl.where((cell >= 0) & (cell < w), _cell_start(cell + 1, w, W) - start, 0)
        first_target = tl.min(tl.where(of_query, m, BLOCK_M), 0)
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
        top = tl.maximum(row_begin - 1, 0)  # the row of logits that the upper sums belong to
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
                        target = tl.min(tl.where(of_query & (m > target), m, BLOCK_M), 0)
                        mask_slope, dice_outside, dice_inside = _pair_slopes(
                            first_pair + target, sums_ptr, grad_mask_ptr, grad_dice_ptr
                        )
                        # Read again, lest the terms of all pixels stay in registers for a second match: 226 of them.
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


def mask_loss_backward(
    grad_mask: Tensor,
    grad_dice: Tensor,
    sums: Tensor,
    mask_logits: Tensor,
    assignment: Tensor,
    labels: Tensor,
    masks: Tensor | None,
    segments: Tensor | None,
    valid: Tensor | None,
    void_value: int,
    ignore_void: bool,
    mask_term: str,
    alpha: float,
    gamma: float,
) -> Tensor:
    """``fastmask::mask_loss_backward``: the gradient; see ``empty_gradient`` for its layout."""
    mask_logits = with_contiguous_planes(mask_logits)
    grad = empty_gradient(mask_logits)
    if grad.numel() == 0:
        return grad
    if labels.shape[1] == 0:
        return grad.zero_()
    config = pick_config(CONFIGS, mask_logits.device)
    targets = target_arguments(masks, segments, valid, void_value, ignore_void)
    arguments = launch_arguments(config, mask_logits, assignment, labels, targets, mask_term, alpha, gamma, grad)
    h, w, cells = *mask_logits.shape[-2:], arguments["BLOCK_C"]
    halo = 0 if w <= cells else 1  # cells beyond both ends of a program's columns, whose outputs reach into them
    rows_per_split = min(config.backward_rows, h)
    _mask_loss_bwd_kernel[
        (mask_logits[..., 0, 0].numel(), triton.cdiv(w, cells - 2 * halo), triton.cdiv(h, rows_per_split))
    ](
        **arguments,
        grad_mask_ptr=grad_mask.contiguous(),
        grad_dice_ptr=grad_dice.contiguous(),
        sums_ptr=sums.contiguous(),
        rows_per_split=rows_per_split,
        HALO=halo,
        BLOCK_M=power_of_two(arguments["M"], 16, 1 << 30),
        maxnreg=255,  # or ptxas takes 168, so that twelve warps fit instead of eight, and spills
    )
    return grad
