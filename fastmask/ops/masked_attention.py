"""Cross-attention in which each query attends where its own mask is foreground, and its gradient.

``fastmask::masked_attention`` also returns ``logsumexp (B, heads, N)``: log sum_s exp(scale q k_s) over the keys s
that the query attends to, before dropout. Backward recomputes the weights from it. Rows without any key hold +inf, so
that exp(score - logsumexp) is 0 there, too. It is float32 on a GPU and float64 on the CPU, where float64 costs nothing
and avoids the largest rounding error of backward.

With ``dropout_p`` > 0, ``seed`` is an int64 tensor of one element on the tensors' device, so that no value crosses to
the host. The weight of key s for query n in head h of image b is kept where u >= dropout_p. Here u is the first number
of Philox4x32-10 (Salmon et al., SC 2011), as ``triton.language.rand(seed, ((b * heads + h) * N + n) * S + s)`` returns
it: all backends drop the same weights, and backward draws the same numbers again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmask.ops._checks import check_floating, computing_dtype
from fastmask.ops._registry import Gradient, Operator, choose_backend


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask_logits: Tensor | None,
    *,
    grid: tuple[int, int],
    num_heads: int,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """softmax(scale q k^T + M) v, with M = 0 where the query's mask, resampled to the key grid, is >= 0, else -inf.

    Mask2Former (arXiv:2112.01527), equations 2 and 3. The mask logits are resampled bilinearly (align_corners=False)
    inside the kernel, once for all heads; sigmoid(x) >= 0.5 is x >= 0. A query without any foreground among the keys
    that are not padding attends to all of those; padded keys are never attended to, whatever they hold. A key that
    reads a NaN or -inf mask logit is background; otherwise one that reads +inf is foreground; a logit of weight 0 is
    not read. Nothing of size N * S, such as a mask, is stored. Arithmetic is float32.

    Args:
        q: ``(B, N, E)`` float, projected queries; head i owns channels ``i * E / num_heads`` onward. N may be 0.
        k, v: ``(B, S, E)``, projected keys and values, row by row over the grid, in the dtype of ``q``.
        mask_logits: ``(B, N, h, w)`` float of any dtype, the previous layer's masks at any resolution; None masks
            nothing, which is plain cross-attention.
        grid: (height, width) of the keys; height * width = S.
        num_heads: the number of heads, which divides E.
        scale: the factor on q k^T; (E / num_heads) ** -0.5 by default.
        key_padding_mask: ``(B, S)`` bool, True for keys that are padding.
        dropout_p: the probability, 0..1, of dropping a weight; the others are scaled by 1 / (1 - dropout_p).
        backend: "auto", "reference", "native" or "triton". The C++ kernels take any head dimension E / num_heads, the
            Triton kernels up to 128; beyond that, "auto" takes the reference on a GPU.

    Returns:
        ``(B, N, E)`` in the dtype of ``q``, heads side by side, before any output projection; 0 for images whose keys
        are all padding. Differentiable once with respect to ``q``, ``k`` and ``v``; the mask has no gradient.

    Raises:
        ValueError: shapes, devices or options that do not fit.
        TypeError: inputs that are not floating point or not of one dtype, or a padding mask that is not bool.
        RuntimeError: the requested backend cannot run.
    """
    _check_queries_and_keys(q, k, v, grid, num_heads)
    _check_masks(q, k, mask_logits, key_padding_mask)
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p must lie in 0..1, got {dropout_p}")
    head_dim = q.shape[2] // num_heads
    if scale is None:
        scale = head_dim**-0.5
    asked, backend = backend, choose_backend(MASKED_ATTENTION, backend, q)
    if backend == "triton" and head_dim > TRITON_MAX_HEAD_DIM:
        if asked == "triton":
            raise RuntimeError(
                f"backend='triton' cannot run masked_attention: its kernels take heads of up to {TRITON_MAX_HEAD_DIM} "
                f"channels, got {head_dim}"
            )
        backend = "reference"
    if backend == "reference":
        from fastmask import reference

        dtype = computing_dtype(q)
        return reference.masked_attention(
            q.to(dtype),
            k.to(dtype),
            v.to(dtype),
            None if mask_logits is None else mask_logits.to(computing_dtype(mask_logits)),
            grid=grid,
            num_heads=num_heads,
            scale=scale,
            key_padding_mask=key_padding_mask,
            dropout_p=dropout_p,
        ).to(q.dtype)
    if mask_logits is not None:
        mask_logits = mask_logits.detach()
        if mask_logits.dtype not in MASKED_ATTENTION.dtypes:
            mask_logits = mask_logits.float()
    seed = None
    if dropout_p > 0:
        seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=q.device)
    out, _ = MASKED_ATTENTION(backend, q, k, v, mask_logits, key_padding_mask, *grid, num_heads, scale, dropout_p, seed)
    return out


def _check_queries_and_keys(q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int], num_heads: int) -> None:
    for name, tensor, shape in (("q", q, "(B, N, E)"), ("k", k, "(B, S, E)"), ("v", v, "(B, S, E)")):
        check_floating(name, tensor, 3, shape)
        if tensor.dim() != 3:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {shape}")
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}; expected that of q, {q.dtype}")
        _check_device(name, tensor, q)
    batch_size, _, channels = q.shape
    if len(grid) != 2 or min(grid) < 1:
        raise ValueError(f"grid must be (height, width), both at least 1, got {tuple(grid)}")
    num_keys = grid[0] * grid[1]
    if k.shape[1] != num_keys:
        raise ValueError(f"grid={tuple(grid)} has {num_keys} cells; k of shape {tuple(k.shape)} has {k.shape[1]} keys")
    for name, tensor in (("k", k), ("v", v)):
        if tuple(tensor.shape) != (batch_size, num_keys, channels):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; expected {(batch_size, num_keys, channels)} for q of shape "
                f"{tuple(q.shape)}"
            )
    if num_heads < 1 or channels == 0 or channels % num_heads != 0:
        raise ValueError(f"num_heads={num_heads} does not divide the {channels} channels of q")


def _check_masks(q: Tensor, k: Tensor, mask_logits: Tensor | None, key_padding_mask: Tensor | None) -> None:
    if mask_logits is not None:
        check_floating("mask_logits", mask_logits, 4, "(B, N, h, w)")
        shape = tuple(mask_logits.shape)
        if len(shape) != 4 or shape[:2] != tuple(q.shape[:2]) or 0 in shape[2:]:
            raise ValueError(
                f"mask_logits has shape {shape}; expected ({q.shape[0]}, {q.shape[1]}, h, w), h and w >= 1"
            )
        _check_device("mask_logits", mask_logits, q)
    if key_padding_mask is not None:
        if key_padding_mask.dtype != torch.bool:
            raise TypeError(f"key_padding_mask must be bool, got {key_padding_mask.dtype}")
        if key_padding_mask.shape != k.shape[:2]:
            raise ValueError(
                f"key_padding_mask has shape {tuple(key_padding_mask.shape)}; expected {tuple(k.shape[:2])}"
            )
        _check_device("key_padding_mask", key_padding_mask, q)


def _check_device(name: str, tensor: Tensor, q: Tensor) -> None:
    if tensor.device != q.device:
        raise ValueError(f"{name} is on {tensor.device}, q on {q.device}")


TRITON_MAX_HEAD_DIM = 128  # channels; the C++ kernels have no limit

_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? mask_logits, Tensor? key_padding_mask, SymInt grid_height, "
    "SymInt grid_width, int num_heads, float scale, float dropout_p, Tensor? seed"
)


def _fake(
    q: Tensor, k: Tensor, v: Tensor, mask_logits: Tensor | None, key_padding_mask: Tensor | None, grid_height: int,
    grid_width: int, num_heads: int, *_: object,
) -> tuple[Tensor, Tensor]:  # fmt: skip
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


MASKED_ATTENTION_BACKWARD = Operator(
    "masked_attention_backward",
    f"(Tensor grad_out, Tensor out, Tensor logsumexp, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    _fake_backward,
    native=("cpu",),
    triton="masked_attention_backward",
)
MASKED_ATTENTION = Operator(
    "masked_attention",
    f"({_ARGUMENTS}) -> (Tensor, Tensor)",
    _fake,
    native=("cpu",),
    triton="masked_attention",
    gradient=Gradient(MASKED_ATTENTION_BACKWARD, _save, _backward_arguments),
)
