"""Instance inference's masks, their sums and boxes, for the battery of operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmask.ops._geometry import Geometry
from fastmask.ops._registry import choose_backend
from fastmask.ops.instance import INSTANCE_MASKS
from fastmask.reference._common import reads_nan
from fastmask.testing import assert_within_budget
from tests.helpers import gpu_errors
from tests.helpers.inference_inputs import (
    GEOMETRIES,
    KINDS,
    SMALL_GEOMETRIES,
    geometry_of,
    make_logits,
    resampled,
    rounding_of,
    steps,
    with_broken_logits,
)
from tests.helpers.op_info import Arguments, Case, OpInfo, Refused, changed, float64_for_kernels


def make_queries(generator: torch.Generator, batch: int = 2, queries: int = 9) -> Tensor:
    """``(B, R)``: every query at least once, some again, padding in between."""
    picks = torch.cat([torch.arange(queries), torch.tensor([-1, 0, 3 % queries, 3 % queries, -1])])
    return torch.stack([picks[torch.randperm(len(picks), generator=generator)] for _ in range(batch)])


@dataclass(frozen=True)
class Inputs:
    geometry: Geometry
    batch: int = 2
    queries: int = 9
    picked: int | None = None  # of the masks that are made: all, or the first, of which the last is padding
    kind: str = "smooth"
    packed: bool = False
    change: Callable[[Arguments, torch.Generator], None] | None = None

    def __call__(self, generator: torch.Generator) -> Arguments:
        mask_logits = make_logits(generator, self.geometry.grid, batch=self.batch, queries=self.queries, kind=self.kind)
        queries = make_queries(generator, self.batch, self.queries)
        if self.picked is not None:
            queries = queries[:, : self.picked]
            queries[:, -1:] = -1
        sizes = {"size": self.geometry.size, **steps(self.geometry)}
        arguments = {"mask_logits": mask_logits, "queries": queries, "packed": self.packed, **sizes}
        if self.change is not None:
            self.change(arguments, generator)
        return arguments


def broken_logits(arguments: Arguments, generator: torch.Generator) -> None:
    arguments["mask_logits"] = with_broken_logits(arguments["mask_logits"], generator)
    arguments["mask_logits"][0, 1] = torch.nan


def padding_alone(arguments: Arguments, generator: torch.Generator) -> None:
    arguments["queries"][:] = -1


def special_cases(geometry: Geometry, picked: int | None = None) -> Iterator[tuple[str, Case]]:
    yield "NaN and infinite logits", Inputs(geometry, picked=picked, change=broken_logits)
    yield "padding alone", Inputs(geometry, picked=picked, change=padding_alone)
    yield "no masks", Inputs(geometry, picked=0)


CASES: dict[str, Case] = {
    f"{name}, {kind}{', packed' if packed else ''}": Inputs(geometry, kind=kind, packed=packed)
    for name, geometry in GEOMETRIES.items()
    for kind in KINDS
    for packed in (False, True)
} | dict(special_cases(GEOMETRIES["odd sizes"]))
TRITON_CASES: dict[str, Case] = {name: Inputs(geometry, 1, 6, 5) for name, geometry in SMALL_GEOMETRIES.items()} | dict(
    special_cases(SMALL_GEOMETRIES["both steps"], 5)
)
for name in ("stride 4", "one dimension"):
    TRITON_CASES[f"{name}, packed"] = Inputs(SMALL_GEOMETRIES[name], 1, 6, 5, packed=True)
# Eight pixels are one store, whatever the width; a program makes 32 groups of them, and 32 rows.
for width in (16, 33, 300):
    TRITON_CASES[f"a width of {width}"] = Inputs(Geometry((5, 7), None, None, (20, width)), 2, 6, 5)
TRITON_CASES["several programs a mask"] = Inputs(Geometry((9, 65), None, None, (36, 260)), 1, 6, 5)


def operands(arguments: Arguments) -> tuple[Any, ...]:
    return *(arguments[name] for name in ("mask_logits", "queries", "packed")), *geometry_of(arguments).arguments()


@torch.no_grad()
def masks_of(*, backend: str = "auto", **arguments: Any) -> tuple[Tensor, ...]:
    return INSTANCE_MASKS(choose_backend(INSTANCE_MASKS, backend, arguments["mask_logits"]), *operands(arguments))


def box_of(mask: np.ndarray) -> list[int]:
    """(left, top, right, bottom), the latter two exclusive; zeros for an empty mask."""
    rows, columns = np.nonzero(mask)
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] if len(rows) else [0, 0, 0, 0]


def unpacked(masks: Tensor, width: int) -> Tensor:
    bits = np.unpackbits(masks.numpy(), axis=-1, bitorder="little")
    assert not bits[..., width:].any()
    return torch.from_numpy(bits[..., :width]).bool()


def judge(arguments: Arguments, results: dict[str, Tensor]) -> None:
    """Masks equal the reference's in float64 where a logit is farther from 0 than rounding can move it; the rest
    follows from the masks."""
    masks, foreground, area, boxes, nan_logits = results.values()
    mask_logits, queries, geometry = arguments["mask_logits"], arguments["queries"], geometry_of(arguments)
    masks = unpacked(masks, geometry.size[1]) if arguments["packed"] else masks
    pick = torch.arange(len(queries))[:, None], queries.clamp(min=0)
    present = queries >= 0
    nan = reads_nan(mask_logits, *steps(geometry).values(), geometry.size)[pick]
    exact, same_dtype = (resampled(mask_logits, geometry, dtype)[pick] for dtype in (torch.float64, torch.float32))
    background = nan | ~present[..., None, None]
    assert masks.dtype == torch.bool
    assert (masks == ((exact > 0) & ~background))[(exact.abs() > rounding_of(mask_logits)) | background].all()

    assert area.equal(masks.sum((2, 3), dtype=torch.int32))
    sums = (x.sigmoid().masked_fill(~masks, 0).sum((2, 3)) for x in (same_dtype, exact))
    if masks.numel():
        assert_within_budget(foreground, *sums, name="foreground_sum", gpu=gpu_errors.foreground_sum())
    assert boxes.flatten(0, 1).tolist() == [box_of(mask) for mask in masks.flatten(0, 1).numpy()]
    assert nan_logits.equal(mask_logits.isnan().sum((2, 3), dtype=torch.int32)[pick] * present)


REFUSED: dict[str, Refused] = {
    "a query beyond N": (changed("queries", lambda x: x + 1), RuntimeError, "queries holds 9"),
    "a query below -1": (changed("queries", lambda x: x - 1), RuntimeError, "queries holds -2"),
    "queries of another dtype": (changed("queries", Tensor.int), RuntimeError, "queries must be"),
    "queries of another batch": (changed("queries", lambda x: x[:1]), RuntimeError, "queries must be"),
    "float64 logits": float64_for_kernels("mask_logits"),
}

INSTANCE = OpInfo(
    name="instance_masks",
    operator="instance_masks",
    function=masks_of,
    outputs=("masks", "foreground_sum", "area", "boxes", "nan_logits"),
    logits=("mask_logits",),
    cases=CASES,
    triton=TRITON_CASES,
    typical=("two steps up, smooth", "odd sizes, noise, packed", "both steps", "stride 4, packed"),
    refused=REFUSED,
    operands=operands,
    judge=judge,
)
