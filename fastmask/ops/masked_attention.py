"""``fastmask::masked_attention``: cross-attention where a query's mask is foreground, and its gradient.

The forward operator also returns ``logsumexp (B, heads, N)``: log sum_s exp(scale q k_s) over the keys s that the query
attends to, before dropout, which is all that backward needs to recompute a weight. Rows without any key hold +inf, so
that exp(score - logsumexp) is 0 there as well. It is float32 on a GPU and float64 on the CPU, where it costs nothing
and spares backward what is otherwise its largest rounding.

With ``dropout_p`` > 0, ``seed`` is an int64 tensor of one element on the tensors' device, so that no value crosses to
the host. The weight of key s for query n in head h of image b is kept where u >= dropout_p, u being the first number of
Philox4x32-10 (Salmon et al., SC 2011) as ``triton.language.rand(seed, ((b * heads + h) * N + n) * S + s)`` has it: all
backends drop the same weights, and backward draws them again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmask.ops.library import Gradient, Operator

TRITON_MAX_HEAD_DIM = 128  # channels; C++ takes any

_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? mask_logits, Tensor? key_padding_mask, SymInt grid_height, "
    "SymInt grid_width, int num_heads, float scale, float dropout_p, Tensor? seed"
)


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask_logits: Tensor | None,
    key_padding_mask: Tensor | None,
    grid_height: int,
    grid_width: int,
    num_heads: int,
    *_: object,
) -> tuple[Tensor, Tensor]:
    batch_size, num_queries, _channels = q.shape
    dtype = torch.float64 if q.device.type == "cpu" else torch.float32
    return q.new_empty(q.shape), q.new_empty((batch_size, num_heads, num_queries), dtype=dtype)


def _fake_backward(
    grad_out: Tensor, out: Tensor, logsumexp: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask_logits, key_padding_mask, *options, seed = inputs
    out, logsumexp = output
    ctx.mark_non_differentiable(logsumexp)
    ctx.save_for_backward(out, logsumexp, q, k, v, mask_logits, key_padding_mask, seed)
    ctx.options = options


def _backward_arguments(ctx: Any, grad_out: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    *tensors, seed = ctx.saved_tensors
    return grad_out, *tensors, *ctx.options, seed


BACKWARD = Operator(
    "masked_attention_backward",
    f"(Tensor grad_out, Tensor out, Tensor logsumexp, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    _fake_backward,
    native=("cpu",),
    triton="masked_attention_backward",
)
OPERATOR = Operator(
    "masked_attention",
    f"({_ARGUMENTS}) -> (Tensor, Tensor)",
    _fake,
    native=("cpu",),
    triton="masked_attention",
    gradient=Gradient(BACKWARD, _save, _backward_arguments),
)
