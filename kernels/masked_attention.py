"""Masked attention and its gradient: first the bits of the attended keys, then a pass over the keys that skips the
blocks to which no query attends.

Time of forward at B=16, 8 heads of 32, N=100 (two blocks of 64) in bf16 on 132 SMs, for key grids of 64 x 64 (32 x 32
and 16 x 16 in parentheses):

- memory: keys and values are 67 MB, 16 us at 4.2 TB/s (4 and 1 us); two programs read each, the second from L2;
- instructions: 9.9 per query and key in the machine code for sm_90, of which two for the mask, a maximum, a product, an
  exponential, a sum and half a conversion make 6.5: 21 us of issue slots (5.3 and 1.3 us);
- special functions: one per query and key, 17 us (4.3 and 1.1 us); tensor cores: 8.6 GFLOP, 11 us.

Two programs per SM (256) are resident at once, so the keys are split over programs only if there are fewer images.

Backward computes all three gradients in one pass. With few queries, a program holds all of them, and the gradient of q,
while it loops over a split of the keys: it reads each block of keys once, writes its gradients once, and needs five
products; separate passes for q and for keys would need seven. More queries than a program holds take several launches,
which add to the gradients of keys and values in memory; the splits' gradients of q are added in order. There are no
atomics.

At the same sizes, with a block of 128 queries and a key grid of 64 x 64, keys, values and their gradients are 134 MB,
32 us at 4.2 TB/s; 12.2 instructions per query and key are 26 us of issue slots; exponentials 17 us; 21 GFLOP on tensor
cores 28 us. The time is proportional to the number of keys.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask.kernels._attention_configs import (
    BACKWARD_CONFIGS,
    FORWARD_CONFIGS,
    Configs,
    MaskedAttentionConfig,
    config_of_heads,
)
from fastmask.kernels._common import (
    COMPILER_OPTIONS,
    ceil_div,
    power_of_two,
    unit,
    with_contiguous_rows,
)
from fastmask.kernels._launch import Launch, cached_plan, kernel
from fastmask.kernels.attended_keys import (
    NO_BITS,
    AttendedKeysPlan,
    _attends,
    _lowest_block,
    _occupied_blocks,
    _readable,
    attended_keys,
    plan_attended_keys,
)

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
def _masked_attention_fwd_kernel(
    q_ptr, stride_qb, stride_qn, k_ptr, stride_kb, stride_ks, v_ptr, stride_vb, stride_vs,
    padding_ptr, bits_ptr, stride_bits_b, stride_bits_w,
    occupied_ptr, stride_occupied_b, stride_occupied_n, seed_ptr, out_ptr, lse_ptr,
    B, N, S, heads, query_blocks, blocks_per_split, scale, dropout_p,
    HAS_BITS: tl.constexpr, OWN_BITS: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    UNIT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """softmax(scale q k^T + M) v (Mask2Former, arXiv:2112.01527, equation 2) of one head and BLOCK_N queries over one
    split of the keys, with a running maximum and sum of the softmax (FlashAttention-2, arXiv:2307.08691, algorithm 1),
    in powers of two.

        q  (B, N, E);  k, v  (B, S, E), strides in units;  padding  (B, S) uint8
        bits and occupied: see ``attended_keys``
        out  (splits, B, N, E);  lse  (splits, B, heads, N), natural, +inf for queries without any key
    """
    scale = tl.cast(scale, tl.float32)
    dropout_p = tl.cast(dropout_p, tl.float32)
    pair = (tl.program_id(0) // query_blocks).to(tl.int64)
    image = pair // heads
    channels = heads * HEAD_DIM
    channel = (pair % heads) * HEAD_DIM
    first_query = (tl.program_id(0) % query_blocks) * BLOCK_N
    n = first_query + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    i = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    there = (n < N)[:, None] & (d < HEAD_DIM)[None, :]
    q_ptr += image * stride_qb * UNIT + channel
    q = tl.load(_rows(q_ptr, first_query, stride_qn * UNIT, BLOCK_N, BLOCK_D), mask=there, other=0.0)
    if q.dtype == tl.float32:
        q *= scale  # first, as in the reference, so that it rounds alike
        scale = 1.0
    else:
        # Scores are scaled after their maximum is taken, and some are -inf: the scale must be positive.
        q = tl.where(scale < 0.0, -q, q)
        scale = tl.maximum(tl.abs(scale), 1e-30)
    log2_scale = scale * LOG2_E
    k_ptr += image * stride_kb * UNIT + channel
    v_ptr += image * stride_vb * UNIT + channel
    stride_ks = stride_ks * UNIT
    stride_vs = stride_vs * UNIT
    if HAS_BITS:
        bits_ptr += image * stride_bits_b
        occupied_ptr += image * stride_occupied_b
    if HAS_PADDING:
        padding_ptr += image * S
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
        row = pair * N + n

    maximum = tl.full([BLOCK_N], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_N], dtype=tl.float32)
    out = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    begin = tl.program_id(1) * blocks_per_split
    end = tl.minimum(begin + blocks_per_split, tl.cdiv(S, BLOCK_S))
    for first in range(begin, end, 32):
        remaining, count = _occupied_blocks(
            occupied_ptr, stride_occupied_n, first_query, N, first, end, HAS_BITS, BLOCK_N
        )
        for _ in range(count):
            lowest, block = _lowest_block(remaining)
            remaining ^= lowest
            block += first
            s = block * BLOCK_S + i  # [BLOCK_S]
            in_keys = _readable(padding_ptr, s, S, HAS_PADDING)[:, None] & (d < HEAD_DIM)[None, :]
            start = tl.cast(block, tl.int64) * BLOCK_S
            k = tl.load(_rows(k_ptr, start, stride_ks, BLOCK_S, BLOCK_D), mask=in_keys, other=0.0)
            v = tl.load(_rows(v_ptr, start, stride_vs, BLOCK_S, BLOCK_D), mask=in_keys, other=0.0)
            attended = _attends(bits_ptr, stride_bits_w, block, n, N, S, HAS_BITS, OWN_BITS, BLOCK_S)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_N, BLOCK_S]
            scores = tl.where(attended, scores, float("-inf"))
            larger = tl.maximum(maximum, tl.max(scores, 1))
            shift = tl.where(larger == float("-inf"), 0.0, larger)
            if q.dtype == tl.float32:
                weights = tl.exp2((scores - shift[:, None]) * log2_scale)
            else:
                weights = tl.exp2(scores * log2_scale - (shift * log2_scale)[:, None])
            rescale = tl.exp2((maximum - shift) * log2_scale)
            total = total * rescale + tl.sum(weights, 1)
            if HAS_DROPOUT:
                weights = tl.where(_kept(seed, row, S, s, dropout_p), weights, 0.0)
            out = tl.dot(weights.to(v.dtype), v, out * rescale[:, None], input_precision="ieee")
            maximum = larger

    present = total != 0.0  # True for NaN
    total = tl.where(present, total, 1.0)
    factor = tl.where(present, 1.0 / total, 0.0)
    if HAS_DROPOUT:
        factor *= tl.where(dropout_p < 1.0, 1.0 / (1.0 - dropout_p), 0.0)
    split = tl.program_id(1).to(tl.int64)
    out_ptr += (split * B + image) * N * channels + channel
    out = (out * factor[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(_rows(out_ptr, first_query, channels, BLOCK_N, BLOCK_D), out, mask=there)
    lse = tl.where(present, maximum * scale + tl.log(total), float("inf"))
    tl.store(lse_ptr + (split * B * heads + pair) * N + n, lse, mask=n < N)


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


@cached_plan
def plan_forward(config: MaskedAttentionConfig, sizes: AttentionSizes) -> AttentionPlan:
    arguments, keys, query_blocks, splits = shared_arguments(config, sizes)
    launch = _masked_attention_fwd_kernel.plan(
        (sizes.shape[0] * sizes.heads * query_blocks, splits), **arguments, query_blocks=query_blocks
    )
    return AttentionPlan(keys, splits, query_blocks, (launch,), plan_reduction(sizes, splits, weighted=True))


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask_logits: Tensor | None, key_padding_mask: Tensor | None, grid_height: int,
    grid_width: int, num_heads: int, scale: float, dropout_p: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``fastmask::masked_attention``: out (B, N, E) and logsumexp (B, heads, N)."""
    batch, queries, _ = shape = q.shape
    out = torch.empty(shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, num_heads, queries), dtype=torch.float32, device=q.device)
    if k.numel() == 0:
        return out.zero_(), lse.fill_(float("inf"))
    if q.numel() == 0:
        return out, lse
    tensors, mask_logits, sizes, config = read_by_both(
        FORWARD_CONFIGS, q, k, v, mask_logits, key_padding_mask, grid_height, grid_width, num_heads, scale, dropout_p,
        seed,
    )  # fmt: skip
    steps = plan_forward(config, sizes)
    parts, lse_parts = out, lse
    if steps.reduction is not None:
        parts = lse.new_empty((steps.splits, *shape))
        lse_parts = lse.new_empty((steps.splits, *lse.shape))
    attended = attended_keys(steps.keys, mask_logits, tensors["padding_ptr"])
    for launch in steps.launches:
        launch(**tensors, **attended, out_ptr=parts, lse_ptr=lse_parts)
    if steps.reduction is not None:
        steps.reduction(parts_ptr=parts, lse_parts_ptr=lse_parts, out_ptr=out, lse_ptr=lse)
    return out, lse


@kernel
def _masked_attention_bwd_kernel(
    q_ptr, stride_qb, stride_qn, k_ptr, stride_kb, stride_ks, v_ptr, stride_vb, stride_vs,
    grad_out_ptr, stride_gb, stride_gn, out_ptr, lse_ptr, delta_ptr,
    padding_ptr, bits_ptr, stride_bits_b, stride_bits_w,
    occupied_ptr, stride_occupied_b, stride_occupied_n, seed_ptr, grad_q_ptr, grad_k_ptr, grad_v_ptr,
    B, N, S, heads, first_query, blocks_per_split, scale, dropout_p,
    HAS_BITS: tl.constexpr, OWN_BITS: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    DELTA: tl.constexpr, ADDS: tl.constexpr,
    UNIT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of one head, from one split of the keys and BLOCK_N queries from ``first_query`` on. With the weights
    P = exp(scale q k^T - logsumexp), and P' and dP' the result of dropout on P and on the gradient dO V^T:

        dV = P'^T dO,  dS = P (dP' - delta),  delta = rowsum(P dP') = rowsum(O dO),  dQ = scale dS K,  dK = scale dS^T Q

    (FlashAttention-2, arXiv:2307.08691, algorithm 2). With DELTA = "out" delta is rowsum(O dO). float32 needs the sum
    of exactly those products from which delta is subtracted, and weights that sum to one, which a rounded logsumexp
    does not give: a launch with "summed" adds up rowsum(P dP') and rowsum(P), and one with "known" reads them.

        q, grad_out, out  (B, N, E);  k, v, grad_k, grad_v  (B, S, E);  logsumexp  (B, heads, N);  strides in units
        delta   (splits, 2, B, heads, N);  grad_q  (splits, B, N, E)
        ADDS    whether grad_k and grad_v hold the sums over earlier queries
    """
    scale = tl.cast(scale, tl.float32)
    dropout_p = tl.cast(dropout_p, tl.float32)
    pair = tl.program_id(0).to(tl.int64)
    image = pair // heads
    channel = (pair % heads) * HEAD_DIM
    channels = heads * HEAD_DIM
    n = first_query + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    i = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    there = (n < N)[:, None] & (d < HEAD_DIM)[None, :]
    q_ptr += image * stride_qb * UNIT + channel
    grad_out_ptr += image * stride_gb * UNIT + channel
    q = tl.load(_rows(q_ptr, first_query, stride_qn * UNIT, BLOCK_N, BLOCK_D), mask=there, other=0.0)
    g = tl.load(_rows(grad_out_ptr, first_query, stride_gn * UNIT, BLOCK_N, BLOCK_D), mask=there, other=0.0)
    delta = tl.zeros([BLOCK_N], dtype=tl.float32)
    total = tl.zeros([BLOCK_N], dtype=tl.float32)
    split_size = tl.cast(B, tl.int64) * heads * N
    if DELTA == "out":
        out_ptr += image * N * channels + channel
        out = tl.load(_rows(out_ptr, first_query, channels, BLOCK_N, BLOCK_D), mask=there, other=0.0)
        delta = tl.sum(out.to(tl.float32) * g.to(tl.float32), 1)
    elif DELTA == "known":
        for split in range(tl.num_programs(1)):
            delta_ptrs = delta_ptr + (split * split_size * 2 + pair * N) + n
            delta += tl.load(delta_ptrs, mask=n < N, other=0.0)
            total += tl.load(delta_ptrs + split_size, mask=n < N, other=0.0)
        factor = 1.0 / tl.where(total != 0.0, total, 1.0)
        delta *= factor
    if q.dtype == tl.float32:
        q *= scale
    lse = tl.load(lse_ptr + pair * N + n, mask=n < N, other=float("inf"))
    k_ptr += image * stride_kb * UNIT + channel
    v_ptr += image * stride_vb * UNIT + channel
    stride_ks = stride_ks * UNIT
    stride_vs = stride_vs * UNIT
    grad_k_ptr += image * S * channels + channel
    grad_v_ptr += image * S * channels + channel
    if HAS_BITS:
        bits_ptr += image * stride_bits_b
        occupied_ptr += image * stride_occupied_b
    if HAS_PADDING:
        padding_ptr += image * S
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
        row = pair * N + n
        kept_scale = tl.where(dropout_p < 1.0, 1.0 / (1.0 - dropout_p), 0.0)

    grad_q = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    begin = tl.program_id(1) * blocks_per_split
    end = tl.minimum(begin + blocks_per_split, tl.cdiv(S, BLOCK_S))
    for first in range(begin, end, 32):
        remaining, count = _occupied_blocks(
            occupied_ptr, stride_occupied_n, first_query, N, first, end, HAS_BITS, BLOCK_N
        )
        if HAS_BITS and not ADDS and DELTA != "summed":
            unoccupied = ~remaining
            for _ in range(tl.minimum(end - first, 32) - count):
                lowest, block = _lowest_block(unoccupied)
                unoccupied ^= lowest
                s = (first + block) * BLOCK_S + i
                inside = (s < S)[:, None] & (d < HEAD_DIM)[None, :]
                start = tl.cast(first + block, tl.int64) * BLOCK_S
                zeros = tl.zeros([BLOCK_S, BLOCK_D], dtype=grad_k_ptr.dtype.element_ty)
                tl.store(_rows(grad_k_ptr, start, channels, BLOCK_S, BLOCK_D), zeros, mask=inside)
                tl.store(_rows(grad_v_ptr, start, channels, BLOCK_S, BLOCK_D), zeros, mask=inside)
        for _ in range(count):
            lowest, block = _lowest_block(remaining)
            remaining ^= lowest
            block += first
            s = block * BLOCK_S + i  # [BLOCK_S]
            inside = (s < S)[:, None] & (d < HEAD_DIM)[None, :]
            in_keys = _readable(padding_ptr, s, S, HAS_PADDING)[:, None] & (d < HEAD_DIM)[None, :]
            start = tl.cast(block, tl.int64) * BLOCK_S
            k = tl.load(_rows(k_ptr, start, stride_ks, BLOCK_S, BLOCK_D), mask=in_keys, other=0.0)
            v = tl.load(_rows(v_ptr, start, stride_vs, BLOCK_S, BLOCK_D), mask=in_keys, other=0.0)
            attended = _attends(bits_ptr, stride_bits_w, block, n, N, S, HAS_BITS, OWN_BITS, BLOCK_S)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_N, BLOCK_S]
            if q.dtype == tl.float32:
                weights = tl.exp2((scores - lse[:, None]) * LOG2_E)
            else:
                weights = tl.exp2(scores * (scale * LOG2_E) - (lse * LOG2_E)[:, None])
            weights = tl.where(attended, weights, 0.0)
            if DELTA == "known":
                weights *= factor[:, None]
            kept_weights = weights
            if HAS_DROPOUT:
                kept = _kept(seed, row, S, s, dropout_p)
                kept_weights = tl.where(kept, weights * kept_scale, 0.0)
            if DELTA == "summed":
                total += tl.sum(weights, 1)
                delta += tl.sum(kept_weights * tl.dot(g, tl.trans(v), input_precision="ieee"), 1)
            else:
                grad_v = tl.dot(tl.trans(kept_weights.to(g.dtype)), g, input_precision="ieee")  # [BLOCK_S, BLOCK_D]
                grad_v_ptrs = _rows(grad_v_ptr, start, channels, BLOCK_S, BLOCK_D)
                if ADDS:
                    grad_v += tl.load(grad_v_ptrs, mask=inside, other=0.0)
                tl.store(grad_v_ptrs, grad_v.to(grad_v_ptr.dtype.element_ty), mask=inside)
                slopes = tl.dot(g, tl.trans(v), input_precision="ieee")  # [BLOCK_N, BLOCK_S]
                if HAS_DROPOUT:
                    slopes = tl.where(kept, slopes * kept_scale, 0.0)
                slopes = (weights * (slopes - delta[:, None])).to(q.dtype)
                grad_q = tl.dot(slopes, k, grad_q, input_precision="ieee")
                grad_k = tl.dot(tl.trans(slopes), q, input_precision="ieee")  # [BLOCK_S, BLOCK_D]
                if q.dtype != tl.float32:
                    grad_k *= scale
                grad_k_ptrs = _rows(grad_k_ptr, start, channels, BLOCK_S, BLOCK_D)
                if ADDS:
                    grad_k += tl.load(grad_k_ptrs, mask=inside, other=0.0)
                tl.store(grad_k_ptrs, grad_k.to(grad_k_ptr.dtype.element_ty), mask=inside)

    split = tl.program_id(1).to(tl.int64)
    if DELTA == "summed":
        delta_ptrs = delta_ptr + (split * split_size * 2 + pair * N) + n
        tl.store(delta_ptrs, delta, mask=n < N)
        tl.store(delta_ptrs + split_size, total, mask=n < N)
    else:
        grad_q_ptr += (split * B + image) * N * channels + channel
        grad_q_ptrs = _rows(grad_q_ptr, first_query, channels, BLOCK_N, BLOCK_D)
        tl.store(grad_q_ptrs, (grad_q * scale).to(grad_q_ptr.dtype.element_ty), mask=there)


@cached_plan
def plan_backward(config: MaskedAttentionConfig, sizes: AttentionSizes, steps: tuple[str, ...]) -> AttentionPlan:
    """Launches with these values of DELTA for each block of queries."""
    arguments, keys, query_blocks, splits = shared_arguments(config, sizes)
    launches = tuple(
        _masked_attention_bwd_kernel.plan(
            (sizes.shape[0] * sizes.heads, splits),
            **arguments,
            first_query=first_query,
            DELTA=step,
            ADDS=first_query > 0,
        )
        for first_query in range(0, sizes.shape[1], arguments["BLOCK_N"])
        for step in steps
    )
    return AttentionPlan(keys, splits, query_blocks, launches, plan_reduction(sizes, splits, weighted=False))


def masked_attention_backward(
    grad_out: Tensor, out: Tensor, logsumexp: Tensor, q: Tensor, k: Tensor, v: Tensor, *inputs: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """``fastmask::masked_attention_backward``: the gradients of q, k and v, contiguous; ``inputs`` as in forward."""
    if q.numel() == 0 or k.numel() == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    tensors, mask_logits, sizes, config = read_by_both(BACKWARD_CONFIGS, q, k, v, *inputs, grad_out=grad_out)
    single = q.dtype == torch.float32
    steps = plan_backward(config, sizes, ("summed", "known") if single else ("out",))
    dtype, device = q.dtype, q.device
    grad_q = torch.empty(q.shape, dtype=dtype, device=device)
    parts = grad_q
    if steps.reduction is not None:
        parts = torch.empty((steps.splits, *q.shape), dtype=torch.float32, device=device)
    # Sums over several blocks of queries accumulate in memory, in float32.
    grad_dtype = dtype if steps.query_blocks == 1 else torch.float32
    grad_k, grad_v = (torch.empty(k.shape, dtype=grad_dtype, device=device) for _ in range(2))
    delta = logsumexp.new_empty((steps.splits, 2, *logsumexp.shape)) if single else None
    attended = attended_keys(steps.keys, mask_logits, tensors["padding_ptr"])
    out, logsumexp = out.contiguous(), logsumexp.contiguous()
    for launch in steps.launches:
        launch(
            **tensors,
            **attended,
            out_ptr=out,
            lse_ptr=logsumexp,
            delta_ptr=delta,
            grad_q_ptr=parts,
            grad_k_ptr=grad_k,
            grad_v_ptr=grad_v,
        )
    if steps.reduction is not None:
        steps.reduction(parts_ptr=parts, lse_parts_ptr=None, out_ptr=grad_q, lse_ptr=None)
    return grad_q, grad_k.to(dtype), grad_v.to(dtype)
