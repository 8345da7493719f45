"""Deformable attention, for the battery of operators."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastmask import deformable_attention
from tests.helpers.op_info import Arguments, Case, OpInfo, Refused, changed

# (B, Q, heads, channels of a head, levels, points of a level): each shape is there for a reason. Where a result has few
# elements, chance decides whether the reference's largest error or the kernel's is twice the other.
Shape = tuple[int, int, int, int, list[tuple[int, int]], int]
SHAPES: dict[str, Shape] = {
    "usual": (2, 50, 4, 32, [(16, 16), (8, 8), (4, 4)], 4),
    "odd sizes": (3, 7, 3, 24, [(5, 7), (13, 9)], 3),
    "one of everything": (64, 1, 1, 1, [(1, 1)], 1),
    "levels of one pixel": (2, 9, 2, 16, [(1, 1), (1, 1), (1, 1)], 2),
    "one row, one column": (2, 9, 2, 16, [(1, 40), (40, 1)], 2),
    "wide heads": (1, 9, 2, 200, [(6, 5)], 4),
    "many points": (2, 9, 2, 8, [(9, 8), (4, 5)], 19),
    "nine levels": (2, 6, 2, 8, [(9 - i, 1 + i) for i in range(9)], 2),
    "several blocks of queries": (1, 200, 2, 16, [(8, 8), (4, 4)], 2),
    "many queries of a pixel": (1, 3000, 1, 4, [(2, 1)], 1),
    "one head": (1, 20, 1, 100, [(10, 10)], 4),
    "no queries": (2, 0, 2, 8, [(2, 2)], 1),
    "no images": (0, 3, 2, 8, [(2, 2)], 1),
}
SMALL: Shape = (2, 6, 1, 16, [(2, 3), (1, 2)], 2)
TRITON_SHAPES: dict[str, Shape] = {
    "small": SMALL,
    "three levels": (1, 5, 2, 12, [(2, 1), (1, 1), (1, 2)], 3),
    "one of everything": (8, 1, 1, 1, [(1, 1)], 1),
    "wide heads": (1, 5, 1, 200, [(2, 2)], 2),
    "eight levels": (1, 3, 1, 8, [(1, 1)] * 8, 1),
    "several blocks of queries": (1, 70, 1, 16, [(2, 2)], 1),
    "no queries": SHAPES["no queries"],
    "no images": SHAPES["no images"],
}
FAR = torch.tensor([math.nan, math.inf, -math.inf, 1e30, -1e30, 3e9, -7.0, 2.5])


@dataclass(frozen=True)
class Inputs:
    shape: Shape
    change: Callable[[Arguments], Arguments] = dict

    def __call__(self, generator: torch.Generator) -> Arguments:
        batch_size, queries, heads, dim, shapes, points = self.shape
        pixels = sum(height * width for height, width in shapes)
        leading = batch_size, queries, heads, len(shapes), points
        sizes = torch.tensor([(width, height) for height, width in shapes])[:, None]  # [L, 1, 2]
        # Up to two pixels outside, and off the pixels' centers, where the derivative by a location jumps.
        near = (torch.rand(*leading, 2, generator=generator) * (sizes + 4)).floor() - 2
        positions = near + 0.02 + 0.96 * torch.rand(*leading, 2, generator=generator)
        return self.change(
            {
                "value": torch.randn(batch_size, pixels, heads, dim, generator=generator),
                "spatial_shapes": shapes,
                "sampling_locations": (positions + 0.5) / sizes,
                "attention_weights": torch.randn(leading, generator=generator).flatten(3).softmax(-1).view(leading),
            }
        )


def far_outside(arguments: Arguments) -> Arguments:
    """Points whose weights are NaN, too."""
    locations, weights = arguments["sampling_locations"], arguments["attention_weights"]
    count = min(len(FAR), locations.shape[1])
    locations[0, :count, 0, 0, 0, 0] = FAR[:count]
    locations[-1, :count, -1, -1, -1, 1] = FAR[:count]
    weights[0, :count, 0, 0, 0] = torch.nan
    return arguments


def on_centers(arguments: Arguments) -> Arguments:
    """Positions that are exact in every dtype."""
    locations = arguments["sampling_locations"]
    sizes = torch.tensor([(width, height) for height, width in arguments["spatial_shapes"]])[:, None]
    arguments["sampling_locations"] = ((locations * sizes).floor() + 0.5) / sizes
    return arguments


def signed_weights(arguments: Arguments) -> Arguments:
    arguments["attention_weights"] = arguments["attention_weights"] * 8 - 2
    return arguments


def cases(shapes: dict[str, Shape], small: Shape) -> dict[str, Case]:
    found: dict[str, Case] = {name: Inputs(shape) for name, shape in shapes.items()}
    found["far outside and NaN"] = Inputs(small, far_outside)
    found["weights of either sign"] = Inputs(small, signed_weights)
    found["on the pixels' centers"] = Inputs((*small[:4], [(2, 4), (1, 1)], small[5]), on_centers)
    return found


def corrupt(arguments: Arguments) -> dict[str, Tensor]:
    """NaN in the weight of a point inside: its query's output in the head, its gradient, and pixels of the head."""
    arguments["sampling_locations"][0, 1, 0, 0, 0] = 0.4
    arguments["attention_weights"][0, 1, 0, 0, 0] = torch.nan
    value, locations = arguments["value"], arguments["sampling_locations"]
    rows = torch.zeros(*locations.shape[:3], value.shape[3], dtype=torch.bool)
    plane, point = torch.zeros(value.shape, dtype=torch.bool), torch.zeros(locations.shape, dtype=torch.bool)
    rows[0, 1, 0], plane[0, :, 0], point[0, 1, 0, 0, 0] = True, True, True
    return {"out": rows.flatten(2), "gradient of value": plane, "gradient of sampling_locations": point}


def given(**changes: Any) -> Callable[[Arguments], Arguments]:
    return lambda arguments: arguments | changes


REFUSED: dict[str, Refused] = {
    "levels of fewer pixels": (
        given(spatial_shapes=[(5, 7), (13, 8)]), ValueError,
        r"spatial_shapes=\[\(5, 7\), \(13, 8\)\] has 139 pixels in all; value of shape \(3, 152, 3, 24\) has 152",
    ),
    "no levels": (given(spatial_shapes=[]), ValueError, "spatial_shapes must be .* of at least one level"),
    "an empty level": (given(spatial_shapes=[(5, 7), (0, 9)]), ValueError, "sides of at least 1"),
    "too wide a level": (given(spatial_shapes=[(1, 2**24 + 1)]), ValueError, "at most 16777216"),
    "levels of one number": (given(spatial_shapes=[(5,), (13,)]), ValueError, r"must be \(height, width\)"),
    "levels as floats": (given(spatial_shapes=torch.ones(2, 2)), TypeError, "spatial_shapes must hold integers"),
    "levels in a row": (given(spatial_shapes=torch.ones(4).int()), ValueError, r"spatial_shapes has shape \(4,\)"),
    "a level too few": (changed("sampling_locations", lambda x: x[:, :, :, :1]), ValueError, "sampling_locations has"),
    "other heads": (changed("sampling_locations", lambda x: x[:, :, :2]), ValueError, "sampling_locations has shape"),
    "three coordinates": (
        changed("sampling_locations", lambda x: torch.cat([x, x[..., :1]], -1)), ValueError, "sampling_locations has"
    ),
    "no points": (
        lambda arguments: arguments | {
            "sampling_locations": arguments["sampling_locations"][..., :0, :],
            "attention_weights": arguments["attention_weights"][..., :0],
        },
        ValueError, "at least one point",
    ),
    "weights of fewer points": (changed("attention_weights", lambda x: x[..., :2]), ValueError, "attention_weights"),
    "value without heads": (changed("value", lambda x: x.flatten(2)), ValueError, r"value has shape \(3, 152, 72\)"),
    "value without channels": (changed("value", lambda x: x[..., :0]), ValueError, "at least one head and channel"),
    "integer value": (changed("value", lambda x: x.int()), TypeError, "value must be floating point"),
    "integer locations": (changed("sampling_locations", lambda x: x.int()), TypeError, "sampling_locations must be fl"),
    "boolean weights": (changed("attention_weights", lambda x: x > 0), TypeError, "attention_weights must be floating"),
    "locations elsewhere": (
        changed("sampling_locations", lambda x: x.to("meta")), ValueError, "sampling_locations is on meta, value on cpu"
    ),
    "backend": (given(backend="cuda"), ValueError, "backend must be one of"),
    "float64 for kernels": (
        lambda arguments: arguments | {"value": arguments["value"].double(), "backend": "native"},
        RuntimeError, "do not support float64",
    ),
}  # fmt: skip


def operands(arguments: Arguments) -> tuple[Any, ...]:
    names = ("value", "sampling_locations", "attention_weights")
    return (*(arguments[name] for name in names), [side for size in arguments["spatial_shapes"] for side in size])


DEFORMABLE_ATTENTION = OpInfo(
    name="deformable_attention",
    operator="deformable_attention",
    function=deformable_attention,
    outputs=("out",),
    logits=("value", "sampling_locations", "attention_weights"),
    cases=cases(SHAPES, SHAPES["odd sizes"]),
    triton=cases(TRITON_SHAPES, SMALL),
    typical=("odd sizes", "small", "usual", "far outside and NaN"),
    corrupt=corrupt,
    refused=REFUSED,
    operands=operands,
    output_dtype=None,
    differentiable=("value", "sampling_locations", "attention_weights"),
    backward_operands=lambda outputs: (torch.ones_like(outputs),),
)
