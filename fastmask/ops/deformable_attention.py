"""Multi-scale deformable attention, and its gradient.

``fastmask::deformable_attention`` takes locations and weights in float32, whatever the dtype of the values, and
``spatial_shapes`` flat: height and width of each level. Backward is deterministic: nothing is added atomically.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmask.ops._checks import check_floating, computing_dtype
from fastmask.ops._registry import Gradient, Operator, choose_backend
from fastmask.ops._tracing import as_size, known


def deformable_attention(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]] | Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """sum_l sum_p A_lp V_l(x_lp, y_lp) in each head, where V_l(x, y) is the bilinear sample of level l.

    Deformable DETR (arXiv:2010.04159), equation 3, between its two projections. (0, 0) is the upper left corner of a
    level's upper left pixel and (1, 1) the lower right corner of its lower right pixel (align_corners=False). Pixels
    beyond the border are 0. A point a pixel or more outside, or at NaN, contributes nothing and has no gradient,
    whatever its weight. Nothing of the size queries x heads x levels x points x dim is stored. Arithmetic is float32.

    Args:
        value: ``(B, S, heads, dim)`` float, the projected pixels of all levels, one level after another, row by row.
        spatial_shapes: (H, W) of each of the L levels; S is the sum of H * W. Instead of pairs it may be an integer
            tensor ``(L, 2)``; for one on a GPU, the host waits.
        sampling_locations: ``(B, Q, heads, L, P, 2)`` float, (x, y) of each point, in 0..1 inside the level. Q may
            be 0. Locations and weights may have other dtypes than ``value``: bfloat16 resolves half a pixel of 128.
        attention_weights: ``(B, Q, heads, L, P)`` float, usually with the sum 1 over levels and points.
        backend: "auto", "reference", "native" or "triton". "reference" uses ``grid_sample``, or gathers rows while
            ``torch.export`` traces it, so that the program contains only operators that every runtime has. The C++
            kernels have no limits; the Triton kernels take up to 8 levels and 256 channels. Beyond that, "auto" takes
            the reference on a GPU.

    Returns:
        ``(B, Q, heads * dim)`` in the dtype of ``value``, heads side by side. Differentiable once with respect to
        ``value``, ``sampling_locations`` and ``attention_weights``.

    Raises:
        ValueError: shapes, devices or options that do not fit.
        TypeError: inputs that are not floating point, or sizes that are not integers.
        RuntimeError: the requested backend cannot run.
    """
    sizes = _check_levels(spatial_shapes)
    _check_tensors(value, sizes, sampling_locations, attention_weights)
    tensors = value, sampling_locations, attention_weights
    dtype = computing_dtype(*tensors)
    widest = next((x for x in tensors if x.dtype == torch.float64), value)
    asked, backend = backend, choose_backend(DEFORMABLE_ATTENTION, backend, widest)
    levels, dim = len(sizes), value.shape[3]
    if backend == "triton" and (levels > TRITON_MAX_LEVELS or dim > TRITON_MAX_HEAD_DIM):
        if asked == "triton":
            raise RuntimeError(
                f"backend='triton' cannot run deformable_attention: its kernels take up to {TRITON_MAX_LEVELS} levels "
                f"and {TRITON_MAX_HEAD_DIM} channels of a head, got {levels} and {dim}"
            )
        backend = "reference"
    if backend == "reference":
        from fastmask import reference

        attend = reference.deformable_attention
        if torch.compiler.is_exporting():
            attend = reference.gathered_deformable_attention
        value, sampling_locations, attention_weights = (x.to(dtype) for x in tensors)
        return attend(value, sizes, sampling_locations, attention_weights).to(tensors[0].dtype)
    flat_sizes = [side for size in sizes for side in size]
    return DEFORMABLE_ATTENTION(backend, value, sampling_locations.float(), attention_weights.float(), flat_sizes)


def _check_levels(spatial_shapes: Sequence[tuple[int, int]] | Tensor) -> list[tuple[int, int]]:
    """(H, W) of each level as Python integers."""
    given = spatial_shapes
    if isinstance(given, Tensor):
        if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
            raise TypeError(f"spatial_shapes must hold integers, got {given.dtype}")
        if given.dim() != 2 or given.shape[1] != 2:
            raise ValueError(f"spatial_shapes has shape {tuple(given.shape)}; expected (L, 2)")
        given = given.tolist()
    given = list(given)
    if len(given) == 0 or any(len(size) != 2 for size in given):
        raise ValueError(f"spatial_shapes must be (height, width) of at least one level, got {given}")
    sizes = [as_size(size) for size in given]
    if any(known(side < 1) or known(side > MAX_SIDE) for size in sizes for side in size):
        raise ValueError(f"spatial_shapes must have sides of at least 1 and at most {MAX_SIDE}, got {sizes}")
    return sizes


def _check_tensors(
    value: Tensor, sizes: list[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> None:
    named = {
        "value": (value, "(B, S, heads, dim)"),
        "sampling_locations": (sampling_locations, "(B, Q, heads, L, P, 2)"),
        "attention_weights": (attention_weights, "(B, Q, heads, L, P)"),
    }
    for name, (tensor, shape) in named.items():
        check_floating(name, tensor, shape.count(",") + 1, shape)
        if tensor.dim() != shape.count(",") + 1:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {shape}")
        if tensor.device != value.device:
            raise ValueError(f"{name} is on {tensor.device}, value on {value.device}")
    batch_size, num_values, heads, dim = value.shape
    if heads == 0 or dim == 0:
        raise ValueError(f"value has shape {tuple(value.shape)}; expected at least one head and channel")
    num_pixels = sum(height * width for height, width in sizes)
    if num_values != num_pixels:
        raise ValueError(
            f"spatial_shapes={sizes} has {num_pixels} pixels in all; value of shape {tuple(value.shape)} has "
            f"{num_values}"
        )
    _, num_queries, _, _, num_points, _ = sampling_locations.shape
    expected = (batch_size, num_queries, heads, len(sizes), num_points, 2)
    if tuple(sampling_locations.shape) != expected or num_points == 0:
        raise ValueError(
            f"sampling_locations has shape {tuple(sampling_locations.shape)}; expected ({batch_size}, Q, {heads}, "
            f"{len(sizes)}, P, 2), at least one point, for value of shape {tuple(value.shape)} and {len(sizes)} levels"
        )
    if attention_weights.shape != sampling_locations.shape[:-1]:
        raise ValueError(
            f"attention_weights has shape {tuple(attention_weights.shape)}; expected that of sampling_locations "
            f"without its last dimension, {tuple(sampling_locations.shape[:-1])}"
        )


MAX_SIDE = 1 << 24  # pixels; beyond that, a float32 position cannot tell neighbors apart
TRITON_MAX_LEVELS, TRITON_MAX_HEAD_DIM = 8, 256  # the C++ kernels have no limits

_ARGUMENTS = "Tensor value, Tensor sampling_locations, Tensor attention_weights, SymInt[] spatial_shapes"


def _fake(value: Tensor, sampling_locations: Tensor, attention_weights: Tensor, spatial_shapes: list[int]) -> Tensor:
    return value.new_empty((value.shape[0], sampling_locations.shape[1], value.shape[2] * value.shape[3]))


def _fake_backward(
    grad_out: Tensor, value: Tensor, sampling_locations: Tensor, attention_weights: Tensor, spatial_shapes: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    value, sampling_locations, attention_weights = (
        x.new_empty(x.shape) for x in (value, sampling_locations, attention_weights)
    )
    return value, sampling_locations, attention_weights


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.spatial_shapes = inputs
    ctx.save_for_backward(*tensors)


def _backward_arguments(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
    return grad_out, *ctx.saved_tensors, ctx.spatial_shapes


DEFORMABLE_ATTENTION_BACKWARD = Operator(
    "deformable_attention_backward",
    f"(Tensor grad_out, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    _fake_backward,
    native=("cpu",),
    triton="deformable_attention_backward",
)
DEFORMABLE_ATTENTION = Operator(
    "deformable_attention",
    f"({_ARGUMENTS}) -> Tensor",
    _fake,
    native=("cpu",),
    triton="deformable_attention",
    gradient=Gradient(DEFORMABLE_ATTENTION_BACKWARD, _save, _backward_arguments),
)
