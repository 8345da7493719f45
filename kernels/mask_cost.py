"""The matching cost of every query against every target: three launches for all layers and images.

The first brings targets to the grid of the logits, a bit each, once for all layers; the second reads the logits; the
third adds the splits of the pixels in their order. Where the time of the second goes, at B=16, L=6, N=100, 128 x 128
bf16 logits and M=20 (157 M logits: 315 MB, 75 us at 4.2 TB/s; 168 M with the padding of L * N = 600 rows to 640):

- special functions: three a logit, exponential, reciprocal and logarithm, 113 us on 132 SMs at 16 lanes a clock. A
  polynomial in the logarithm's place would take 38 us from them and add 40 us of instructions;
- instructions: 38 a logit in the machine code for sm_90, 190 us at 128 lanes a clock: issue slots are what binds;
- tensor cores: three products with 0/1 targets padded to 32, each of two tf32 parts, 64 GFLOP, 130 us at the peak of
  tf32, beside the other instructions. The parts high + low hold 22 bits of a float32, and the targets are exact. fp16
  parts would halve that, but end at 65504 and cost one instruction more for each value, where instructions bind.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask.kernels._common import (
    COMPILER_OPTIONS,
    _counted,
    _focal_of_magnitude,
    _plane,
    _sigmoid_of_magnitude,
    kernel,
    pick_config,
    plane_arguments,
    power_of_two,
    target_arguments,
    with_contiguous_rows,
)
from fastmask.kernels._layout import with_contiguous_planes


@dataclass(frozen=True)
class MaskCostConfig:
    """Tuning of the kernels.

    Args:
        rows: of logits (layers and queries of one image) that a program reads.
        pixels: that it reads at a time.
        programs: how many to split the pixels into, if there are enough of them.
        least_pixels: of a split, a multiple of the other numbers of pixels.
        target_pixels: that a program of the targets' kernel reads at a time.
        reduce_rows: that a program of the last kernel sums.
    """

    rows: int = 64
    pixels: int = 32
    programs: int = 2048
    least_pixels: int = 256
    target_pixels: int = 128
    reduce_rows: int = 16
    num_warps: int = 4
    num_stages: int = 3


_ONE_STAGE = MaskCostConfig(num_stages=1)
# More stages for sm_100 do not end in an emulator under Triton 3.6 (no card has run them); for sm_120 three spill.
CONFIGS = {10: _ONE_STAGE, 12: _ONE_STAGE, None: MaskCostConfig()}


@triton.jit
def _pair_sums(values, t):
    """``[R, C]`` float32 times ``[C, M]`` of zeros and ones, both parts of each value in tf32.

    The caller adds the result of each block to its sums: in the tensor core's own accumulator every step would
    truncate, and over thousands of pixels that is a bias of 1e-5.
    """
    high = (values.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    low_sums = tl.dot(values - high, t, input_precision="tf32")
    return tl.dot(high, t, low_sums, input_precision="tf32")


@kernel
def _mask_cost_targets_kernel(
    target_ptr, valid_ptr, void_value, words_ptr, areas_ptr,
    B, M, h, w, H, W, scale_y, scale_x, pixels_per_split,
    HAS_SEGMENTS: tl.constexpr, HAS_VOID: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Targets at the h x w grid of the logits, one bit each: ``_mask_cost_fwd_kernel`` reads them for every row.

    words  (B, blocks of BLOCK_M - 1 targets, h * w); the last bit marks pixels that count
    areas  (splits, B, blocks, BLOCK_M), how many pixels have each bit
    """
    scale_y = tl.cast(scale_y, tl.float32)
    scale_x = tl.cast(scale_x, tl.float32)
    image = tl.program_id(0).to(tl.int64)
    blocks = tl.num_programs(1)
    image_block = image * blocks + tl.program_id(1)
    bits = tl.arange(0, BLOCK_M)  # [BLOCK_M]
    targets = tl.program_id(1) * (BLOCK_M - 1) + bits
    plane = tl.cast(H, tl.int64) * W
    mask_ptrs = target_ptr + (image * M + targets) * plane
    area = tl.zeros([BLOCK_M], dtype=tl.int32)
    begin = tl.program_id(2) * pixels_per_split
    for block in range(begin, begin + pixels_per_split, BLOCK_C):
        c = block + tl.arange(0, BLOCK_C)  # [BLOCK_C]
        inside = c < h * w
        # PyTorch's "nearest" rule, in float32: floor(i * in / out).
        y_target = tl.minimum(((c // w).to(tl.float32) * scale_y).to(tl.int32), H - 1)
        x_target = tl.minimum(((c % w).to(tl.float32) * scale_x).to(tl.int32), W - 1)
        pixels = y_target * W + x_target
        segment_ptrs = target_ptr + image * plane + pixels
        valid_ptrs = segment_ptrs
        if HAS_VOID and not HAS_SEGMENTS:
            valid_ptrs = valid_ptr + image * plane + pixels
        counted, segment = _counted(segment_ptrs, valid_ptrs, inside, void_value, HAS_SEGMENTS, HAS_VOID)
        of_target = counted[:, None] & ((bits < BLOCK_M - 1) & (targets < M))[None, :]  # [BLOCK_C, BLOCK_M]
        if HAS_SEGMENTS:
            belongs = of_target & (segment[:, None] == targets[None, :])
        else:
            belongs = tl.load(mask_ptrs[None, :] + pixels[:, None], mask=of_target, other=0) != 0
        belongs = belongs | (counted[:, None] & (bits == BLOCK_M - 1)[None, :])
        area += tl.sum(belongs.to(tl.int32), 0)
        word = tl.sum(belongs.to(words_ptr.dtype.element_ty) << bits[None, :], 1)
        tl.store(words_ptr + image_block * h * w + c, word, mask=inside)
    split_image = tl.program_id(2).to(tl.int64) * B + image
    tl.store(areas_ptr + (split_image * blocks + tl.program_id(1)) * BLOCK_M + bits, area.to(tl.float32))


@kernel
def _mask_cost_fwd_kernel(
    logits_ptr, stride_l, stride_b, stride_n, words_ptr, sums_ptr,
    B, N, R, P, blocks_per_split, row_blocks, alpha, gamma,
    FOCAL: tl.constexpr, SQUARE: tl.constexpr, HAS_VOID: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Sums over one split of the P = h * w pixels c, for R = L * N rows of one image and a block of its targets m:

        sums[0] = sum_c p[c] T[c, m]
        sums[1] = sum_c F+[c] T[c, m] + F-[c] (1 - T[c, m])

    with F+ = alpha (1-p)^gamma softplus(-x) and F- = (1-alpha) p^gamma softplus(x) (RetinaNet, arXiv:1708.02002,
    equation 5), or both without their weights. T is one at every counted pixel in the last column, for sum_c p[c].
    Products with T and with 1 - T leave nothing to cancel.

        logits  (L, B, N, P), strides and P in units
        words   (B, blocks, P), see ``_mask_cost_targets_kernel``
        sums    (splits, 2, B, blocks, R, BLOCK_M)
    """
    alpha = tl.cast(alpha, tl.float32)
    gamma = tl.cast(gamma, tl.float32)
    image = (tl.program_id(0) // row_blocks).to(tl.int64)
    rows = (tl.program_id(0) % row_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    image_block = image * tl.num_programs(1) + tl.program_id(1)
    bits = tl.arange(0, BLOCK_M)  # [BLOCK_M]
    row_ptrs = _plane(logits_ptr, rows // N, image, rows % N, stride_l, stride_b, stride_n, UNIT)
    P = P * UNIT
    word_ptrs = words_ptr + image_block * P

    probability = tl.zeros([BLOCK_R, BLOCK_M], dtype=tl.float32)
    loss = tl.zeros([BLOCK_R, BLOCK_M], dtype=tl.float32)
    begin = tl.program_id(2) * blocks_per_split
    for block in range(begin, begin + blocks_per_split):
        c = block * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
        x = tl.load(row_ptrs[:, None] + c[None, :], mask=(rows < R)[:, None] & (c < P)[None, :], other=0.0)
        x = x.to(tl.float32)
        word = tl.load(word_ptrs + c, mask=c < P, other=0)
        if HAS_VOID:
            x = tl.where((word >> (BLOCK_M - 1) != 0)[None, :], x, 0.0)  # a logit that does not count may be NaN
        t = tl.where(((word[:, None] >> bits[None, :]) & 1) != 0, 1.0, 0.0)  # [BLOCK_C, BLOCK_M]
        not_t = tl.where((word >> (BLOCK_M - 1) != 0)[:, None], 1.0 - t, 0.0)

        negative = x < 0.0
        magnitude = tl.abs(x)
        if FOCAL:
            large, small, right, wrong = _focal_of_magnitude(magnitude, gamma, SQUARE)
        else:
            large, small, right = _sigmoid_of_magnitude(magnitude, RELATIVE=False)
            wrong = magnitude + right
        probability += _pair_sums(tl.where(negative, small, large), t)
        foreground = _pair_sums(tl.where(negative, wrong, right), t)
        background = _pair_sums(tl.where(negative, right, wrong), not_t)
        if FOCAL:
            loss += (alpha * 0.693147181) * foreground
            loss += ((1.0 - alpha) * 0.693147181) * background
        else:
            loss += foreground
            loss += background

    block_size = tl.cast(R, tl.int64) * BLOCK_M
    of_split = tl.program_id(2).to(tl.int64) * 2 * tl.num_programs(1) * B
    at = rows.to(tl.int64)[:, None] * BLOCK_M + bits[None, :]
    tl.store(sums_ptr + (of_split + image_block) * block_size + at, probability, mask=(rows < R)[:, None])
    of_loss = of_split + tl.cast(B, tl.int64) * tl.num_programs(1)
    tl.store(sums_ptr + (of_loss + image_block) * block_size + at, loss, mask=(rows < R)[:, None])


@kernel
def _mask_cost_reduce_kernel(
    class_ptr, stride_l, stride_b, stride_n, labels_ptr, sums_ptr, areas_ptr, cost_ptr,
    B, N, M, R, K, splits, blocks, row_blocks, cost_class, cost_mask, cost_dice,
    BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """cost = -cost_class softmax(class_logits)[label] + cost_mask sums[1] / pixels + cost_dice dice, with
    dice = 1 - (2 sum_c p T + 1) / (sum_c p + sum_c T + 1) (V-Net, arXiv:1606.04797), the splits in their order.

        class_logits  (L, B, N, K), rows contiguous, the last class being no-object
        cost          (L, B, N, M); 0 where labels are -1, NaN where they are no class
    """
    image = (tl.program_id(0) // row_blocks).to(tl.int64)
    rows = (tl.program_id(0) % row_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    present = (rows < R)[:, None]
    layer = (rows // N).to(tl.int64)
    query = (rows % N).to(tl.int64)
    class_ptrs = (class_ptr + image * stride_b + layer * stride_l + query * stride_n)[:, None]  # [BLOCK_R, 1]
    # Reduced after the loops, not within: that is less work, and Triton up to 3.8 fails on a reduction within of as
    # many columns as another tensor of the same layout has.
    k = tl.arange(0, BLOCK_K)[None, :]
    largest = tl.full([BLOCK_R, BLOCK_K], float("-inf"), dtype=tl.float32)
    for block in range(0, K, BLOCK_K):
        x = tl.load(class_ptrs + (block + k), mask=present & (block + k < K), other=float("-inf"))
        largest = tl.maximum(largest, x.to(tl.float32))
    maximum = tl.max(largest, 1)
    totals = tl.zeros([BLOCK_R, BLOCK_K], dtype=tl.float32)
    for block in range(0, K, BLOCK_K):
        x = tl.load(class_ptrs + (block + k), mask=present & (block + k < K), other=float("-inf"))
        totals += tl.exp2((x.to(tl.float32) - maximum[:, None]) * 1.4426950408889634)
    total = tl.sum(totals, 1)

    image_block = image * blocks + tl.program_id(1)
    image_blocks = tl.cast(B, tl.int64) * blocks
    bits = tl.arange(0, BLOCK_M)  # [BLOCK_M]
    m = tl.program_id(1) * (BLOCK_M - 1) + bits
    wanted = present & ((bits < BLOCK_M - 1) & (m < M))[None, :]
    intersection = tl.zeros([BLOCK_R, BLOCK_M], dtype=tl.float64)
    loss = tl.zeros([BLOCK_R, BLOCK_M], dtype=tl.float64)
    all_probability = tl.zeros([BLOCK_R], dtype=tl.float64)
    area = tl.zeros([BLOCK_M], dtype=tl.float64)
    pixels = tl.zeros([], dtype=tl.float64)
    for split in range(splits):
        of_split = (split * 2 * image_blocks + image_block) * R
        at = (of_split + rows)[:, None] * BLOCK_M + bits[None, :]
        intersection += tl.load(sums_ptr + at, mask=wanted, other=0.0)
        loss += tl.load(sums_ptr + image_blocks * R * BLOCK_M + at, mask=wanted, other=0.0)
        all_probability += tl.load(sums_ptr + (of_split + rows + 1) * BLOCK_M - 1, mask=rows < R, other=0.0)
        area_ptrs = areas_ptr + (split * image_blocks + image_block) * BLOCK_M
        area += tl.load(area_ptrs + bits)
        pixels += tl.load(area_ptrs + BLOCK_M - 1)
    label = tl.load(labels_ptr + image * M + m, mask=(bits < BLOCK_M - 1) & (m < M), other=-1)[None, :]  # [1, BLOCK_M]
    known = (label >= 0) & (label < K)
    x = tl.load(class_ptrs + label, mask=wanted & known, other=float("nan")).to(tl.float32)
    probability = tl.exp2((x - maximum[:, None]) * 1.4426950408889634) / total[:, None]
    dice = 1.0 - (2.0 * intersection + 1.0) / (all_probability[:, None] + area[None, :] + 1.0)
    cost = cost_mask * (loss / tl.maximum(pixels, 1.0)) + cost_dice * dice - cost_class * probability
    cost = tl.where(label < 0, 0.0, cost).to(tl.float32)
    row = (layer * B + image) * N + query
    tl.store(cost_ptr + row[:, None] * M + m[None, :], cost, mask=wanted)


def add_up(
    config: MaskCostConfig,
    class_logits: Tensor,
    labels: Tensor,
    sums: Tensor,
    areas: Tensor,
    cost: Tensor,
    cost_class: float,
    cost_mask: float,
    cost_dice: float,
) -> None:
    """Writes ``cost`` (L, B, N, M) from the class logits and the sums (splits, 2, B, blocks, L * N, BLOCK_M)."""
    _, batch, queries, num_targets = cost.shape
    splits, _, _, blocks, rows, block_targets = sums.shape
    row_blocks = triton.cdiv(rows, config.reduce_rows)
    class_logits = with_contiguous_rows(class_logits)
    _mask_cost_reduce_kernel[(batch * row_blocks, blocks)](
        class_ptr=class_logits,
        stride_l=class_logits.stride(0),
        stride_b=class_logits.stride(1),
        stride_n=class_logits.stride(2),
        labels_ptr=labels.contiguous(),
        sums_ptr=sums,
        areas_ptr=areas,
        cost_ptr=cost,
        B=batch,
        N=queries,
        M=num_targets,
        R=rows,
        K=class_logits.shape[-1],
        splits=splits,
        blocks=blocks,
        row_blocks=row_blocks,
        cost_class=cost_class,
        cost_mask=cost_mask,
        cost_dice=cost_dice,
        BLOCK_R=config.reduce_rows,
        BLOCK_M=block_targets,
        BLOCK_K=power_of_two(class_logits.shape[-1], 16, 128),
        num_warps=4,
        **COMPILER_OPTIONS,
    )


def mask_cost(
    class_logits: Tensor,
    mask_logits: Tensor,
    labels: Tensor,
    masks: Tensor | None,
    segments: Tensor | None,
    valid: Tensor | None,
    void_value: int,
    ignore_void: bool,
    cost_class: float,
    cost_mask: float,
    cost_dice: float,
    mask_term: str,
    alpha: float,
    gamma: float,
) -> Tensor:
    """``fastmask::mask_cost``, (L, B, N, M) float32; launches only, so it can be captured in a CUDA graph."""
    layers, batch, queries, h, w = mask_logits.shape
    num_targets = labels.shape[1]
    cost = mask_logits.new_empty((layers, batch, queries, num_targets), dtype=torch.float32)
    if cost.numel() == 0:
        return cost
    config = pick_config(CONFIGS, mask_logits.device)
    mask_logits = with_contiguous_planes(mask_logits)
    planes = plane_arguments(mask_logits)
    targets = target_arguments(masks, segments, valid, void_value, ignore_void)
    rows, pixels = layers * queries, h * w
    block_targets = power_of_two(num_targets + 1, 16, 64)
    blocks, row_blocks = triton.cdiv(num_targets, block_targets - 1), triton.cdiv(rows, config.rows)
    splits = config.programs // (batch * row_blocks * blocks)
    splits = max(1, min(splits, triton.cdiv(pixels, config.least_pixels)))
    per_split = triton.cdiv(triton.cdiv(pixels, splits), config.least_pixels) * config.least_pixels
    splits = triton.cdiv(pixels, per_split)
    block_pixels = config.pixels if block_targets < 64 else config.pixels // 2  # sums take twice the registers
    words = labels.new_empty((batch, blocks, pixels), dtype=torch.int64 if block_targets == 64 else torch.int32)
    areas = cost.new_empty((splits, batch, blocks, block_targets))
    sums = cost.new_empty((splits, 2, batch, blocks, rows, block_targets))
    _mask_cost_targets_kernel[(batch, blocks, splits)](
        **targets,
        words_ptr=words,
        areas_ptr=areas,
        B=batch,
        M=num_targets,
        h=h,
        w=w,
        scale_y=targets["H"] / h,
        scale_x=targets["W"] / w,
        pixels_per_split=per_split,
        BLOCK_C=config.target_pixels if block_targets < 64 else config.target_pixels // 4,  # int64 words would spill
        BLOCK_M=block_targets,
        num_warps=4,
        **COMPILER_OPTIONS,
    )
    _mask_cost_fwd_kernel[(batch * row_blocks, blocks, splits)](
        **planes,
        words_ptr=words,
        sums_ptr=sums,
        B=batch,
        N=queries,
        R=rows,
        P=pixels // planes["UNIT"],
        blocks_per_split=per_split // block_pixels,
        row_blocks=row_blocks,
        alpha=alpha,
        gamma=gamma,
        FOCAL=mask_term == "focal",
        SQUARE=gamma == 2.0,
        HAS_VOID=targets["HAS_VOID"],
        BLOCK_R=config.rows,
        BLOCK_C=block_pixels,
        BLOCK_M=block_targets,
        num_warps=config.num_warps,
        num_stages=config.num_stages if block_targets < 64 else min(config.num_stages, 2),  # three spill on sm_80
        **COMPILER_OPTIONS,
    )
    add_up(config, class_logits, labels, sums, areas, cost, cost_class, cost_mask, cost_dice)
    return cost
