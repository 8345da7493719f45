"""The gradient of masked attention: the bits of the attended keys again, then all three gradients in one pass.

With few queries, a program holds all of them, and the gradient of q, while it loops over a split of the keys: it reads
each block of keys once, writes its gradients once, and needs five products; separate passes for q and for keys would
need seven. More queries than a program holds take several launches, which add to the gradients of keys and values in
memory; the splits' gradients of q are added in order. There are no atomics.

At the sizes of ``masked_attention``, with a block of 128 queries and a key grid of 64 x 64, keys, values and their
gradients are 134 MB, 32 us at 4.2 TB/s; 12.2 instructions per query and key are 26 us of issue slots; exponentials
17 us; 21 GFLOP on tensor cores 28 us. The time is proportional to the number of keys.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from fastmask.kernels._attention import (
    LOG2_E,
    AttentionPlan,
    AttentionSizes,
    _kept,
    _rows,
    plan_reduction,
    read_by_both,
    shared_arguments,
)
from fastmask.kernels._attention_configs import BACKWARD_CONFIGS, MaskedAttentionConfig
from fastmask.kernels._launch import cached_plan, kernel
from fastmask.kernels.attended_keys import (
    _attends,
    _lowest_block,
    _occupied_blocks,
    _readable,
    attended_keys,
)


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
