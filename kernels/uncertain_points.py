"""Random points of each matched pair, most of them where its query's mask is least certain.

Candidates are never stored: one launch stores their uncertainties as keys; PyTorch's top-k chooses; and a second launch
draws the chosen points again. At B=16, L=10, M=20 and 37,632 candidates per pair (120 M of them, four logits each) the
keys take 482 MB; the candidates themselves would take twice as much.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask.kernels._common import COMPILER_OPTIONS, _plane, kernel, plane_arguments
from fastmask.kernels._layout import with_contiguous_planes
from fastmask.kernels._points import _philox, _sample, _uniform

BLOCK = 256


@kernel
def _uncertain_points_keys_kernel(
    logits_ptr, stride_l, stride_b, stride_n, assignment_ptr, seed_ptr, keys_ptr,
    B, N, M, h, w, CANDIDATES: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """-abs(x) of each candidate of a pair, where x is the sampled logit; 1 if x is NaN.

    logits (L, B, N, h, w), assignment (L, B, M), keys (L * B * M, CANDIDATES); 0 for targets without a query
    """
    pair = tl.program_id(0).to(tl.int64)
    counter = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    first = counter // 16 * 32 + counter % 16
    query = tl.load(assignment_ptr + pair)
    sampled = tl.where((query >= 0) & (query < N), CANDIDATES, 0)
    seed = tl.load(seed_ptr)
    layer_image = pair // M
    plane_ptr = _plane(logits_ptr, layer_image // B, layer_image % B, query, stride_l, stride_b, stride_n, UNIT)
    x_0, y_0, x_1, y_1 = _philox(seed, counter, pair)
    for half in tl.static_range(2):
        i = first + 16 * half
        px = _uniform(x_1 if half else x_0)
        py = _uniform(y_1 if half else y_0)
        x = _sample(plane_ptr, px, py, h, w, i < sampled)
        key = tl.where(x == x, -tl.abs(x), 1.0)
        tl.store(keys_ptr + pair * CANDIDATES + i, key, mask=i < CANDIDATES)


@kernel
def _uncertain_points_gather_kernel(
    assignment_ptr, seed_ptr, chosen_ptr, points_ptr, N, P,
    CANDIDATES: tl.constexpr, UNCERTAIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The chosen candidates of each pair, followed by points of the random stream after the candidates.

    chosen (L * B * M, UNCERTAIN), points (L * B * M, P, 2); 0 for targets without a query
    """
    pair = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    chosen = tl.load(chosen_ptr + pair * UNCERTAIN + j, mask=j < UNCERTAIN, other=0).to(tl.int32)
    i = tl.where(j < UNCERTAIN, chosen, CANDIDATES + j - UNCERTAIN)
    query = tl.load(assignment_ptr + pair)
    matched = (query >= 0) & (query < N)
    x_0, y_0, x_1, y_1 = _philox(tl.load(seed_ptr), i // 32 * 16 + i % 16, pair)
    second = i // 16 % 2 != 0
    x = tl.where(matched, _uniform(tl.where(second, x_1, x_0)), 0.0)
    y = tl.where(matched, _uniform(tl.where(second, y_1, y_0)), 0.0)
    at = points_ptr + (pair * P + j) * 2
    tl.store(at, x, mask=j < P)
    tl.store(at + 1, y, mask=j < P)


def uncertain_points(
    mask_logits: Tensor, assignment: Tensor, seed: Tensor, num_points: int, num_candidates: int, num_uncertain: int
) -> Tensor:
    """``fastmask::uncertain_points``, (L, B, M, P, 2) float32; launches only, so it can be captured in a CUDA graph."""
    points = mask_logits.new_empty((*assignment.shape, num_points, 2), dtype=torch.float32)
    pairs = assignment.numel()
    if pairs == 0:
        return points
    mask_logits = with_contiguous_planes(mask_logits)
    assignment, seed = assignment.contiguous(), seed.contiguous()
    _, batch, queries, h, w = mask_logits.shape
    chosen = assignment.new_empty((pairs, 0))
    if num_uncertain > 0:
        keys = points.new_empty((pairs, num_candidates))
        _uncertain_points_keys_kernel[(pairs, triton.cdiv(triton.cdiv(num_candidates, 32) * 16, BLOCK))](
            **plane_arguments(mask_logits),
            assignment_ptr=assignment,
            seed_ptr=seed,
            keys_ptr=keys,
            B=batch,
            N=queries,
            M=assignment.shape[2],
            h=h,
            w=w,
            CANDIDATES=num_candidates,
            BLOCK=BLOCK,
            num_warps=4,
            **COMPILER_OPTIONS,
        )
        chosen = keys.topk(num_uncertain, dim=1, sorted=False).indices
    _uncertain_points_gather_kernel[(pairs, triton.cdiv(num_points, BLOCK))](
        assignment_ptr=assignment,
        seed_ptr=seed,
        chosen_ptr=chosen,
        points_ptr=points,
        N=queries,
        P=num_points,
        CANDIDATES=num_candidates,
        UNCERTAIN=num_uncertain,
        BLOCK=BLOCK,
        num_warps=4,
        **COMPILER_OPTIONS,
    )
    return points
