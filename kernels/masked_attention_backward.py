"""Masked attention, backward: bits of the attended keys, then one pass over the keys for all three gradients.

With few queries a program holds all of them, and the gradient of q, while it walks over a split of the keys: each block
of keys is read once, its gradients written once, and five products do where separate passes for q and for keys take
seven. More queries than a program holds come in turns, which add to the gradients of keys and values in memory; the
splits' gradients of q are added in their order. Nothing is atomic.

At B=16, 8 heads of 32, N=100 (a block of 128) in bf16 on 132 SMs, for a key grid of 64 x 64: keys, values and their
gradients are 134 MB, 32 us at 4.2 TB/s; 12.2 instructions a query and key, in the machine code for sm_90, are 26 us of
issue slots; exponentials 17 us; 21 GFLOP on tensor cores 28 us. Smaller grids take time in proportion.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from fastmask.kernels._common import kernel, power_of_two
from fastmask.kernels.attended_keys import _attends, _lowest_block, _occupied_blocks
from fastmask.kernels.masked_attention import (
    LOG2_E,
    MaskedAttentionConfig,
    _kept,
    add_splits,
    config_of_heads,
    launch_arguments,
)

# As in forward. Products of 64 keys with queries run on warp groups; on other GPUs a warp holds whole operands.
_DROPOUT = MaskedAttentionConfig(queries=64, keys=32, warp_queries=8, num_stages=1, registers=255)
BACKWARD_CONFIGS = {
    "half": {
        9: {
            32: MaskedAttentionConfig(queries=256, keys=64, warp_queries=32, num_stages=3, least_warps=8),
            64: MaskedAttentionConfig(queries=128, keys=64, warp_queries=16),
            128: MaskedAttentionConfig(queries=64, keys=32, warp_queries=8),
        },
        10: {
            32: MaskedAttentionConfig(queries=128, keys=64, warp_queries=16),
            64: MaskedAttentionConfig(queries=128, keys=32, warp_queries=16),
            128: MaskedAttentionConfig(queries=128, keys=32, warp_queries=16),
        },
        None: {
            32: MaskedAttentionConfig(queries=128, keys=64, warp_queries=16),
            64: MaskedAttentionConfig(queries=64, keys=32, warp_queries=8),
            128: MaskedAttentionConfig(queries=64, keys=32, warp_queries=8, num_stages=1),
        },
    },
    "half, dropout": {
        None: {
            32: _DROPOUT,
            64: _DROPOUT,
            128: MaskedAttentionConfig(queries=32, keys=32, warp_queries=4, num_stages=1, registers=255),
        }
    },
    "float32": {
        None: {
            32: MaskedAttentionConfig(queries=32, keys=32, warp_queries=4),
            64: MaskedAttentionConfig(queries=32, keys=32, warp_queries=4),
            128: MaskedAttentionConfig(queries=16, keys=16, warp_queries=2, registers=255),
        }
    },
}


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
    P = exp(scale q k^T - logsumexp), and P', dP' what dropout makes of P and of the gradient dO V^T of its result:

        dV = P'^T dO,  dS = P (dP' - delta),  delta = rowsum(P dP') = rowsum(O dO),  dQ = scale dS K,  dK = scale dS^T Q

    (FlashAttention-2, arXiv:2307.08691, algorithm 2). DELTA is "out" where delta is rowsum(O dO). float32 wants it of
    the very products that it is subtracted from, and of weights that sum to one, which a rounded logsumexp does not
    give: a launch with "summed" adds up rowsum(P dP') and rowsum(P), one with "known" reads them.

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
    r = tl.arange(0, BLOCK_N)
    n = first_query + r  # [BLOCK_N]
    i = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    there = (n < N)[:, None] & (d < HEAD_DIM)[None, :]
    q_ptr += (image * stride_qb + tl.cast(first_query, tl.int64) * stride_qn) * UNIT + channel
    stride_qn = stride_qn * UNIT
    grad_out_ptr += (image * stride_gb + tl.cast(first_query, tl.int64) * stride_gn) * UNIT + channel
    stride_gn = stride_gn * UNIT
    # [BLOCK_N, BLOCK_D]
    q = tl.load(q_ptr + (r[:, None] * stride_qn + d[None, :]), mask=there, other=0.0)
    g = tl.load(grad_out_ptr + (r[:, None] * stride_gn + d[None, :]), mask=there, other=0.0)
    delta = tl.zeros([BLOCK_N], dtype=tl.float32)
    total = tl.zeros([BLOCK_N], dtype=tl.float32)
    split_size = tl.cast(B, tl.int64) * heads * N
    if DELTA == "out":
        out_ptr += (image * N + first_query) * channels + channel
        out = tl.load(out_ptr + (r[:, None] * channels + d[None, :]), mask=there, other=0.0)
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
                start = tl.cast(first + block, tl.int64) * BLOCK_S * channels
                zeros = tl.zeros([BLOCK_S, BLOCK_D], dtype=grad_k_ptr.dtype.element_ty)
                tl.store(grad_k_ptr + start + (i[:, None] * channels + d[None, :]), zeros, mask=inside)
                tl.store(grad_v_ptr + start + (i[:, None] * channels + d[None, :]), zeros, mask=inside)
        for _ in range(count):
            lowest, block = _lowest_block(remaining)
            remaining ^= lowest
            block += first
            s = block * BLOCK_S + i  # [BLOCK_S]
            inside = (s < S)[:, None] & (d < HEAD_DIM)[None, :]
            readable = s < S
            if HAS_PADDING:
                readable = readable & (tl.load(padding_ptr + s, mask=readable, other=1) == 0)
            in_keys = readable[:, None] & (d < HEAD_DIM)[None, :]
            start = tl.cast(block, tl.int64) * BLOCK_S
            k = tl.load(k_ptr + start * stride_ks + (i[:, None] * stride_ks + d[None, :]), mask=in_keys, other=0.0)
            v = tl.load(v_ptr + start * stride_vs + (i[:, None] * stride_vs + d[None, :]), mask=in_keys, other=0.0)
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
                grad_v_ptrs = grad_v_ptr + start * channels + (i[:, None] * channels + d[None, :])
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
                grad_k_ptrs = grad_k_ptr + start * channels + (i[:, None] * channels + d[None, :])
                if ADDS:
                    grad_k += tl.load(grad_k_ptrs, mask=inside, other=0.0)
                tl.store(grad_k_ptrs, grad_k.to(grad_k_ptr.dtype.element_ty), mask=inside)

    split = tl.program_id(1).to(tl.int64)
    if DELTA == "summed":
        delta_ptrs = delta_ptr + (split * split_size * 2 + pair * N) + n
        tl.store(delta_ptrs, delta, mask=n < N)
        tl.store(delta_ptrs + split_size, total, mask=n < N)
    else:
        grad_q_ptr += ((split * B + image) * N + first_query) * channels + channel
        grad_q_ptrs = grad_q_ptr + (r[:, None] * channels + d[None, :])
        tl.store(grad_q_ptrs, (grad_q * scale).to(grad_q_ptr.dtype.element_ty), mask=there)


def masked_attention_backward(
    grad_out: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask_logits: Tensor | None,
    key_padding_mask: Tensor | None,
    grid_height: int,
    grid_width: int,
    num_heads: int,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``fastmask::masked_attention_backward``: the gradients of q, k and v, contiguous."""
    if q.numel() == 0 or k.numel() == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    batch, queries, channels = q.shape
    config = config_of_heads(BACKWARD_CONFIGS, q, channels // num_heads, dropout_p)
    block_queries = power_of_two(queries, min(64, config.queries), config.queries)
    arguments, splits = launch_arguments(
        config, block_queries, batch * num_heads, q, k, v, mask_logits, key_padding_mask, (grid_height, grid_width),
        num_heads, scale, dropout_p, seed, grad_out,
    )  # fmt: skip
    grad_q = q.new_empty(q.shape)
    parts = grad_q if splits == 1 else grad_q.new_empty((splits, *q.shape), dtype=torch.float32)
    # Sums over several blocks of queries stay in memory until they are complete.
    grad_dtype = k.dtype if queries <= block_queries else torch.float32
    grad_k, grad_v = (k.new_empty(k.shape, dtype=grad_dtype) for _ in range(2))
    single = q.dtype == torch.float32
    delta = logsumexp.new_empty((splits, 2, *logsumexp.shape)) if single else None
    for first_query in range(0, queries, block_queries):
        for step in ("summed", "known") if single else ("out",):
            _masked_attention_bwd_kernel[(batch * num_heads, splits)](
                **arguments,
                out_ptr=out.contiguous(),
                lse_ptr=logsumexp.contiguous(),
                delta_ptr=delta,
                grad_q_ptr=parts,
                grad_k_ptr=grad_k,
                grad_v_ptr=grad_v,
                first_query=first_query,
                DELTA=step,
                ADDS=first_query > 0,
            )
    if splits > 1:
        add_splits(parts, None, grad_q, None, num_heads)
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)
