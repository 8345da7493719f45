"""The matching cost, at all pixels and at points: what the battery of operators does not ask of every operator."""

from __future__ import annotations

import pytest
import torch

from fastmask import MaskTerm, Targets, mask_cost
from tests.helpers.inputs import SHAPES, random_logits, random_points, random_targets
from tests.helpers.mask_operators import cost
from tests.helpers.op_info import Arguments

AT_POINTS = pytest.mark.parametrize("at_points", [False, True], ids=["all pixels", "points"])


def inputs_of(shape: tuple[int, ...], generator: torch.Generator, at_points: bool, form: str = "segments") -> Arguments:
    targets = random_targets(shape, generator, form)
    class_logits, mask_logits = random_logits(shape, generator)
    points = random_points(generator, shape[1], 400) if at_points else None
    return {"class_logits": class_logits, "mask_logits": mask_logits, "targets": targets, "points": points}


@pytest.mark.parametrize("backend", ["native", "triton"], indirect=True)
@pytest.mark.parametrize("only", range(3), ids=["cost_class", "cost_mask", "cost_dice"])
def test_each_term_alone(only, backend, generator):
    operator = cost(tuple(float(i == only) for i in range(3)), 0)
    table, name = (operator.cases, "usual, masks") if backend == "native" else (operator.triton, "masks")
    operator.check(table[name](generator), torch.float32, backend)


@AT_POINTS
def test_leading_dimensions(at_points, generator):
    inputs = inputs_of(SHAPES["usual"], generator, at_points)
    costs = mask_cost(**inputs)
    logits = {name: inputs[name] for name in ("class_logits", "mask_logits")}
    assert torch.equal(mask_cost(**inputs | {name: x[1] for name, x in logits.items()}), costs[1])
    assert torch.equal(mask_cost(**inputs | {name: x[None] for name, x in logits.items()})[0], costs)


def test_some_queries_are_read_in_place(generator):
    inputs = inputs_of(SHAPES["usual"], generator, at_points=False)
    some = {name: inputs[name][:, :, 1::2] for name in ("class_logits", "mask_logits")}
    assert torch.equal(mask_cost(**inputs | some), mask_cost(**inputs)[:, :, 1::2])


@AT_POINTS
def test_equal_masks_and_segments_cost_the_same(at_points, generator):
    inputs = inputs_of(SHAPES["odd sizes"], generator, at_points)
    of = inputs["targets"]
    masks = Targets(of.labels, of.counts, masks=of.dense_masks(), valid=of.valid_pixels())
    for ignore_void in (False, True):
        term = MaskTerm("bce", ignore_void=ignore_void)
        one, other = mask_cost(**inputs, term=term), mask_cost(**inputs | {"targets": masks}, term=term)
        if at_points:
            assert torch.equal(one, other)
        else:  # sums over runs and over bytes
            torch.testing.assert_close(one, other)


def test_points_of_nan_are_background(generator):
    inputs = inputs_of(SHAPES["usual"], generator, at_points=True)
    options = {"term": MaskTerm("bce"), "cost_dice": 0.0}
    inputs["class_logits"] = torch.zeros_like(inputs["class_logits"])
    costs = mask_cost(**inputs | {"points": torch.full_like(inputs["points"], torch.nan)}, **options)
    nothing = {"mask_logits": torch.zeros_like(inputs["mask_logits"]), "points": torch.full((2, 1, 2), 3.0)}
    torch.testing.assert_close(costs, mask_cost(**inputs | nothing, **options))


@AT_POINTS
def test_large_half_precision_logits_do_not_overflow(at_points, generator):
    mask_logits = torch.tensor([[6e4, -6e4], [6e4, 6e4]], dtype=torch.float16).expand(1, 1, 1, 2, 2)
    targets = Targets.from_segments(torch.zeros(1, 2, 2, dtype=torch.uint8), [torch.tensor([0])])
    points = random_points(generator, 1, 50) if at_points else None
    assert mask_cost(torch.zeros(1, 1, 1, 2, dtype=torch.float16), mask_logits, targets, points).isfinite().all()
