"""Masked attention, for the battery of operators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastmask import masked_attention
from fastmask.testing import GpuError
from tests.helpers import gpu_errors
from tests.helpers.op_info import HALVES, Arguments, Case, OpInfo, Refused

# (B, N, heads, channels of a head, key grid, size of the mask logits): each shape is there for a reason. Where a result
# has few elements, chance decides whether the reference's largest error or the kernel's is twice the other.
Shape = tuple[int, int, int, int, tuple[int, int], tuple[int, int]]
SHAPES: dict[str, Shape] = {
    "usual": (2, 20, 4, 32, (16, 16), (32, 32)),
    "odd sizes": (3, 7, 3, 24, (5, 7), (13, 9)),
    "one of everything": (1, 1, 1, 1, (1, 1), (1, 1)),
    "one key": (2, 5, 2, 16, (1, 1), (8, 8)),
    "a key more than a block": (8, 3, 2, 16, (3, 11), (6, 6)),
    "grid finer than the logits": (1, 4, 2, 16, (17, 23), (3, 5)),
    "grid of the logits' size": (1, 9, 2, 16, (12, 10), (12, 10)),
    "one row": (1, 6, 2, 20, (1, 70), (4, 100)),
    "one column": (1, 6, 2, 20, (70, 1), (100, 4)),
    "two rows": (1, 6, 2, 20, (2, 21), (4, 84)),
    "three columns": (1, 6, 2, 20, (21, 3), (42, 3)),
    "patches beyond the grid": (1, 6, 2, 20, (9, 19), (18, 38)),
    "groups of heads": (1, 130, 5, 64, (9, 12), (36, 48)),
    "several blocks of queries": (1, 300, 2, 16, (8, 8), (16, 16)),
    "wide heads": (1, 10, 2, 128, (6, 6), (12, 12)),
    "wider than the GPU's": (1, 3, 1, 200, (4, 4), (8, 8)),
    "many keys": (1, 12, 1, 32, (128, 128), (64, 64)),
    "no queries": (2, 0, 2, 8, (2, 2), (3, 3)),
    "no images": (0, 3, 2, 8, (2, 2), (3, 3)),
}
SMALL: Shape = (2, 7, 2, 24, (5, 7), (13, 9))
SEVERAL_BLOCKS: Shape = (1, 6, 2, 16, (11, 29), (13, 17))
SLOW = ("usual", "several blocks of queries", "wide heads", "many keys", "wider than the GPU's", "groups of heads")
TRITON_SHAPES = {name: shape for name, shape in SHAPES.items() if name not in SLOW} | {
    "several blocks of queries": (1, 70, 1, 16, (3, 5), (6, 7)),
    "several blocks of keys": SEVERAL_BLOCKS,
}


def random_inputs(shape: Shape, generator: torch.Generator, *, padding: bool = False) -> tuple[Any, ...]:
    """q, k, v, mask_logits, and the other arguments by name."""
    batch_size, num_queries, heads, head_dim, grid, mask_size = shape
    keys = grid[0] * grid[1]
    q, k, v = (torch.randn(batch_size, n, heads * head_dim, generator=generator) for n in (num_queries, keys, keys))
    # Coarse noise and fine noise: blobs with rough edges, of which many queries see nothing in whole blocks of keys.
    mask_logits = torch.randn(batch_size, num_queries, *mask_size, generator=generator)
    mask_logits += 4 * torch.randn(batch_size, num_queries, 1, 1, generator=generator)
    padding_mask = torch.rand(batch_size, keys, generator=generator) < 0.4 if padding else None
    return q, k, v, mask_logits, {"grid": grid, "num_heads": heads, "key_padding_mask": padding_mask}


def output_and_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask_logits: Tensor | None,
    grad_out: Tensor,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> tuple[Tensor, ...]:
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in (q, k, v)]
    out = masked_attention(*leaves, mask_logits, **options)
    return out.detach(), *torch.autograd.grad(out, leaves, grad_out.to(out.dtype))


@dataclass(frozen=True)
class Inputs:
    shape: Shape
    padding: bool = False
    masked: bool = True
    scale: float | None = None
    change: Callable[[Arguments], Arguments] = dict

    def __call__(self, generator: torch.Generator) -> Arguments:
        q, k, v, mask_logits, options = random_inputs(self.shape, generator, padding=self.padding)
        masks = mask_logits if self.masked else None
        return self.change({"q": q, "k": k, "v": v, "mask_logits": masks, **options, "scale": self.scale})


def an_image_of_padding(arguments: Arguments) -> Arguments:
    arguments["key_padding_mask"][1] = True
    return arguments


def foreground_in_padding(arguments: Arguments) -> Arguments:
    """Which is no foreground."""
    (rows, columns), mask_logits = arguments["grid"], arguments["mask_logits"]
    mask_logits[..., : mask_logits.shape[-2] // 2, :], mask_logits[..., mask_logits.shape[-2] // 2 :, :] = -1, 1
    arguments["key_padding_mask"][:, rows // 2 * columns :] = True
    return arguments


def regions_apart(arguments: Arguments) -> Arguments:
    """Of the first queries in a corner, of the others in the opposite one: most keys belong to no query."""
    mask_logits, half = arguments["mask_logits"], arguments["q"].shape[1] // 2
    h, w = mask_logits.shape[-2:]
    regions = torch.full_like(mask_logits, -1)
    regions[:, :half, : h // 4, : w // 4], regions[:, half:, h - h // 4 :, w - w // 4 :] = 1, 1
    return arguments | {"mask_logits": regions}


def cases(shapes: dict[str, Shape], small: Shape) -> dict[str, Case]:
    found: dict[str, Case] = {
        f"{name}{', padded' if padding else ''}": Inputs(shape, padding)
        for name, shape in shapes.items()
        for padding in (False, True)
    }
    for name, shape in {"small": small, "one key": SHAPES["one key"], "blocks": SEVERAL_BLOCKS}.items():
        for padding in (False, True):
            found[f"without masks, {name}{', padded' if padding else ''}"] = Inputs(shape, padding, masked=False)
    found |= {f"scale {scale}": Inputs(small, scale=scale) for scale in (-0.7, 0.0, 0.01, 3.0)}
    found["heads of 17 channels"] = Inputs((1, 5, 2, 17, (5, 9), (10, 18)))
    found["heads of 33 channels"] = Inputs((1, 5, 2, 33, (5, 9), (10, 18)))
    found["heads of 64 channels"] = Inputs((1, 5, 2, 64, (5, 9), (10, 18)))
    found["heads of 100 channels"] = Inputs((1, 5, 2, 100, (5, 9), (10, 18)))
    found["regions apart"] = Inputs((2, 9, 2, 16, (13, 22), (26, 44)), padding=True, change=regions_apart)
    found["an image of padding alone"] = Inputs(small, padding=True, change=an_image_of_padding)
    aligned: Shape = (1, 3, 2, 16, (4, 8), (4, 8))
    if shapes is SHAPES:
        apart: Shape = (1, 300, 2, 16, (12, 16), (12, 16))
        found["regions of blocks of queries apart"] = Inputs(apart, change=regions_apart)
    found["foreground in padding alone"] = Inputs(aligned, padding=True, change=foreground_in_padding)
    return found


def corrupt(arguments: Arguments) -> dict[str, Tensor]:
    """NaN in a query: its row, and all that its image's keys gather."""
    arguments["q"][0, 3] = torch.nan
    rows, image = (
        torch.zeros(arguments["q"].shape, dtype=torch.bool),
        torch.zeros(arguments["k"].shape, dtype=torch.bool),
    )
    rows[0, 3], image[0] = True, True
    return {"out": rows, "gradient of q": rows, "gradient of k": image, "gradient of v": image}


def given(**changes: Any) -> Callable[[Arguments], Arguments]:
    return lambda arguments: arguments | changes


REFUSED: dict[str, Refused] = {
    "grid": (given(grid=(3, 5)), ValueError, r"grid=\(3, 5\) has 15 cells; k of shape \(3, 35, 72\) has 35 keys"),
    "empty grid": (given(grid=(0, 35)), ValueError, r"grid must be \(height, width\), both at least 1, got \(0, 35\)"),
    "heads": (given(num_heads=5), ValueError, "num_heads=5 does not divide the 72 channels"),
    "no heads": (given(num_heads=0), ValueError, "num_heads=0 does not divide"),
    "one image's queries": (given(q=torch.zeros(7, 72)), ValueError, r"q has shape \(7, 72\); expected \(B, N, E\)"),
    "integer queries": (given(q=torch.zeros(3, 7, 72, dtype=torch.int32)), TypeError, "q must be floating point"),
    "values": (given(v=torch.zeros(3, 34, 72)), ValueError, r"v has shape \(3, 34, 72\); expected \(3, 35, 72\)"),
    "values of another dtype": (given(v=torch.zeros(3, 35, 72).half()), TypeError, "v has dtype torch.float16"),
    "mask of other queries": (given(mask_logits=torch.zeros(3, 6, 4, 4)), ValueError, "mask_logits has shape"),
    "mask without pixels": (given(mask_logits=torch.zeros(3, 7, 0, 4)), ValueError, "mask_logits has shape"),
    "boolean mask": (given(mask_logits=torch.zeros(3, 7, 4, 4) > 0), TypeError, "mask_logits must be floating point"),
    "mask elsewhere": (given(mask_logits=torch.zeros(3, 7, 4, 4, device="meta")), ValueError, "mask_logits is on meta"),
    "float padding": (given(key_padding_mask=torch.zeros(3, 35)), TypeError, "key_padding_mask must be bool"),
    "padding": (given(key_padding_mask=torch.zeros(3, 34) > 0), ValueError, "key_padding_mask has shape"),
    "dropout": (given(dropout_p=1.5), ValueError, r"dropout_p must lie in 0\.\.1, got 1.5"),
    "backend": (given(backend="cuda"), ValueError, "backend must be one of"),
}  # fmt: skip


def gpu_error(arguments: Arguments, dtype: torch.dtype) -> tuple[GpuError, ...]:
    head_dim = arguments["q"].shape[-1] // arguments["num_heads"]
    return gpu_errors.masked_attention(arguments["k"].shape[1], head_dim, tensor_cores=dtype != torch.float32)


def operands(arguments: Arguments) -> tuple[Any, ...]:
    names = ("q", "k", "v", "mask_logits", "key_padding_mask")
    return (*(arguments[name] for name in names), *arguments["grid"], arguments["num_heads"], 0.5, 0.0, None)


MASKED_ATTENTION = OpInfo(
    name="masked_attention",
    operator="masked_attention",
    function=masked_attention,
    outputs=("out",),
    logits=("q", "k", "v"),
    cases=cases(SHAPES, SHAPES["odd sizes"]),
    triton=cases(TRITON_SHAPES, SMALL),
    typical=("odd sizes, padded", "usual, padded", "wide heads, padded", "without masks, small"),
    corrupt=corrupt,
    refused=REFUSED,
    operands=operands,
    gpu_error=gpu_error,
    output_dtype=None,
    differentiable=("q", "k", "v"),
    backward_operands=lambda outputs: (torch.ones_like(outputs[0]), *outputs),
    own_products=HALVES,
    compiled_only=(torch.bfloat16,),  # products
    backends=("native", "triton"),  # tests/gpu/test_masked_attention_cuda.py has shapes and inputs of its own
)


def check_attention(
    q: Tensor, k: Tensor, v: Tensor, mask_logits: Tensor | None, backend: str = "native", **options: Any
) -> Tensor:
    """The output, once it and the gradients are within the error budget of the reference."""
    arguments = {"q": q, "k": k, "v": v, "mask_logits": mask_logits, **options}
    return MASKED_ATTENTION.check(arguments, q.dtype, backend)["out"]


def attended_keys(
    mask_logits: Tensor, padding: Tensor | None, grid: tuple[int, int], block: int
) -> tuple[Tensor, Tensor]:
    """The bits as ``(B, N, S)`` bool and the occupied blocks ``(B, ceil(N / 4), blocks)``, by the kernel."""
    from fastmask.kernels import attended_keys as kernels

    shape, strides = mask_logits.shape, mask_logits.stride()
    has_padding = padding is not None
    plan = kernels.plan_attended_keys(mask_logits.device, shape[0], shape[1], shape, strides, has_padding, grid, block)
    arguments = kernels.attended_keys(plan, mask_logits, padding.view(torch.uint8) if has_padding else None)
    bits = (arguments["bits_ptr"].mT[..., None] >> torch.arange(64)) & 1  # [B, N, words, 64]
    keys = grid[0] * grid[1]
    assert not bits.flatten(2)[..., keys:].any()
    return bits.flatten(2)[..., :keys] != 0, arguments["occupied_ptr"] != 0
