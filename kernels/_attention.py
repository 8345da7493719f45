"""What the forward and backward kernels of masked attention share: addresses of rows, dropout, the sums over splits of
the keys, and the arguments of their launches."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask.kernels._attention_configs import Configs, MaskedAttentionConfig, config_of_heads
from fastmask.kernels._common import (
    COMPILER_OPTIONS,
    ceil_div,
    power_of_two,
    unit,
    with_contiguous_rows,
)
from fastmask.kernels._launch import Launch, kernel
from fastmask.kernels.attended_keys import NO_BITS, AttendedKeysPlan, plan_attended_keys

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _rows(ptr, first, stride, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """The addresses ``[BLOCK, BLOCK_D]`` of one head's channels in the rows from ``first`` on."""
    row = tl.arange(0, BLOCK)[:, None]
    return ptr + tl.cast(first, tl.int64) * stride + (row * stride + tl.arange(0, BLOCK_D)[None, :])


@triton.jit
def _kept(seed, row, S, s, dropout_p):
    """Which weights dropout keeps, ``[BLOCK_N, BLOCK_S]``; row = (b heads + h) N + n."""
    return tl.rand(seed, row[:, None] * S + s[None, :]) >= dropout_p


@kernel
def _masked_attention_reduce_kernel(
    parts_ptr, lse_parts_ptr, out_ptr, lse_ptr, B, N, heads, query_blocks, splits,
    WEIGHTED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Adds the results of the splits of the keys in order: outputs times exp(lse_parts - lse), or gradients.

    parts  (splits, B, N, E) float32;  lse_parts  (splits, B, heads, N)
    out    (B, N, E);                  lse        (B, heads, N)
    """
    pair = (tl.program_id(0) // query_blocks).to(tl.int64)
    n = (tl.program_id(0) % query_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    there = (n < N)[:, None] & (d < HEAD_DIM)[None, :]
    channels = heads * HEAD_DIM
    at = (pair // heads * N + n)[:, None] * channels + (pair % heads) * HEAD_DIM + d[None, :]
    split_size = tl.cast(B, tl.int64) * N
    maximum = tl.full([BLOCK_N], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_N], dtype=tl.float32)
    out = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    if WEIGHTED:
        for split in range(splits):
            lse = tl.load(lse_parts_ptr + (split * split_size * heads + pair * N) + n, mask=n < N, other=float("inf"))
            maximum = tl.maximum(maximum, tl.where(lse == float("inf"), float("-inf"), lse), tl.PropagateNan.ALL)
    for split in range(splits):
        part = tl.load(parts_ptr + split * split_size * channels + at, mask=there, other=0.0)
        if WEIGHTED:
            lse = tl.load(lse_parts_ptr + (split * split_size * heads + pair * N) + n, mask=n < N, other=float("inf"))
            weight = tl.where(lse == float("inf"), 0.0, tl.exp2((lse - maximum) * LOG2_E))
            total += weight
            part *= weight[:, None]
        out += part
    if WEIGHTED:
        present = total != 0.0
        total = tl.where(present, total, 1.0)
        out /= total[:, None]
        lse = tl.where(present, maximum + tl.log(total), float("inf"))
        tl.store(lse_ptr + pair * N + n, lse, mask=n < N)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=there)


def with_near_rows(x: Tensor) -> Tensor:
    """``x (B, N or S, E)``, copied unless rows are contiguous and close enough for 32-bit positions within a block."""
    return with_contiguous_rows(x if x.stride(1) < 1 << 22 else x.contiguous())


# By the names of the arguments: images and rows of q, k, v and the gradient of the output.
AXES = (("qb", "qn"), ("kb", "ks"), ("vb", "vs"), ("gb", "gn"))


class AttentionSizes(NamedTuple):
    """The sizes and options of a call.

    Args:
        shape: (B, N, E), of the queries.
        strides: of images and rows of q, k, v and, in backward, of the gradient of the output.
        grid: (height, width) of the keys.
        mask_shape, mask_strides: those of the mask logits, or None.
    """

    device: torch.device
    shape: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    grid: tuple[int, int]
    mask_shape: tuple[int, ...] | None
    mask_strides: tuple[int, ...]
    has_padding: bool
    heads: int
    scale: float
    dropout_p: float


class AttentionPlan(NamedTuple):
    """The launches for some sizes, the number of splits of the keys, and the number of blocks of queries."""

    keys: AttendedKeysPlan | None
    splits: int
    query_blocks: int
    launches: tuple[Launch, ...]
    reduction: Launch | None


def read_by_both(
    configs: Configs, q: Tensor, k: Tensor, v: Tensor, mask_logits: Tensor | None, key_padding_mask: Tensor | None,
    grid_height: int, grid_width: int, num_heads: int, scale: float, dropout_p: float, seed: Tensor | None,
    grad_out: Tensor | None = None,
) -> tuple[dict[str, Tensor | None], Tensor | None, AttentionSizes, MaskedAttentionConfig]:  # fmt: skip
    """The tensors that the forward and backward kernels read, by the names of their arguments; the mask logits with
    contiguous rows; the sizes and the configuration."""
    rows = tuple(with_near_rows(x) for x in ((q, k, v) if grad_out is None else (q, k, v, grad_out)))
    tensors: dict[str, Tensor | None] = dict(zip(("q_ptr", "k_ptr", "v_ptr", "grad_out_ptr"), rows, strict=False))
    tensors["padding_ptr"] = None if key_padding_mask is None else key_padding_mask.contiguous().view(torch.uint8)
    tensors["seed_ptr"] = seed if dropout_p > 0.0 else None
    mask_shape, mask_strides = None, (0, 0, 0, 0)
    if mask_logits is not None:
        mask_logits = with_contiguous_rows(mask_logits)
        mask_shape, mask_strides = mask_logits.shape, mask_logits.stride()
    sizes = AttentionSizes(
        q.device, q.shape, tuple(x.stride()[:2] for x in rows), (grid_height, grid_width), mask_shape, mask_strides,
        key_padding_mask is not None, num_heads, scale, dropout_p,
    )  # fmt: skip
    return tensors, mask_logits, sizes, config_of_heads(configs, q, q.shape[2] // num_heads, dropout_p)


def shared_arguments(
    config: MaskedAttentionConfig, sizes: AttentionSizes
) -> tuple[dict[str, Any], AttendedKeysPlan | None, int, int]:
    """The arguments that the forward and backward kernels share, the plan of the attended keys, the number of blocks of
    queries, and the number of splits of the keys."""
    batch, queries, channels = sizes.shape
    keys, head_dim = sizes.grid[0] * sizes.grid[1], channels // sizes.heads
    block_queries = power_of_two(queries, min(64, config.queries), config.queries)
    query_blocks = ceil_div(queries, block_queries)
    forward = len(sizes.strides) == 3
    programs = batch * sizes.heads * (query_blocks if forward else 1)  # backward: one after another
    blocks = ceil_div(keys, config.keys)
    splits = max(1, min(config.programs // programs, ceil_div(keys, config.min_keys)))
    blocks_per_split = ceil_div(blocks, splits)
    size = unit(*(stride for of_tensor in sizes.strides for stride in of_tensor))
    plan = None
    if sizes.mask_shape is not None or sizes.has_padding:
        plan = plan_attended_keys(
            sizes.device, batch, queries, sizes.mask_shape, sizes.mask_strides, sizes.has_padding, sizes.grid,
            config.keys,
        )  # fmt: skip
    arguments = {
        **{
            f"stride_{axis}": stride // size
            for axes, of_tensor in zip(AXES, sizes.strides, strict=False)
            for axis, stride in zip(axes, of_tensor, strict=True)
        },
        **(NO_BITS if plan is None else plan.arguments),
        "B": batch,
        "N": queries,
        "S": keys,
        "heads": sizes.heads,
        "blocks_per_split": blocks_per_split,
        "scale": sizes.scale,
        "dropout_p": sizes.dropout_p,
        "HAS_PADDING": sizes.has_padding,
        "HAS_DROPOUT": sizes.dropout_p > 0.0,
        "UNIT": size,
        "HEAD_DIM": head_dim,
        "BLOCK_N": block_queries,
        "BLOCK_S": config.keys,
        "BLOCK_D": power_of_two(head_dim, 16, 128),
        "num_warps": max(config.min_warps, block_queries // config.warp_queries),
        "num_stages": config.num_stages,
        "maxnreg": config.registers,
        **COMPILER_OPTIONS,
    }
    return arguments, plan, query_blocks, ceil_div(blocks, blocks_per_split)


def plan_reduction(sizes: AttentionSizes, splits: int, weighted: bool) -> Launch | None:
    """The launch that adds the splits of the keys, if there are several; see ``_masked_attention_reduce_kernel``."""
    if splits == 1:
        return None
    batch, queries, channels = sizes.shape
    head_dim = channels // sizes.heads
    query_blocks = ceil_div(queries, 16)
    return _masked_attention_reduce_kernel.plan(
        (batch * sizes.heads * query_blocks,),
        B=batch,
        N=queries,
        heads=sizes.heads,
        query_blocks=query_blocks,
        splits=splits,
        WEIGHTED=weighted,
        HEAD_DIM=head_dim,
        BLOCK_N=16,
        BLOCK_D=power_of_two(head_dim, 16, 128),
        num_warps=2,
        **COMPILER_OPTIONS,
    )
