"""Code that the matching costs at pixels and at points share: sums are split over programs, stored and added up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import triton
import triton.language as tl

from fastmask.kernels._common import (
    COMPILER_OPTIONS,
    _focal_of_logit,
    _sigmoid_of_magnitude,
    ceil_div,
    power_of_two,
)
from fastmask.kernels._launch import Launch, kernel

REDUCED_ROWS = 16  # the rows of one program that adds up the splits


@dataclass(frozen=True)
class CostConfig:
    """Tuning of the kernels of one matching cost.

    Args:
        rows: rows of logits (layers and queries of one image) that a program reads.
        block: pixels or points that it reads at a time.
        target_block: pixels or points that a program of the targets' kernel reads at a time.
        target_split: pixels or points that it reads in all.
        programs: the number of programs to reach by splitting the pixels or points, if there are enough of them.
        least: the fewest pixels or points per split; a split holds a multiple of it, which is a multiple of ``block``.
    """

    rows: int
    block: int
    target_block: int
    target_split: int
    programs: int = 2048
    least: int = 128
    num_warps: int = 4
    num_stages: int = 3


class CostWeights(NamedTuple):
    """The weights of the three terms."""

    cost_class: float
    cost_mask: float
    cost_dice: float


@dataclass(frozen=True)
class CostSums:
    """Sizes of the sums over the pixels or points of each image, which are split over programs.

    Targets come in blocks of ``block_targets`` - 1; the last column of a block stands for all pixels that count.

    Args:
        sums: ``(splits, 2, B, blocks, rows, block_targets)``, sums of probabilities and of losses; a row is a layer and
            query.
        areas: ``(target_splits, B, blocks, block_targets)``, areas of the targets.
        per_split, per_target_split: pixels or points per split of either.
        row_blocks: programs that share the rows of an image.
    """

    sums: tuple[int, ...]
    areas: tuple[int, ...]
    per_split: int
    per_target_split: int
    row_blocks: int

    @property
    def block_targets(self) -> int:
        return self.areas[-1]

    @property
    def target_programs(self) -> tuple[int, int, int]:
        """The grid of the kernel that reads the targets."""
        splits, batch, blocks, _ = self.areas
        return batch, blocks, splits

    @property
    def programs(self) -> tuple[int, int, int]:
        """The grid of the kernel that reads the logits."""
        splits, _, batch, blocks, _, _ = self.sums
        return batch * self.row_blocks, blocks, splits

    @staticmethod
    def of(cost: tuple[int, ...], size: int, config: CostConfig) -> CostSums:
        """The sums for a cost of shape (L, B, N, M) over ``size`` pixels or points."""
        layers, batch, queries, num_targets = cost
        block_targets = power_of_two(num_targets + 1, 16, 64)
        blocks, row_blocks = ceil_div(num_targets, block_targets - 1), ceil_div(layers * queries, config.rows)
        splits = max(1, min(config.programs // (batch * row_blocks * blocks), ceil_div(size, config.least)))
        per_split = ceil_div(ceil_div(size, splits), config.least) * config.least
        splits = ceil_div(size, per_split)
        return CostSums(
            (splits, 2, batch, blocks, layers * queries, block_targets),
            (ceil_div(size, config.target_split), batch, blocks, block_targets),
            per_split,
            config.target_split,
            row_blocks,
        )


@triton.jit
def _high_part(x):
    """The 11 significant bits of a float32 that tf32 keeps."""
    return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def _pair_sums(values, t, WHOLE: tl.constexpr):
    """``[R, C]`` times ``[C, M]`` in float32, each split into a high and a low part in tf32; the product of the low
    parts is left out. A WHOLE ``t`` of zeros and ones has no low part.

    The caller adds the result of each block to its sums: the tensor core's accumulator would truncate at every step,
    which over thousands of pixels adds up to a bias of 1e-5.
    """
    high = _high_part(values)
    if WHOLE:
        sums = tl.dot(values - high, t, input_precision="tf32")
        t_high = t
    else:
        t_high = _high_part(t)
        sums = tl.dot(values - high, t_high, input_precision="tf32")
        sums = tl.dot(high, t - t_high, sums, input_precision="tf32")
    return tl.dot(high, t_high, sums, input_precision="tf32")


@triton.jit
def _add_block(probability, loss, x, t, not_t, alpha, gamma, FOCAL: tl.constexpr, SQUARE: tl.constexpr,
               WHOLE: tl.constexpr):  # fmt: skip
    """Adds to both sums ``[R, M]`` those of a block of logits x ``[R, C]``: sum_c p t and sum_c F+ t + F- not_t, with
    F+ = alpha (1-p)^gamma softplus(-x) and F- = (1-alpha) p^gamma softplus(x) (RetinaNet, arXiv:1708.02002,
    equation 5), or without FOCAL the softplus alone."""
    if FOCAL:
        p, of_foreground, of_background = _focal_of_logit(x, gamma, SQUARE)
        foreground_weight, background_weight = alpha * 0.693147181, (1.0 - alpha) * 0.693147181
    else:
        magnitude = tl.abs(x)
        large, small, right = _sigmoid_of_magnitude(magnitude, RELATIVE=False)
        p = tl.where(x < 0.0, small, large)
        of_foreground = tl.where(x < 0.0, magnitude, 0.0) + right
        of_background = tl.where(x < 0.0, 0.0, magnitude) + right
        foreground_weight, background_weight = 1.0, 1.0
    # In this order the values that wait for their product take the fewest registers.
    background = _pair_sums(of_background, not_t, WHOLE)
    foreground = _pair_sums(of_foreground, t, WHOLE)
    probability += _pair_sums(p, t, WHOLE)
    loss += foreground_weight * foreground
    loss += background_weight * background
    return probability, loss


@triton.jit
def _store_sums(sums_ptr, probability, loss, image_block, rows, B, R, BLOCK_M: tl.constexpr):
    """Stores both sums ``[BLOCK_R, BLOCK_M]`` of a program's split."""
    block_size = tl.cast(R, tl.int64) * BLOCK_M
    of_split = tl.program_id(2).to(tl.int64) * 2 * tl.num_programs(1) * B
    at = rows.to(tl.int64)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    tl.store(sums_ptr + (of_split + image_block) * block_size + at, probability, mask=(rows < R)[:, None])
    of_loss = of_split + tl.cast(B, tl.int64) * tl.num_programs(1)
    tl.store(sums_ptr + (of_loss + image_block) * block_size + at, loss, mask=(rows < R)[:, None])


@kernel
def _mask_cost_reduce_kernel(
    class_ptr, stride_l, stride_b, stride_n, labels_ptr, sums_ptr, areas_ptr, cost_ptr,
    B, N, M, R, K, splits, target_splits, blocks, row_blocks, cost_class, cost_mask, cost_dice,
    BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """cost = -cost_class softmax(class_logits)[label] + cost_mask sums[1] / pixels + cost_dice dice, with
    dice = 1 - (2 sum_c p T + 1) / (sum_c p + sum_c T + 1) (V-Net, arXiv:1606.04797). Splits are added in order.

        class_logits  (L, B, N, K), rows contiguous, the last class is no-object
        cost          (L, B, N, M); 0 where labels are -1, NaN where they are not a class
    """
    image = (tl.program_id(0) // row_blocks).to(tl.int64)
    rows = (tl.program_id(0) % row_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    present = (rows < R)[:, None]
    layer = (rows // N).to(tl.int64)
    query = (rows % N).to(tl.int64)
    class_ptrs = (class_ptr + image * stride_b + layer * stride_l + query * stride_n)[:, None]  # [BLOCK_R, 1]
    # Each place of a block of classes has a maximum of its own until the loop ends: that is less work than a reduction
    # in it, on which Triton up to 3.8 also fails if another tensor of the same layout has as many columns.
    k = tl.arange(0, BLOCK_K)[None, :]
    largest = tl.full([BLOCK_R, BLOCK_K], -1e38, dtype=tl.float32)
    totals = tl.zeros([BLOCK_R, BLOCK_K], dtype=tl.float32)
    for block in range(0, K, BLOCK_K):
        x = tl.load(class_ptrs + (block + k), mask=present & (block + k < K), other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, x)
        rescaled = totals * tl.exp2((largest - larger) * 1.4426950408889634)
        totals = rescaled + tl.exp2((x - larger) * 1.4426950408889634)
        largest = larger
    maximum = tl.max(largest, 1)
    total = tl.sum(totals * tl.exp2((largest - maximum[:, None]) * 1.4426950408889634), 1)

    image_block = image * blocks + tl.program_id(1)
    image_blocks = tl.cast(B, tl.int64) * blocks
    bits = tl.arange(0, BLOCK_M)  # [BLOCK_M]
    m = tl.program_id(1) * (BLOCK_M - 1) + bits
    wanted = present & ((bits < BLOCK_M - 1) & (m < M))[None, :]
    of_all = bits == BLOCK_M - 1
    read = wanted | (present & of_all[None, :])
    sum_ptrs = sums_ptr + (image_block * R + rows)[:, None] * BLOCK_M + bits[None, :]
    probabilities = tl.zeros([BLOCK_R, BLOCK_M], dtype=tl.float64)
    loss = tl.zeros([BLOCK_R, BLOCK_M], dtype=tl.float64)
    for _ in range(splits):
        probabilities += tl.load(sum_ptrs, mask=read, other=0.0)
        loss += tl.load(sum_ptrs + image_blocks * R * BLOCK_M, mask=wanted, other=0.0)
        sum_ptrs += 2 * image_blocks * R * BLOCK_M
    parts = tl.zeros([16, BLOCK_M], dtype=tl.float64)
    for begin in range(0, target_splits, 16):
        part = begin + tl.arange(0, 16)[:, None]
        area_ptrs = areas_ptr + (part * image_blocks + image_block) * BLOCK_M + bits[None, :]
        parts += tl.load(area_ptrs, mask=part < target_splits, other=0.0)
    areas = tl.sum(parts, 0)
    all_probability = tl.sum(tl.where(of_all[None, :], probabilities, 0.0), 1)
    pixels = tl.sum(tl.where(of_all, areas, 0.0), 0)
    label = tl.load(labels_ptr + image * M + m, mask=(bits < BLOCK_M - 1) & (m < M), other=-1)[None, :]  # [1, BLOCK_M]
    known = (label >= 0) & (label < K)
    x = tl.load(class_ptrs + label, mask=wanted & known, other=float("nan")).to(tl.float32)
    probability = tl.exp2((x - maximum[:, None]) * 1.4426950408889634) / total[:, None]
    both = (all_probability[:, None] + areas[None, :] + 1.0).to(tl.float32)
    dice = 1.0 - (2.0 * probabilities + 1.0).to(tl.float32) / both
    loss_per_pixel = loss.to(tl.float32) / tl.maximum(pixels, 1.0).to(tl.float32)
    cost = cost_mask * loss_per_pixel + cost_dice * dice - cost_class * probability
    cost = tl.where(label < 0, 0.0, cost).to(tl.float32)
    row = (layer * B + image) * N + query
    tl.store(cost_ptr + row[:, None] * M + m[None, :], cost, mask=wanted)


def plan_reduction(
    sums: CostSums, cost: tuple[int, ...], classes: int, class_strides: tuple[int, ...], weights: CostWeights
) -> Launch:
    """The launch that writes the cost of shape (L, B, N, M) from the class logits and the sums of all splits."""
    _, batch, queries, num_targets = cost
    splits, _, _, blocks, rows, block_targets = sums.sums
    row_blocks = ceil_div(rows, REDUCED_ROWS)
    return _mask_cost_reduce_kernel.plan(
        (batch * row_blocks, blocks),
        **dict(zip(("stride_l", "stride_b", "stride_n"), class_strides, strict=False)),
        B=batch,
        N=queries,
        M=num_targets,
        R=rows,
        K=classes,
        splits=splits,
        target_splits=sums.areas[0],
        blocks=blocks,
        row_blocks=row_blocks,
        **weights._asdict(),
        BLOCK_R=REDUCED_ROWS,
        BLOCK_M=block_targets,
        BLOCK_K=power_of_two(classes, 16, 32),
        num_warps=4,
        **COMPILER_OPTIONS,
    )
