"""Deformable attention of Mask2Former's pixel decoder, between its projections: every pixel of three levels is a query.

The points are those of a trained decoder in kind: around each query's own position, most of them a few pixels away.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.agreement import ErrorBudget
from benchmarks.harness.machine import Work
from benchmarks.harness.providers import compiled, fastmask_backends
from benchmarks.harness.registry import Case, Operation, Provider
from fastmask import deformable_attention, reference

HEADS, HEAD_DIM, POINTS = 8, 32, 4
SPREAD = 3.0  # standard deviation, in pixels of a level, of the points around a query
LEVELS = ((64, 64), (32, 32), (16, 16))  # strides 8, 16 and 32 of 512 x 512

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Attention:
    """``value (B, S, heads, dim)``, ``locations (B, S, heads, L, P, 2)`` and ``weights (B, S, heads, L, P)``.

    Args:
        grad_out: ``(B, S, heads * dim)``, or None for forward alone.
    """

    value: Tensor
    levels: tuple[tuple[int, int], ...]
    locations: Tensor
    weights: Tensor
    grad_out: Tensor | None


def case(images: int, suite: str, dtypes: tuple[str, ...], *, backward: bool) -> Case:
    name = f"B{images} levels 64, 32, 16" + ("" if backward else ", forward")
    return Case(name, {"images": images, "levels": LEVELS, "backward": backward}, (suite,), dtypes)


CASES = (
    Case("quick", {"images": 1, "levels": ((6, 8), (3, 4)), "backward": True}, ("quick",)),
    *(case(2, "cpu", ("float32", "bfloat16"), backward=backward) for backward in (True, False)),
    *(case(16, "gpu", ("bfloat16", "float32"), backward=backward) for backward in (True, False)),
)


def make_inputs(sizes: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> Attention:
    """8 heads of 32 channels, 4 points per level. Locations and weights are float32, as under autocast."""
    generator = torch.Generator().manual_seed(1)
    levels, images = sizes["levels"], sizes["images"]
    centers = torch.cat([pixel_centers(*size) for size in levels])  # [S, 2]
    pixels = len(centers)
    leading = (images, pixels, HEADS, len(levels), POINTS)
    scale = torch.tensor([(width, height) for height, width in levels])[:, None]  # [L, 1, 2]
    offsets = SPREAD * torch.randn(*leading, 2, generator=generator)
    positions = centers[:, None, None, None] * scale - 0.5 + offsets
    # Away from the pixels' centers, where the derivative by a location jumps and rounding decides it.
    positions = positions.floor() + (positions - positions.floor()).clamp(1e-3, 1 - 1e-3)
    value = torch.randn(images, pixels, HEADS, HEAD_DIM, generator=generator)
    weights = torch.randn(*leading[:3], len(levels) * POINTS, generator=generator).softmax(-1).view(leading)
    grad_out = torch.randn(images, pixels, HEADS * HEAD_DIM, generator=generator) if sizes["backward"] else None
    return Attention(
        value.to(device, dtype),
        levels,
        ((positions + 0.5) / scale).to(device),
        weights.to(device),
        None if grad_out is None else grad_out.to(device, dtype),
    )


def pixel_centers(height: int, width: int) -> Tensor:
    """``(H * W, 2)``, (x, y) in 0..1."""
    y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
    return torch.stack([x, y], -1).flatten(0, 1)


def with_gradients(inputs: Attention, attend: Attend) -> Callable[[], Any]:
    """A call of ``attend(value, locations, weights)``, and of its backward where there is a gradient."""
    tensors = inputs.value, inputs.locations, inputs.weights
    if inputs.grad_out is None:

        @torch.no_grad()
        def call() -> tuple[Tensor, ...]:
            return (attend(*tensors),)
    else:
        leaves = [x.detach().requires_grad_() for x in tensors]

        def call() -> tuple[Tensor, ...]:
            out = attend(*leaves)
            return out.detach(), *torch.autograd.grad(out, leaves, inputs.grad_out.to(out.dtype))

    return call


def named(raw: tuple[Tensor, ...], inputs: Attention) -> dict[str, Tensor]:
    return dict(zip(("out", "grad_value", "grad_locations", "grad_weights"), raw, strict=False))


def by_reference(inputs: Attention, dtype: torch.dtype) -> dict[str, Tensor]:
    tensors = inputs.value, inputs.locations, inputs.weights, inputs.grad_out
    value, locations, weights, grad_out = (None if x is None else x.to(dtype) for x in tensors)
    cast = Attention(value, inputs.levels, locations, weights, grad_out)
    return named(with_gradients(cast, lambda v, x, w: reference.deformable_attention(v, inputs.levels, x, w))(), cast)


def oracle(inputs: Attention) -> ErrorBudget:
    return ErrorBudget(by_reference(inputs, torch.float64), by_reference(inputs, torch.float32))


def work(inputs: Attention) -> Work:
    """Every tensor is read or written once in forward; in backward each is read, and its gradient written."""
    points, rows = inputs.locations.nbytes + inputs.weights.nbytes, inputs.value.nbytes
    forward = Work(points + 2 * rows)  # the output is as large as the values: every pixel is a query
    return forward if inputs.grad_out is None else forward + Work(2 * points + 3 * rows)


def prepare_fastmask(inputs: Attention, backend: str) -> Callable[[], Any]:
    return with_gradients(inputs, lambda v, x, w: deformable_attention(v, inputs.levels, x, w, backend=backend))


*KERNELS, REFERENCE = fastmask_backends("deformable_attention", "value", prepare_fastmask, named)


def transformers_provider(name: str, *, compile: bool = False) -> Provider:
    """What transformers' Mask2Former, OneFormer and Deformable DETR run. ``grid_sample`` needs one dtype: under
    autocast that is float32."""

    def prepare(inputs: Attention) -> Callable[[], Any]:
        from transformers.models.mask2former.modeling_mask2former import multi_scale_deformable_attention

        attend = compiled(multi_scale_deformable_attention, inputs.value.device) if compile else (
            multi_scale_deformable_attention
        )  # fmt: skip
        levels = list(inputs.levels)
        return with_gradients(inputs, lambda v, x, w: attend(v.float(), levels, x, w).to(v.dtype))

    return Provider(name, prepare, named, error_factor=20.0, compiles=compile)


OPERATION = Operation(
    title="Deformable attention of a pixel decoder's layer, 8 heads of 32 channels, 4 points per level",
    cases=CASES,
    providers=(
        *KERNELS,
        transformers_provider("transformers"),
        transformers_provider("transformers, torch.compile", compile=True),
        REFERENCE,
    ),
    baseline="transformers",
    make_inputs=make_inputs,
    oracle=oracle,
    work=work,
)
