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

from fastmask.ops.library import Operator

OPERATOR = Operator("masked_attention", native=("cpu",), triton=True)
TRITON_MAX_HEAD_DIM = 128  # channels; C++ takes any

_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? mask_logits, Tensor? key_padding_mask, SymInt grid_height, "
    "SymInt grid_width, int num_heads, float scale, float dropout_p, Tensor? seed"
)
torch.library.define("fastmask::masked_attention", f"({_ARGUMENTS}) -> (Tensor, Tensor)")
torch.library.define(
    "fastmask::masked_attention_backward",
    f"(Tensor grad_out, Tensor out, Tensor logsumexp, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
)


@torch.library.register_fake("fastmask::masked_attention")
def _(
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


@torch.library.register_fake("fastmask::masked_attention_backward")
def _(
    grad_out: Tensor, out: Tensor, logsumexp: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask_logits, key_padding_mask, *options, seed = inputs
    out, logsumexp = output
    ctx.mark_non_differentiable(logsumexp)
    ctx.save_for_backward(out, logsumexp, q, k, v, mask_logits, key_padding_mask, seed)
    ctx.options = options


def _saved(ctx: Any) -> tuple[Any, ...]:
    """``out``, ``logsumexp`` and the forward operator's arguments."""
    *tensors, seed = ctx.saved_tensors
    return (*tensors, *ctx.options, seed)


def _backward(ctx: Any, grad_out: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return *torch.ops.fastmask.masked_attention_backward(grad_out, *_saved(ctx)), *[None] * 8


torch.library.register_autograd("fastmask::masked_attention", _backward, setup_context=_setup_context)


def _triton(*arguments: Any) -> tuple[Tensor, Tensor]:
    from fastmask.kernels.masked_attention import masked_attention

    return masked_attention(*arguments)


torch.library.impl("fastmask::masked_attention", "cuda", _triton)


def _triton_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    from fastmask.kernels.masked_attention_backward import masked_attention_backward

    return masked_attention_backward(*arguments)


torch.library.impl("fastmask::masked_attention_backward", "cuda", _triton_backward)


class _InterpretedMaskedAttention(torch.autograd.Function):
    """The Triton kernels on CPU tensors, past the dispatcher, which has C++ for them."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        return _triton(*arguments)

    setup_context = staticmethod(_setup_context)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_triton_backward(grad_out, *_saved(ctx)), *[None] * 8


def call(backend: str, q: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Runs the operator on the backend chosen; Triton runs CPU tensors through its interpreter."""
    interpret = backend == "triton" and q.device.type == "cpu"
    run = _InterpretedMaskedAttention.apply if interpret else torch.ops.fastmask.masked_attention
    return run(q, *arguments)
