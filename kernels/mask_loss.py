"""The mask and dice losses of the matched pairs, and their gradient.

Forward is one launch over the pixels and one that adds up their sums. If a gradient will be wanted, the first launch
also stores each pair's slopes at the resolution of the logits, three maps in float32; backward scales and adds them.

A thread owns one of the cells of ``_cells``. If the width of the targets is a whole multiple of four times that of the
logits, it reads four targets of a byte at once.

Time at B=16, L=6, M=20, 128 x 128 logits and 512 x 512 targets (503 M output pixels), on 132 SMs: three special
functions per pixel take 361 us; benchmarks/NOTES.md counts the instructions. The logits of all pairs are 63 MB, the
segment maps 4 MB, the slopes 377 MB.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask.kernels._cells import (
    _add_each_at,
    _between,
    _cell_start,
    _offset,
    _row_logits,
    _shared_slopes,
    _store_slopes,
)
from fastmask.kernels._common import (
    COMPILER_OPTIONS,
    _counted,
    _exp2,
    _log2,
    _plane,
    _reciprocal,
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

REGISTERS = 65_536  # of a multiprocessor
SLOPES = 3  # maps of a pair: of the mask loss, of all probabilities, of those in the target


@dataclass(frozen=True)
class MaskLossConfig:
    """Tuning of forward and backward.

    Args:
        cells: the most cells of a row that a program owns.
        cells_per_warp: the cells that one of its warps owns.
        outputs: the most outputs of a cell in a row for which the loop is unrolled.
        rows: the most rows of outputs of a row of cells for which it is.
        programs: the number of forward programs to reach by splitting the rows, if there are enough rows.
        min_rows: the fewest rows of logits per forward program.
        pixels: logits that a backward program writes at a time.
        blocks: how many times it does so.
    """

    cells: int = 512
    cells_per_warp: int = 32
    outputs: int = 8
    rows: int = 4
    programs: int = 2048
    min_rows: int = 8
    pixels: int = 1024
    blocks: int = 4


CONFIGS = {None: MaskLossConfig()}


@triton.jit
def _other_bytes(words, value):
    """Words of which a byte is 0 where it was the value; nowhere if that fits no byte."""
    words ^= (value & 255).to(tl.uint32) * 0x01010101
    return words | tl.where((value < 0) | (value > 255), 0x01010101, 0).to(tl.uint32)


@triton.jit
def _four_pixels(target_ptrs, valid_ptrs, target, void_value, HAS_SEGMENTS: tl.constexpr, HAS_VOID: tl.constexpr):
    """Two words of four pixels each: a byte of the first is 0 where a mask has no target, or where a segment is the
    target's; one of the second is 0 where a pixel does not count."""
    words = tl.load(target_ptrs).to(tl.uint32, bitcast=True)
    valid = words
    if HAS_SEGMENTS:
        if HAS_VOID:
            valid = _other_bytes(words, void_value)
            target = tl.where(target == void_value, -1, target)
        words = _other_bytes(words, target)
    elif HAS_VOID:
        valid = tl.load(valid_ptrs).to(tl.uint32, bitcast=True) * 255
        words &= valid
    return words, valid


@triton.jit
def _one_pixel(target_ptrs, valid_ptrs, inside, target, void_value, HAS_SEGMENTS: tl.constexpr,
               HAS_VOID: tl.constexpr):  # fmt: skip
    """Whether pixels belong to the target, and whether they count."""
    counted, segment = _counted(target_ptrs, valid_ptrs, inside, void_value, HAS_SEGMENTS, HAS_VOID)
    belongs = segment == target if HAS_SEGMENTS else tl.load(target_ptrs, mask=counted, other=0) != 0
    return belongs & counted, counted


@triton.jit
def _pixel_terms(u, belongs, alpha, gamma, FOCAL: tl.constexpr, SQUARE: tl.constexpr):
    """Of pixels whose logits, of the wrong sign if they belong to the target, are u log(2): p_t, 1 - p_t, the loss
    divided by log(2), and its slope along the logit. The loss of pixels that belong may be negative.

    With q = 1 - p_t: the loss alpha_t q^gamma (-log p_t) (RetinaNet, arXiv:1708.02002, equation 5) grows by
    alpha_t q^gamma (gamma p_t (-log p_t) + q) with u log(2), and -log p_t by q.

    The special-function unit's logarithm is off by 2^-22, which is too much of small losses: -log2 p_t = log2(1 + e)
    is e times a polynomial for e < 3/16, with a relative error of 5e-8 before rounding.
    """
    # Bounded, so that 1 + e is finite, and its reciprocal no number that the unit takes for 0.
    e = _exp2(tl.minimum(u, 120.0, propagate_nan=tl.PropagateNan.ALL))
    p = _reciprocal(1.0 + e)
    q = e * p
    y = e * 0.200081959 - 0.347344339
    y = y * e + 0.480042279
    y = y * e - 0.721327901
    y = y * e + 1.44269478
    cross_entropy = tl.where(e < 0.1875, y * e, tl.maximum(u, _log2(1.0 + e)))
    if FOCAL:
        # Bounded, because infinity * 0 would be NaN where gamma is 0.
        power = q * q if SQUARE else _exp2(tl.maximum(_log2(q), -1e30) * gamma)
        power *= tl.where(belongs, -alpha, 1.0 - alpha)
        loss = power * cross_entropy
        return p, q, loss, loss * p * (gamma * 0.693147181) + power * q
    return p, q, cross_entropy, tl.where(belongs, -q, q)


@triton.jit
def _row_sums(
    y_logits, target_ptrs, valid_ptrs, start, outputs, cell, target, void_value, w, W, half_step_x, chunks, alpha,
    gamma, none, sums, FOCAL: tl.constexpr, SQUARE: tl.constexpr, HAS_SEGMENTS: tl.constexpr, HAS_VOID: tl.constexpr,
    KEEP_SLOPES: tl.constexpr, COLUMNS: tl.constexpr, WORDS: tl.constexpr, ONE_CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Adds a row of outputs, given the logits before, at and after its cells, to sums over each cell: the loss divided
    by log(2), p t, the error p (1 - t) + (1 - p) t, t, and pixels that count. Returns these and three sums of slopes,
    by the logits of ``_add_at``: of the loss, of p, and of p t."""
    before, middle, after = y_logits
    loss_sum, intersection, error, target_pixels, counted_pixels = sums
    slopes = ((none, none, none), (none, none, none), (none, none, none))
    words, valid = outputs.to(tl.uint32), outputs.to(tl.uint32)  # of their type
    for chunk in range(1 if ONE_CHUNK else chunks):
        for i in tl.static_range(BLOCK_K):
            if WORDS:
                if i % 4 == 0:
                    words, valid = _four_pixels(
                        target_ptrs + i // 4, valid_ptrs + i // 4, target, void_value, HAS_SEGMENTS, HAS_VOID
                    )
                byte = words & (255 << i % 4 * 8)
                belongs = byte == 0 if HAS_SEGMENTS else byte != 0
                counted = (valid & (255 << i % 4 * 8)) != 0
                offset = tl.cast(2.0 * i + 1.0 - COLUMNS, tl.float32)
            else:
                k = chunk * BLOCK_K + i
                belongs, counted = _one_pixel(
                    target_ptrs + k, valid_ptrs + k, k < outputs, target, void_value, HAS_SEGMENTS, HAS_VOID
                )
                offset = tl.cast(2.0 * i + 1.0 - COLUMNS, tl.float32) if COLUMNS > 0 else _offset(start + k, cell, w, W)
            u = _between(offset, half_step_x, before, middle, after)
            u = tl.where(belongs, -u, u)
            if HAS_VOID or not WORDS:
                u = tl.where(counted, u, -1e30)  # where the loss, its slope and 1 - p_t are 0
            p, q, loss, slope = _pixel_terms(u, belongs, alpha, gamma, FOCAL, SQUARE)
            t = tl.where(belongs, 1.0, 0.0)
            loss_sum += tl.abs(loss)
            intersection += t * p
            error += q
            target_pixels += t
            if HAS_VOID:
                counted_pixels += tl.where(counted, 1.0, 0.0)
            if KEEP_SLOPES:
                slopes = _add_each_at(offset, (slope, p * q, t * (p * q)), slopes)
    return (loss_sum, intersection, error, target_pixels, counted_pixels), slopes


@kernel
def _mask_loss_fwd_kernel(
    logits_ptr, stride_l, stride_b, stride_n, assignment_ptr, labels_ptr,
    target_ptr, valid_ptr, void_value, sums_ptr, slopes_ptr,
    B, N, M, h, w, H, W, rows_per_split, chunks, alpha, gamma,
    FOCAL: tl.constexpr, SQUARE: tl.constexpr, HAS_SEGMENTS: tl.constexpr, HAS_VOID: tl.constexpr,
    KEEP_SLOPES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WORDS: tl.constexpr,
    ONE_CHUNK: tl.constexpr, UNIT: tl.constexpr, HALO: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sums over the outputs of some rows and columns of one pair's cells, in parts that ``_mask_loss_reduce_kernel``
    adds: the loss, sum p t, sum p, sum t and the number of counted pixels.

    With KEEP_SLOPES also, for each logit, three sums over the outputs in which it has a share, times this share: of the
    loss's slope, of p (1 - p) and of t p (1 - p). For these a program also visits the cells around its own.

        logits      (L, B, N, h, w), strides and w in units
        assignment  (L, B, M), labels (B, M)
        target      (B, H, W) segments or (B, M, H, W) masks;  valid  (B, H, W); with WORDS, of four pixels each
        sums        (L * B * M, parts, 5), slopes (L * B * M, 3, h, w); not written for targets without a query
        ROWS        H / h if it is a small whole number, else 0; COLUMNS the same for W / w
    """
    alpha = tl.cast(alpha, tl.float32)
    gamma = tl.cast(gamma, tl.float32)
    w = w * UNIT
    pair = tl.program_id(0).to(tl.int64)
    image, target, query, matched = _matched_query(assignment_ptr, labels_ptr, pair, B, N, M)
    if matched:
        plane_ptr = _plane(logits_ptr, pair // M // B, image, query, stride_l, stride_b, stride_n, UNIT)
        row_begin = tl.program_id(2) * rows_per_split
        row_end = tl.minimum(row_begin + rows_per_split, h)
        lane = tl.arange(0, BLOCK_C)
        cell = tl.program_id(1) * (BLOCK_C - 2 * HALO) - HALO + lane  # [BLOCK_C]
        owned = (lane >= HALO) & (lane < BLOCK_C - HALO) & (cell < w)
        cell = tl.minimum(tl.maximum(cell, 0), w - 1)  # beyond the edges, others repeat what the last ones do
        start, outputs = cell * COLUMNS, tl.zeros([BLOCK_C], dtype=tl.int32) + COLUMNS
        if COLUMNS == 0:
            start = _cell_start(cell, w, W)
            outputs = _cell_start(cell + 1, w, W) - start
        half_step_y = 0.5 / (H.to(tl.float32) if ROWS == 0 else ROWS)
        half_step_x = 0.5 / (W.to(tl.float32) if COLUMNS == 0 else COLUMNS)

        pitch = w * (COLUMNS // 4) if WORDS else W
        plane = tl.cast(H, tl.int64) * pitch
        first_output = cell * (COLUMNS // 4) if WORDS else start
        target_ptrs = target_ptr + (image if HAS_SEGMENTS else image * M + target) * plane + first_output
        valid_ptrs = target_ptrs
        if HAS_VOID and not HAS_SEGMENTS:
            valid_ptrs = valid_ptr + image * plane + first_output

        none = tl.zeros([BLOCK_C], dtype=tl.float32) * -1.0  # -0.0 + x is x for the compiler, too; 0.0 + x is not
        losses, intersections, errors = none, none, none
        target_pixels = tl.zeros([BLOCK_C], dtype=tl.int32)
        counted_pixels = tl.zeros([BLOCK_C], dtype=tl.int32)
        first, last = row_begin, row_end
        no_slopes = ((none, none, none), (none, none, none), (none, none, none))
        previous, current = no_slopes, no_slopes
        slope_ptrs = slopes_ptr
        if KEEP_SLOPES:
            first, last = tl.maximum(row_begin - 1, 0), tl.minimum(row_end + 1, h)
            slope_ptrs += pair * 3 * h * w + cell
            to_left, to_right = tl.where(cell == 0, 0.0, half_step_x), tl.where(cell == w - 1, 0.0, half_step_x)

        upper = _row_logits(plane_ptr, first - 1, cell, h, w)
        middle = _row_logits(plane_ptr, first, cell, h, w)
        for row in range(first, last):
            lower = _row_logits(plane_ptr, row + 1, cell, h, w)
            cells = (no_slopes, no_slopes, no_slopes)
            y_begin = row * ROWS if ROWS > 0 else _cell_start(row, h, H)
            for step in range(1 if ROWS > 0 else _cell_start(row + 1, h, H) - y_begin):
                # Rows are summed separately, so that fewer roundings have the magnitude of the total.
                sums = (none, none, none, none, none)
                for j in tl.static_range(ROWS if ROWS > 0 else 1):
                    y = y_begin + step + j
                    offset = tl.cast(2.0 * j + 1.0 - ROWS, tl.float32) if ROWS > 0 else _offset(y, row, h, H)
                    y_before = _between(offset, half_step_y, upper[0], middle[0], lower[0])
                    y_middle = _between(offset, half_step_y, upper[1], middle[1], lower[1])
                    y_after = _between(offset, half_step_y, upper[2], middle[2], lower[2])
                    sums, slopes = _row_sums(
                        (y_before, y_middle, y_after), target_ptrs + y * pitch, valid_ptrs + y * pitch, start, outputs,
                        cell, target, void_value, w, W, half_step_x, chunks, alpha, gamma, none, sums,
                        FOCAL, SQUARE, HAS_SEGMENTS, HAS_VOID, KEEP_SLOPES, COLUMNS, WORDS, ONE_CHUNK, BLOCK_K,
                    )  # fmt: skip
                    if KEEP_SLOPES:
                        cells = (
                            _add_each_at(offset, slopes[0], cells[0]),
                            _add_each_at(offset, slopes[1], cells[1]),
                            _add_each_at(offset, slopes[2], cells[2]),
                        )
                own = (row >= row_begin) & (row < row_end) if KEEP_SLOPES else True
                losses += tl.where(own, sums[0], 0.0)
                intersections += tl.where(own, sums[1], 0.0)
                errors += tl.where(own, sums[2], 0.0)
                target_pixels += tl.where(own, sums[3], 0.0).to(tl.int32)
                if HAS_VOID:
                    counted_pixels += tl.where(own, sums[4], 0.0).to(tl.int32)
            upper, middle = middle, lower
            if KEEP_SLOPES:
                to_upper = tl.where(row == 0, 0.0, half_step_y)
                to_lower = tl.where(row == h - 1, 0.0, half_step_y)
                complete, previous, current = _shared_slopes(cells, half_step_y, to_upper, to_lower, previous, current)
                stored = row > tl.where(owned, row_begin, h)
                _store_slopes(slope_ptrs + (row - 1) * w, h * w, complete, lane, to_left, to_right, stored, BLOCK_C)
        if KEEP_SLOPES:
            stored = tl.where(owned, row_end, 0) == h
            _store_slopes(slope_ptrs + (h - 1) * w, h * w, previous, lane, to_left, to_right, stored, BLOCK_C)

        parts = tl.num_programs(1) * tl.num_programs(2)
        part_ptr = sums_ptr + (pair * parts + tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * 5
        loss = tl.sum(tl.where(owned, losses, 0.0), 0) * 0.693147181
        intersection = tl.sum(tl.where(owned, intersections, 0.0), 0)
        error = tl.sum(tl.where(owned, errors, 0.0), 0)  # sum p (1 - t) + (1 - p) t
        target_area = tl.sum(tl.where(owned, target_pixels, 0), 0).to(tl.float32)
        if not HAS_VOID:
            own_rows = _cell_start(row_end, h, H) - _cell_start(row_begin, h, H)
            counted_pixels = outputs * own_rows
        counted_area = tl.sum(tl.where(owned, counted_pixels, 0), 0).to(tl.float32)
        prediction = error - (target_area - intersection) + intersection
        _store_part(part_ptr, loss, intersection, prediction, target_area, counted_area)


def whole_ratio(size: int, logits: int, most: int) -> int:
    """``size / logits`` if that is a whole number of at most ``most``, else 0."""
    ratio, rest = divmod(size, logits)
    return ratio if rest == 0 and ratio <= most else 0


class ForwardPlan(NamedTuple):
    """The launches for some sizes, and the shapes of the memory for parts of the sums and for slopes."""

    parts: tuple[int, ...]
    slopes: tuple[int, ...]
    forward: Launch
    reduction: Launch


@cached_plan
def plan_forward(
    device: torch.device, config: MaskLossConfig, sizes: PairSizes, words: bool, keep_slopes: bool
) -> ForwardPlan:
    """With ``words``, four targets are read at once."""
    layers, batch, _, h, w = sizes.shape
    targets, pairs = sizes.targets, sizes.pairs
    check_positions(targets, SLOPES * h * w)
    arguments = sizes.arguments(w)
    rows, columns = whole_ratio(targets.H, h, config.rows), whole_ratio(targets.W, w, config.outputs)
    outputs = ceil_div(targets.W, w)  # the most outputs per cell
    block_outputs = columns or power_of_two(outputs, 1, config.outputs)
    cells = power_of_two(w, 32, config.cells)
    warps = max(1, cells // config.cells_per_warp)
    halo = 1 if keep_slopes and w > cells else 0  # cells at both ends of a program's columns, which share outputs
    column_blocks = ceil_div(w, cells - 2 * halo)
    splits = config.programs // max(pairs * column_blocks, 1)
    splits = max(1, min(splits, ceil_div(h, config.min_rows)))
    rows_per_split = ceil_div(h, splits)
    splits = ceil_div(h, rows_per_split)
    parts = splits * column_blocks
    forward = _mask_loss_fwd_kernel.plan(
        (pairs, column_blocks, splits),
        **arguments | {"w": w // arguments["UNIT"]},
        rows_per_split=rows_per_split,
        chunks=ceil_div(outputs, block_outputs),
        KEEP_SLOPES=keep_slopes,
        ROWS=rows,
        COLUMNS=columns,
        WORDS=words,
        ONE_CHUNK=outputs <= block_outputs,
        HALO=halo,
        BLOCK_C=cells,
        BLOCK_K=block_outputs,
        num_warps=warps,
        # Otherwise ptxas takes 168, so that twelve warps fit a multiprocessor, and spills if pixels may be void.
        maxnreg=min(255, REGISTERS // (32 * warps)) if keep_slopes and targets.HAS_VOID else None,
    )
    slopes = (layers, batch, sizes.num_targets, SLOPES, h, w) if keep_slopes else (0,)
    return ForwardPlan((pairs, parts, 5), slopes, forward, plan_reduction(sizes, parts))


def reads_words(tensors: dict[str, Tensor | None], config: MaskLossConfig, sizes: PairSizes) -> bool:
    """Whether the targets are bytes that can be read four at a time; views them so."""
    columns = whole_ratio(sizes.targets.W, sizes.shape[-1], config.outputs)
    planes = {name: tensors[name] for name in ("target_ptr", "valid_ptr") if tensors[name] is not None}
    words = columns % 4 == 0 < columns and planes["target_ptr"].dtype == torch.uint8
    if words := words and all(plane.data_ptr() % 4 == 0 for plane in planes.values()):
        tensors |= {name: plane.view(torch.int32) for name, plane in planes.items()}
    return words


def launch_forward(
    mask_logits: Tensor, assignment: Tensor, *inputs: Any, keep_slopes: bool
) -> tuple[ForwardPlan, dict[str, Tensor | None], Tensor, Tensor]:
    """Returns the plan, the tensors that it read, the parts of the sums, and the slopes, or none."""
    device = mask_logits.device
    config = pick_config(CONFIGS, device)
    tensors, sizes = pairs_of(with_contiguous_planes(mask_logits), assignment, *inputs)
    words = reads_words(tensors, config, sizes)
    steps = plan_forward(device, config, sizes, words, keep_slopes)
    parts = torch.empty(steps.parts, dtype=torch.float32, device=device)
    slopes = parts.new_empty(steps.slopes)
    if steps.parts[0] > 0:
        steps.forward(**tensors, sums_ptr=parts, slopes_ptr=slopes if keep_slopes else None)
    return steps, tensors, parts, slopes


def mask_loss(mask_logits: Tensor, assignment: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``fastmask::mask_loss``: both losses (L, B, M), the sums (L, B, M, 4) and, if they are to be kept, the slopes
    (L, B, M, 3, h, w) for backward."""
    *inputs, keep_slopes = inputs
    steps, tensors, parts, slopes = launch_forward(mask_logits, assignment, *inputs, keep_slopes=keep_slopes)
    return *add_parts(steps.reduction, tensors["assignment_ptr"], tensors["labels_ptr"], parts), slopes


@triton.jit
def _pair_slopes(pair, sums_ptr, grad_mask_ptr, grad_dice_ptr):
    """The factors of a pair's three maps: grad_mask / pixels, and, with U = sum p + sum t + 1 and I = 2 sum p t + 1,
    grad_dice times the two terms of d dice / dp = I / U^2 - t 2 / U. Float64 is cheap, once for thousands of pixels."""
    intersection = tl.load(sums_ptr + pair * 4).to(tl.float64)
    prediction = tl.load(sums_ptr + pair * 4 + 1).to(tl.float64)
    target = tl.load(sums_ptr + pair * 4 + 2).to(tl.float64)
    pixels = tl.maximum(tl.load(sums_ptr + pair * 4 + 3).to(tl.float64), 1.0)
    inverse = 1.0 / (prediction + target + 1.0)
    mask = tl.load(grad_mask_ptr + pair).to(tl.float64) / pixels
    dice = tl.load(grad_dice_ptr + pair).to(tl.float64) * inverse
    return (
        mask.to(tl.float32),
        (dice * (2.0 * intersection + 1.0) * inverse).to(tl.float32),
        (-2.0 * dice).to(tl.float32),
    )


@kernel
def _mask_loss_bwd_kernel(
    grad_ptr, stride_l, stride_b, stride_n, slopes_ptr, grad_mask_ptr, grad_dice_ptr, sums_ptr, assignment_ptr,
    labels_ptr, B, N, M, pixels,
    UNIT: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Gradient of sum grad_mask mask + grad_dice dice with respect to some logits of one query: the sum over its
    targets, in their order, of the slopes times the factors of ``_pair_slopes``; zeros for a query without a target.

        grad                  (L, B, N, pixels), strides and pixels in units
        slopes                (L, B, M, 3, pixels), sums (L, B, M, 4), of forward
        grad_mask, grad_dice  (L, B, M)
        assignment            (L, B, M), labels (B, M)
    """
    pixels = pixels * UNIT
    row = tl.program_id(0).to(tl.int64)
    query = row % N
    layer_image = row // N
    image = layer_image % B
    grad_plane_ptr = _plane(grad_ptr, layer_image // B, image, query, stride_l, stride_b, stride_n, UNIT)
    of_query, matches = _targets_of_query(assignment_ptr, labels_ptr, layer_image * M, image, query, M, BLOCK_M)
    for block in range(BLOCKS):
        pixel = (tl.program_id(1) * BLOCKS + block) * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
        grad = tl.zeros([BLOCK_P], dtype=tl.float32)
        target = -1
        for _ in range(matches):
            target = _next_target(of_query, target, BLOCK_M)
            pair = layer_image * M + target
            of_loss, of_all, of_target = _pair_slopes(pair, sums_ptr, grad_mask_ptr, grad_dice_ptr)
            ptrs = slopes_ptr + pair * 3 * pixels + pixel
            grad += of_loss * tl.load(ptrs, mask=pixel < pixels, other=0.0)
            grad += of_all * tl.load(ptrs + pixels, mask=pixel < pixels, other=0.0)
            grad += of_target * tl.load(ptrs + 2 * pixels, mask=pixel < pixels, other=0.0)
        tl.store(grad_plane_ptr + pixel, grad.to(grad_ptr.dtype.element_ty), mask=pixel < pixels)


@cached_plan
def plan_backward(
    device: torch.device, config: MaskLossConfig, grad: tuple[int, ...], strides: tuple[int, ...], num_targets: int
) -> Launch:
    layers, batch, queries, h, w = grad
    planes = plane_sizes(grad, strides)
    return _mask_loss_bwd_kernel.plan(
        (layers * batch * queries, ceil_div(h * w, config.pixels * config.blocks)),
        **planes,
        B=batch,
        N=queries,
        M=num_targets,
        pixels=h * w // planes["UNIT"],
        BLOCKS=config.blocks,
        BLOCK_P=config.pixels,
        BLOCK_M=power_of_two(num_targets, 16, 1 << 30),
        num_warps=4,
        **COMPILER_OPTIONS,
    )


@gradient_of_pairs
def mask_loss_backward(
    grad: Tensor, of_pairs: dict[str, Tensor], slopes: Tensor, mask_logits: Tensor, assignment: Tensor, *inputs: Any
) -> None:
    """``fastmask::mask_loss_backward``; computes slopes again that forward did not keep."""
    if slopes.numel() == 0:
        *_, slopes = launch_forward(mask_logits, assignment, *inputs, keep_slopes=True)
    labels, *_ = inputs
    config = pick_config(CONFIGS, grad.device)
    launch = plan_backward(grad.device, config, grad.shape, grad.stride(), labels.shape[1])
    launch(
        grad_ptr=grad,
        **of_pairs,
        slopes_ptr=slopes,
        assignment_ptr=assignment.contiguous(),
        labels_ptr=labels.contiguous(),
    )
