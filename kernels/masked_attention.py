"""Masked attention: first the bits of the attended keys, then a pass over the keys that skips the blocks to which no
query attends.

Time of forward at B=16, 8 heads of 32, N=100 (two blocks of 64) in bf16 on 132 SMs, for key grids of 64 x 64 (32 x 32
and 16 x 16 in parentheses):

- memory: keys and values are 67 MB, 16 us at 4.2 TB/s (4 and 1 us); two programs read each, the second from L2;
- instructions: 9.9 per query and key in the machine code for sm_90, of which two for the mask, a maximum, a product, an
  exponential, a sum and half a conversion make 6.5: 21 us of issue slots (5.3 and 1.3 us);
- special functions: one per query and key, 17 us (4.3 and 1.1 us); tensor cores: 8.6 GFLOP, 11 us.

Two programs per SM (256) are resident at once, so the keys are split over programs only if there are fewer images.
"""

from __future__ import annotations

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
from fastmask.kernels._attention_configs import FORWARD_CONFIGS, MaskedAttentionConfig
from fastmask.kernels._launch import cached_plan, kernel
from fastmask.kernels.attended_keys import (
    _attends,
    _lowest_block,
    _occupied_blocks,
    _readable,
    attended_keys,
)


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
