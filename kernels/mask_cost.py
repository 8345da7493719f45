"""The matching cost of every query against every target: three launches for all layers and images.

The first samples the targets at the grid of the logits, one bit each, once for all layers; the second reads the logits;
the third adds the splits of the pixels in order. The second takes most of the time. At B=16, L=6, N=100, M=20 and
128 x 128 bf16 logits (157 M logits: 315 MB, 75 us at 4.2 TB/s; 168 M with the padding of L * N = 600 rows to 640):

- special functions: three per logit (exponential, reciprocal, logarithm), 113 us on 132 SMs at 16 lanes per clock. A
  polynomial instead of the logarithm would save 38 us of them and add 60 us of instructions;
- instructions: 34 per logit in the machine code for sm_90 (36 with void pixels), 169 us at 128 lanes per clock: issue
  slots are scarcest;
- tensor cores: three products with 0/1 targets padded to 32, each of two tf32 parts, 64 GFLOP, 130 us at the peak of
  tf32, in parallel with the other instructions. The parts high + low hold 22 bits of a float32, and the targets are
  exact. fp16 parts would halve that, but end at 65504 and cost one more of the scarce instructions per value.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from fastmask.kernels._common import (
    COMPILER_OPTIONS,
    TargetSizes,
    Term,
    _counted,
    _plane,
    pick_config,
    plane_sizes,
    target_planes,
    with_contiguous_rows,
)
from fastmask.kernels._costs import CostConfig, CostSums, CostWeights, _add_block, _store_sums, plan_reduction
from fastmask.kernels._launch import Launch, cached_plan, kernel
from fastmask.kernels._layout import with_contiguous_planes

# With more stages, Triton 3.6's kernel for sm_100 hangs in an emulator (no GPU has run it); on sm_120, three spill.
CONFIGS = {None: CostConfig(rows=64, block=32, target_block=512, target_split=1024, num_stages=1)}


@kernel
def _mask_cost_targets_kernel(
    target_ptr, valid_ptr, void_value, words_ptr, areas_ptr,
    B, M, h, w, H, W, scale_y, scale_x, pixels_per_split,
    HAS_SEGMENTS: tl.constexpr, HAS_VOID: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Targets at the h x w grid of the logits, one bit each; ``_mask_cost_fwd_kernel`` reads them for every row.

    words  (B, blocks of BLOCK_M - 1 targets, h * w); the last bit marks pixels that count
    areas  (splits, B, blocks, BLOCK_M), how many pixels have each bit
    """
    scale_y = tl.cast(scale_y, tl.float32)
    scale_x = tl.cast(scale_x, tl.float32)
    image = tl.program_id(0).to(tl.int64)
    blocks = tl.num_programs(1)
    image_block = image * blocks + tl.program_id(1)
    bits = tl.arange(0, BLOCK_M)  # [BLOCK_M]
    first = tl.program_id(1) * (BLOCK_M - 1)
    plane = tl.cast(H, tl.int64) * W
    area = tl.zeros([BLOCK_M], dtype=tl.int32)
    all_counted = tl.zeros([BLOCK_C], dtype=tl.int32)
    begin = tl.program_id(2) * pixels_per_split
    end = tl.minimum(begin + pixels_per_split, h * w)
    for block in range(begin, end, BLOCK_C):
        c = block + tl.arange(0, BLOCK_C)  # [BLOCK_C]
        inside = c < end
        y = c // w
        # PyTorch's "nearest" rule, in float32: floor(i * in / out).
        y_target = tl.minimum((y.to(tl.float32) * scale_y).to(tl.int32), H - 1)
        x_target = tl.minimum(((c - y * w).to(tl.float32) * scale_x).to(tl.int32), W - 1)
        pixels = y_target * W + x_target
        segment_ptrs = target_ptr + image * plane + pixels
        valid_ptrs = segment_ptrs
        if HAS_VOID and not HAS_SEGMENTS:
            valid_ptrs = valid_ptr + image * plane + pixels
        counted, segment = _counted(segment_ptrs, valid_ptrs, inside, void_value, HAS_SEGMENTS, HAS_VOID)
        all_counted += counted.to(tl.int32)
        if HAS_SEGMENTS:
            bit = segment - first
            belongs = counted & (bit >= 0) & (bit < BLOCK_M - 1) & (segment < M)
            bit = tl.where(belongs, bit, BLOCK_M - 1)
            word = belongs.to(words_ptr.dtype.element_ty) << bit
            area += tl.histogram(bit, BLOCK_M)
        else:
            targets = first + bits
            of_target = counted[:, None] & ((bits < BLOCK_M - 1) & (targets < M))[None, :]  # [BLOCK_C, BLOCK_M]
            mask_ptrs = target_ptr + (image * M + targets) * plane
            belongs = tl.load(mask_ptrs[None, :] + pixels[:, None], mask=of_target, other=0) != 0
            word = tl.sum(belongs.to(words_ptr.dtype.element_ty) << bits[None, :], 1)
            area += tl.sum(belongs.to(tl.int32), 0)
        word |= counted.to(words_ptr.dtype.element_ty) << (BLOCK_M - 1)
        tl.store(words_ptr + image_block * h * w + c, word, mask=inside)
    area = tl.where(bits < BLOCK_M - 1, area, tl.sum(all_counted, 0))
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

    with F+ and F- of ``_add_block``. In the last column T is one at every counted pixel, for sum_c p[c].
    Separate products of T and of 1 - T avoid cancellation.

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
            x = tl.where((word >> (BLOCK_M - 1) != 0)[None, :], x, 0.0)  # a logit at a void pixel may be NaN
        t = tl.where(((word[:, None] >> bits[None, :]) & 1) != 0, 1.0, 0.0)  # [BLOCK_C, BLOCK_M]
        not_t = tl.where((word >> (BLOCK_M - 1) != 0)[:, None], 1.0 - t, 0.0)

        probability, loss = _add_block(probability, loss, x, t, not_t, alpha, gamma, FOCAL, SQUARE, WHOLE=True)

    _store_sums(sums_ptr, probability, loss, image_block, rows, B, R, BLOCK_M)


class MaskCostPlan(NamedTuple):
    """The launches for some sizes, and the shapes and the dtype of the memory between them."""

    sums: CostSums
    words: tuple[int, ...]
    words_dtype: torch.dtype
    targets: Launch
    forward: Launch
    reduction: Launch


@cached_plan
def plan(
    device: torch.device, config: CostConfig, cost: tuple[int, ...], grid: tuple[int, int], strides: tuple[int, ...],
    classes: int, class_strides: tuple[int, ...], targets: TargetSizes, weights: CostWeights, term: Term,
) -> MaskCostPlan:  # fmt: skip
    layers, batch, queries, num_targets = cost
    h, w = grid
    sums = CostSums.of(cost, h * w, config)
    wide = sums.block_targets == 64
    block_pixels = config.block // 2 if wide else config.block  # the sums take twice the registers
    _, blocks, _ = sums.target_programs
    planes = plane_sizes(grid, strides)
    return MaskCostPlan(
        sums,
        (batch, blocks, h * w),
        torch.int64 if wide else torch.int32,
        _mask_cost_targets_kernel.plan(
            sums.target_programs,
            **targets._asdict(),
            B=batch,
            M=num_targets,
            h=h,
            w=w,
            scale_y=targets.H / h,
            scale_x=targets.W / w,
            pixels_per_split=sums.per_target_split,
            BLOCK_C=config.target_block // (1 if targets.HAS_SEGMENTS else 16 if wide else 4),
            BLOCK_M=sums.block_targets,
            num_warps=4,
            **COMPILER_OPTIONS,
        ),
        _mask_cost_fwd_kernel.plan(
            sums.programs,
            **planes,
            B=batch,
            N=queries,
            R=layers * queries,
            P=h * w // planes["UNIT"],
            blocks_per_split=sums.per_split // block_pixels,
            row_blocks=sums.row_blocks,
            **term.arguments(),
            HAS_VOID=targets.HAS_VOID,
            BLOCK_R=config.rows,
            BLOCK_C=block_pixels,
            BLOCK_M=sums.block_targets,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **COMPILER_OPTIONS,
        ),
        plan_reduction(sums, cost, classes, class_strides, weights),
    )


def mask_cost(
    class_logits: Tensor, mask_logits: Tensor, labels: Tensor, masks: Tensor | None, segments: Tensor | None,
    valid: Tensor | None, void_value: int, ignore_void: bool, cost_class: float, cost_mask: float, cost_dice: float,
    mask_term: str, alpha: float, gamma: float,
) -> Tensor:  # fmt: skip
    """``fastmask::mask_cost``, (L, B, N, M) float32; launches only, so it can be captured in a CUDA graph."""
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
    steps = plan(device, config, shape, (h, w), mask_logits.stride(), classes, class_strides, sizes, weights, term)
    words = torch.empty(steps.words, dtype=steps.words_dtype, device=device)
    sums, areas = cost.new_empty(steps.sums.sums), cost.new_empty(steps.sums.areas)
    steps.targets(target_ptr=target, valid_ptr=counted, words_ptr=words, areas_ptr=areas)
    steps.forward(logits_ptr=mask_logits, words_ptr=words, sums_ptr=sums)
    steps.reduction(
        class_ptr=class_logits, labels_ptr=labels.contiguous(), sums_ptr=sums, areas_ptr=areas, cost_ptr=cost
    )
    return cost
