"""Panoptic inference's winners and areas, for the battery of operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastmask.ops._geometry import Geometry
from fastmask.ops._registry import choose_backend
from fastmask.ops.panoptic import PANOPTIC_WINNERS
from fastmask.reference._common import reads_nan
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

# resize_probabilities, clip_to_mask, mask_threshold; the last two take all pixels and none.
OPTIONS: dict[str, tuple[bool, bool, float]] = {
    "maskformer": (False, False, 0.5),
    "mask2former": (False, True, 0.45),
    "huggingface": (True, False, 0.5),
    "huggingface, clipped": (True, True, 0.3),
    "threshold 0": (False, True, 0.0),
    "threshold 1": (True, True, 1.0),
}


def make_scores(generator: torch.Generator, batch: int = 2, queries: int = 9) -> Tensor:
    """``(B, N)``, a third of them dropped."""
    scores = torch.rand(batch, queries, generator=generator) * 0.5 + 0.5
    return scores * (torch.rand(batch, queries, generator=generator) > 0.3)


@dataclass(frozen=True)
class Inputs:
    geometry: Geometry
    options: str
    batch: int = 2
    queries: int = 9
    kind: str = "smooth"
    change: Callable[[Arguments, torch.Generator], None] | None = None

    def __call__(self, generator: torch.Generator) -> Arguments:
        names = ("resize_probabilities", "clip_to_mask", "mask_threshold")
        arguments = {
            "scores": make_scores(generator, self.batch, self.queries),
            "mask_logits": make_logits(
                generator, self.geometry.grid, batch=self.batch, queries=self.queries, kind=self.kind
            ),
            **dict(zip(names, OPTIONS[self.options], strict=True)),
            "size": self.geometry.size,
            **steps(self.geometry),
        }
        if self.change is not None:
            self.change(arguments, generator)
        return arguments


def broken_logits(arguments: Arguments, generator: torch.Generator) -> None:
    """Some NaN and infinite ones, and a logit that is NaN in all queries."""
    arguments["mask_logits"] = with_broken_logits(arguments["mask_logits"], generator)
    arguments["mask_logits"][-1, :, 2, 3] = torch.nan


def extreme_logits(arguments: Arguments, generator: torch.Generator) -> None:
    """Whose sigmoid all but underflows: what differs by more than rounding is still told apart."""
    arguments["mask_logits"] = (arguments["mask_logits"] * 3 - 40).clamp(-85, 85)


def all_dropped(arguments: Arguments, generator: torch.Generator) -> None:
    """In the last image."""
    arguments["scores"][-1] = 0


def special_cases(geometry: Geometry) -> Iterator[tuple[str, Case]]:
    for options in OPTIONS:
        yield f"NaN and infinite logits, {options}", Inputs(geometry, options, change=broken_logits)
    yield "probabilities that all but vanish", Inputs(geometry, "maskformer", change=extreme_logits)
    yield "an image of dropped queries", Inputs(geometry, "mask2former", change=all_dropped)
    yield "no queries", Inputs(geometry, "mask2former", queries=0, kind="noise")


CASES: dict[str, Case] = {
    f"{name}, {options}, {kind}": Inputs(geometry, options, kind=kind)
    for name, geometry in GEOMETRIES.items()
    for options in OPTIONS
    for kind in KINDS
}
CASES |= {
    f"{queries} queries": Inputs(GEOMETRIES["four times larger"], "maskformer", queries=queries)
    for queries in (1, 2, 16, 17, 40)
}
CASES |= special_cases(GEOMETRIES["odd sizes"])
# Each geometry, with probabilities resized or logits; the masks' thresholds in turn.
TRITON_CASES: dict[str, Case] = {
    f"{name}, {options}": Inputs(geometry, options, batch=1, queries=18)
    for i, (name, geometry) in enumerate(SMALL_GEOMETRIES.items())
    for options in (list(OPTIONS)[i % 2], list(OPTIONS)[2 + i % 2])
}
TRITON_CASES["40 queries, clipped"] = Inputs(SMALL_GEOMETRIES["both steps"], "mask2former", queries=40)
# More than are put in order at once.
TRITON_CASES["300 queries"] = Inputs(SMALL_GEOMETRIES["both steps"], "mask2former", queries=300)
TRITON_CASES |= {
    f"threshold {end}": Inputs(SMALL_GEOMETRIES["stride 4"], f"threshold {end}", batch=1) for end in (0, 1)
}
TRITON_CASES |= special_cases(SMALL_GEOMETRIES["both steps"])


def operands(arguments: Arguments) -> tuple[Any, ...]:
    names = ("scores", "mask_logits", "resize_probabilities", "clip_to_mask", "mask_threshold")
    return (*(arguments[name] for name in names), *geometry_of(arguments).arguments())


@torch.no_grad()
def winners(*, backend: str = "auto", **arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    backend = choose_backend(PANOPTIC_WINNERS, backend, arguments["mask_logits"])
    return PANOPTIC_WINNERS(backend, *operands(arguments))


def judge(arguments: Arguments, results: dict[str, Tensor]) -> None:
    """Winners and areas equal the reference's in float64 wherever its margins exceed what rounding can move."""
    scores, mask_logits, threshold = arguments["scores"], arguments["mask_logits"], arguments["mask_threshold"]
    geometry, resize = geometry_of(arguments), arguments["resize_probabilities"]
    winner, areas, nan_logits = results.values()
    assert nan_logits.equal(mask_logits.isnan().sum((2, 3), dtype=torch.int32) * (scores > 0))
    if scores.numel() == 0:
        assert (winner == -1).all() and areas.shape == (*scores.shape, 3)
        return
    probabilities = resampled(mask_logits, geometry, torch.float64, probabilities=resize)
    probabilities = probabilities if resize else probabilities.sigmoid()
    kept = (scores > 0)[:, :, None, None] & ~reads_nan(mask_logits, *steps(geometry).values(), geometry.size)
    weighted = (probabilities * scores[:, :, None, None].double()).masked_fill(~kept, -1)
    best, first = weighted.max(1)
    second = weighted.scatter(1, first[:, None], -1).amax(1)
    expected = first.masked_fill(best < 0, -1)
    # A sigmoid moves relatively by what its logit moves, and by roundings of its own.
    rounding = rounding_of(mask_logits) + 16 * torch.finfo(torch.float32).eps
    sure = best - second > rounding * best
    assert sure.double().mean() > 0.9 or best.numel() < 100

    inside = (probabilities >= threshold) & kept
    near = ((probabilities - threshold).abs() <= rounding) & kept
    if arguments["clip_to_mask"]:
        expected = expected.where(inside.gather(1, first[:, None])[:, 0], -1)
        sure &= ~near.gather(1, first[:, None])[:, 0]
    assert (winner == expected)[sure].all()

    won, mask_area, visible = areas.unbind(-1)
    assert ((mask_area - inside.sum((2, 3))).abs() <= near.sum((2, 3))).all()
    queries = torch.arange(scores.shape[1])[:, None, None]
    assert visible.equal((winner[:, None] == queries).sum((2, 3), dtype=torch.int32))
    assert won.sum(1).equal((best >= 0).sum((1, 2), dtype=torch.int32))
    assert (won >= visible).all() and (arguments["clip_to_mask"] or won.equal(visible))


REFUSED: dict[str, Refused] = {
    "scores of another dtype": (changed("scores", Tensor.double), RuntimeError, "scores must be"),
    "scores of other queries": (changed("scores", lambda x: x[:, 1:]), RuntimeError, "scores must be"),
    "threshold": (changed("mask_threshold", lambda _: 2.0), RuntimeError, "mask_threshold"),
    "float64 logits": float64_for_kernels("mask_logits"),
}

PANOPTIC = OpInfo(
    name="panoptic_winners",
    operator="panoptic_winners",
    function=winners,
    outputs=("winner", "areas", "nan_logits"),
    logits=("mask_logits",),
    cases=CASES,
    triton=TRITON_CASES,
    typical=(
        "two steps up, mask2former, noise",
        "odd sizes, huggingface, smooth",
        "smaller than the logits, maskformer, smooth",
        "40 queries, clipped",
        "both steps, huggingface",
    ),
    refused=REFUSED,
    operands=operands,
    judge=judge,
)
