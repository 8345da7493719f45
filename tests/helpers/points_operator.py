"""The choice of uncertain points, for the battery of operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastmask import reference
from fastmask.ops._registry import choose_backend
from fastmask.ops.uncertain_points import UNCERTAIN_POINTS
from tests.helpers.inputs import SHAPES, random_assignment, random_logits, random_targets
from tests.helpers.mask_operators import POINT_SHAPES, SMALLER
from tests.helpers.op_info import Arguments, Case, OpInfo, Refused, changed, float64_for_kernels

# oversample_ratio and importance_sample_ratio.
USUAL = (3.0, 0.75)
RATIOS = ((1.0, 0.5), (2.5, 1.0), (3.0, 0.0), (7.3, 0.31), (1.0, 1.0), (1.0, 0.0))


@dataclass(frozen=True)
class Inputs:
    shape: tuple[int, ...]
    num_points: int
    ratios: tuple[float, float] = USUAL

    def __call__(self, generator: torch.Generator) -> Arguments:
        targets = random_targets(self.shape, generator, "masks")
        mask_logits = random_logits(self.shape, generator)[1]
        assignment = random_assignment(self.shape, targets, generator)
        counts = (self.num_points, *(int(ratio * self.num_points) for ratio in self.ratios))
        names = ("num_points", "num_candidates", "num_uncertain")
        seed = torch.randint(2**63 - 1, (1,), generator=generator)
        return {"mask_logits": mask_logits, "assignment": assignment, "seed": seed} | dict(
            zip(names, counts, strict=True)
        )


FEW = (1, 2, 5, 3, 3, 11, 14, 20, 20)
CASES: dict[str, Case] = {name: Inputs(shape, 101) for name, shape in SHAPES.items()} | {
    f"{points} points, ratios {ratios}": Inputs(FEW, points, ratios) for points in (1, 2, 64, 500) for ratios in RATIOS
}
TRITON_CASES: dict[str, Case] = {name: Inputs(shape, 90) for name, shape in POINT_SHAPES.items()}
TRITON_CASES |= {"one point": Inputs(SMALLER, 1)} | {f"ratios {ratios}": Inputs(FEW, 64, ratios) for ratios in RATIOS}


def operands(arguments: Arguments) -> tuple[Any, ...]:
    return tuple(arguments.values())


@torch.no_grad()
def points_of(*, backend: str = "auto", **arguments: Any) -> Tensor:
    backend = choose_backend(UNCERTAIN_POINTS, backend, arguments["mask_logits"])
    points: Tensor = UNCERTAIN_POINTS(backend, *operands(arguments))
    return points


def judge(arguments: Arguments, results: dict[str, Tensor]) -> None:
    """Candidates and others are those of the reference's stream, and no candidate left out is clearly less certain."""
    (points,) = results.values()
    mask_logits, assignment, seed, num_points, candidates, uncertain = operands(arguments)
    stream = reference.random_points(seed, assignment.numel(), candidates + num_points - uncertain)
    matched = assignment.flatten() >= 0
    assert points.shape == (*assignment.shape, num_points, 2)
    points = points.view(-1, num_points, 2)
    assert not points[~matched].any()
    assert torch.equal(points[matched, uncertain:], stream[matched, candidates:])
    logits = torch.take_along_dim(mask_logits.double(), assignment.clamp(min=0)[..., None, None], -3).flatten(0, 2)
    certainty = reference.sample_points(logits, stream[:, :candidates].double()).abs()
    rounding = 1e-6 * logits.abs().amax((1, 2))
    for row in matched.nonzero().squeeze(1).tolist():
        chosen = (stream[row, :candidates, None] == points[row, None, :uncertain]).all(-1).any(1)
        assert chosen.sum() == uncertain
        if 0 < uncertain < candidates:
            assert certainty[row, chosen].max() <= certainty[row, ~chosen].min() + rounding[row]


REFUSED: dict[str, Refused] = {
    "more uncertain points than points": (
        changed("num_uncertain", lambda _: 102),
        RuntimeError,
        "num_uncertain must lie in",
    ),
    "float64 logits": float64_for_kernels("mask_logits"),
}

POINTS = OpInfo(
    name="uncertain_points",
    operator="uncertain_points",
    function=points_of,
    outputs=("points",),
    logits=("mask_logits",),
    cases=CASES,
    triton=TRITON_CASES,
    typical=("odd sizes", "usual", "small", "ratios (7.3, 0.31)"),
    refused=REFUSED,
    operands=operands,
    judge=judge,
)
