"""Masked cross-attention of a decoder layer, from projected queries, keys and values to the heads' outputs.

The masks change at every layer, so whatever a provider makes of them (a dense boolean mask, a block mask) is made in
each timed call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness.agreement import ErrorBudget
from benchmarks.harness.machine import Work
from benchmarks.harness.providers import compiled, fastmask_backends
from benchmarks.harness.registry import Case, Operation, Provider, Unavailable
from benchmarks.ops.inputs import QUICK, TRAINING, build_inputs
from fastmask import masked_attention

CONFIDENT_LAYERS = 2  # the last of two decoder layers: masks as a trained model's, most of them of one region
GRIDS = (16, 32, 64)
CLEAR = 1e-5  # logits on the key grid are at least so far from 0, so that rounding decides nothing


@dataclass(frozen=True)
class Attention:
    """Projected queries ``(B, N, E)``, keys and values ``(B, S, E)``, and the masks of the queries.

    Args:
        mask_logits: ``(B, N, h, w)`` float32.
        grid: of the keys.
        grad_out: ``(B, N, E)``, or None for forward alone.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask_logits: Tensor
    grid: tuple[int, int]
    num_heads: int
    grad_out: Tensor | None

    def heads(self, x: Tensor) -> Tensor:
        """``(B, N or S, E)`` to ``(B, heads, N or S, E / heads)``."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def case(images: int, side: int, masks: str, suite: str, dtypes: tuple[str, ...], *, backward: bool = True) -> Case:
    sizes = {"images": images, "side": side, "masks": masks, "backward": backward}
    name = f"B{images} {side}x{side}, {masks}" + ("" if backward else ", forward")
    return Case(name, sizes, (suite,), dtypes)


CASES = (
    Case("quick", {"images": 1, "side": 8, "masks": "blobs", "backward": True, "scene": QUICK}, ("quick",)),
    *(case(2, side, "blobs", "cpu", ("float32",)) for side in GRIDS),
    *(case(2, side, "noise", "cpu", ("float32",)) for side in GRIDS),
    *(case(2, side, "blobs", "cpu", ("float32",), backward=False) for side in GRIDS),
    *(case(16, side, "blobs", "gpu", ("bfloat16", "float32")) for side in GRIDS),
    *(case(16, side, "noise", "gpu", ("bfloat16",)) for side in GRIDS),
)


def make_inputs(sizes: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> Attention:
    """100 queries, 8 heads of 32 channels, masks at 128 x 128 unless the scene is another."""
    scene = sizes.get("scene", TRAINING) | {"images": sizes["images"], "layers": CONFIDENT_LAYERS}
    mask_logits = build_inputs(torch.float32, torch.device("cpu"), **scene).mask_logits[-1].clone()
    generator = torch.Generator().manual_seed(1)
    if sizes["masks"] == "noise":
        mask_logits = torch.randn(mask_logits.shape, generator=generator)
    grid = (sizes["side"], sizes["side"])
    while (unclear := (on_grid(mask_logits, grid).abs() < CLEAR).any(-1)).any():
        mask_logits[unclear] += 10 * CLEAR
    batch_size, num_queries = mask_logits.shape[:2]
    counts = (num_queries, grid[0] * grid[1], grid[0] * grid[1], num_queries)
    q, k, v, grad_out = (torch.randn(batch_size, n, 256, generator=generator).to(device, dtype) for n in counts)
    return Attention(q, k, v, mask_logits.to(device), grid, 8, grad_out if sizes["backward"] else None)


def on_grid(mask_logits: Tensor, grid: tuple[int, int]) -> Tensor:
    """``(B, N, S)``."""
    return F.interpolate(mask_logits, size=grid, mode="bilinear", align_corners=False).flatten(2)


def excluded_keys(inputs: Attention) -> Tensor:
    """``(B, heads, N, S)`` bool, the mask as Mask2Former's code and transformers make it at each layer."""
    excluded = on_grid(inputs.mask_logits, inputs.grid).sigmoid().unsqueeze(1).repeat(1, inputs.num_heads, 1, 1) < 0.5
    excluded[torch.where(excluded.sum(-1) == excluded.shape[-1])] = False
    return excluded


def with_gradients(inputs: Attention, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], Any]:
    """A call of ``attend(q, k, v)``, and of its backward where there is a gradient; (out, gradients)."""
    if inputs.grad_out is None:

        @torch.no_grad()
        def call() -> tuple[Tensor, ...]:
            return (attend(inputs.q, inputs.k, inputs.v),)
    else:
        leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]

        def call() -> tuple[Tensor, ...]:
            out = attend(*leaves)
            return out.detach(), *torch.autograd.grad(out, leaves, inputs.grad_out)

    return call


def named(raw: tuple[Tensor, ...], inputs: Attention) -> dict[str, Tensor]:
    return dict(zip(("out", "grad_q", "grad_k", "grad_v"), raw, strict=False))


def reference(inputs: Attention, dtype: torch.dtype) -> dict[str, Tensor]:
    """By the reference in ``dtype``, an image at a time."""
    images = []
    for b in range(inputs.q.shape[0]):
        tensors = (inputs.q, inputs.k, inputs.v, inputs.grad_out)
        q, k, v, grad_out = (None if x is None else x[b : b + 1].to(dtype) for x in tensors)
        masks = inputs.mask_logits[b : b + 1]
        one = Attention(q, k, v, masks, inputs.grid, inputs.num_heads, grad_out)
        images.append(with_gradients(one, lambda q, k, v, one=one: attend_with("reference", one, q, k, v))())
    return named(tuple(torch.cat(values) for values in zip(*images, strict=True)), inputs)


def oracle(inputs: Attention) -> ErrorBudget:
    return ErrorBudget(reference(inputs, torch.float64), reference(inputs, torch.float32))


def work(inputs: Attention) -> Work:
    """Two products over the attended pairs of queries and keys in forward, five in backward, and an exponential for
    each pair and head in either (with its scale and sums, 14 operations of a CPU); every tensor is read once, and once
    more in backward, where gradients are written."""
    foreground = on_grid(inputs.mask_logits, inputs.grid) >= 0
    pairs = int(torch.where(foreground.any(-1), foreground.sum(-1), foreground.shape[-1]).sum())
    tensors = inputs.q.nbytes * 2 + inputs.k.nbytes * 2
    weights = exponentials(pairs * inputs.num_heads, inputs.q)
    forward = Work(tensors + inputs.mask_logits.nbytes, flops=4 * pairs * inputs.q.shape[-1]) + weights
    if inputs.grad_out is None:
        return forward
    backward = Work(2 * tensors + inputs.mask_logits.nbytes, flops=10 * pairs * inputs.q.shape[-1])
    return forward + backward + weights


def exponentials(count: int, tensor: Tensor) -> Work:
    return Work(0, specials=count) if tensor.is_cuda else Work(0, operations=14 * count)


def attend_with(backend: str, inputs: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return masked_attention(q, k, v, inputs.mask_logits, grid=inputs.grid, num_heads=inputs.num_heads, backend=backend)


def prepare_fastmask(inputs: Attention, backend: str) -> Callable[[], Any]:
    return with_gradients(inputs, lambda q, k, v: attend_with(backend, inputs, q, k, v))


*KERNELS, REFERENCE = fastmask_backends("masked_attention", "q", prepare_fastmask, named)


def prepare_sdpa(inputs: Attention) -> Callable[[], Any]:
    """``scaled_dot_product_attention`` with the dense mask."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (inputs.heads(x) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=~excluded_keys(inputs))
        return out.transpose(1, 2).flatten(2)

    return with_gradients(inputs, attend)


def prepare_eager(inputs: Attention) -> Callable[[], Any]:
    """What nn.MultiheadAttention runs inside transformers' Mask2Former, which asks it for the weights: two products, a
    float mask and a softmax. The projections, the same for everybody, are left out."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (inputs.heads(x).flatten(0, 1) for x in (q, k, v))
        excluded = excluded_keys(inputs).flatten(0, 1)
        mask = torch.zeros_like(excluded, dtype=q.dtype).masked_fill_(excluded, -torch.inf)
        weights = torch.baddbmm(mask, q * q.shape[-1] ** -0.5, k.mT).softmax(-1)
        return (weights @ v).unflatten(0, (-1, inputs.num_heads)).transpose(1, 2).flatten(2)

    return with_gradients(inputs, attend)


def prepare_flex(inputs: Attention) -> Callable[[], Any]:
    """FlexAttention with a block mask over the queries' masks, one for all heads."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    device = inputs.q.device
    if device.type == "cpu" and inputs.grad_out is not None:
        raise Unavailable("FlexAttention has no backward on the CPU")
    flex = compiled(flex_attention, device)
    make_block_mask = torch.compile(create_block_mask) if device.type == "cuda" else create_block_mask
    (batch_size, num_queries, _), num_keys = inputs.q.shape, inputs.k.shape[1]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        foreground = on_grid(inputs.mask_logits, inputs.grid) >= 0
        attended = foreground | ~foreground.any(-1, keepdim=True)
        block_mask = make_block_mask(
            lambda b, h, n, s: attended[b, n, s], batch_size, None, num_queries, num_keys, device=device
        )
        out = flex(*(inputs.heads(x) for x in (q, k, v)), block_mask=block_mask)
        return out.transpose(1, 2).flatten(2)

    return with_gradients(inputs, attend)


OPERATION = Operation(
    title="Masked cross-attention of a decoder layer, 100 queries, 8 heads of 32 channels, the mask made in each call",
    cases=CASES,
    providers=(
        *KERNELS,
        Provider("SDPA, dense mask", prepare_sdpa, named, error_factor=20.0),
        Provider("eager, as transformers", prepare_eager, named, error_factor=20.0),
        Provider("FlexAttention", prepare_flex, named, error_factor=20.0, compiles=True),
        REFERENCE,
    ),
    baseline="SDPA, dense mask",
    make_inputs=make_inputs,
    oracle=oracle,
    work=work,
)
