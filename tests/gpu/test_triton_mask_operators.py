"""The Triton kernels of the matching cost and the mask loss, interpreted or, with --compiled, as PTX: what the battery
of operators does not reach, as it needs other configurations or arguments that the public functions refuse."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch

from fastmask import MaskTerm
from tests.helpers.mask_operators import LOSS_SHAPES, MASK_OPERATORS, SMALL, SMALLER, Inputs
from tests.helpers.op_info import Arguments, OpInfo, assert_same_bits

pytestmark = pytest.mark.usefixtures("triton_kernels")

SMALL_BANDS = {"sums": 16, "backward_points": 32, "backward_warps": 1, "programs": 2}

OPERATORS = {op.operator: op for op in MASK_OPERATORS}


def kernels(name: str) -> Any:
    return import_module(f"fastmask.kernels.{name}")


def drawn(name: str, shape: tuple[int, ...], generator: torch.Generator, form: str = "segments") -> Arguments:
    names = ("class_logits", "mask_logits", "targets") if "cost" in name else ("mask_logits", "targets", "assignment")
    term = MaskTerm("bce" if "point" in name else "focal")
    return Inputs(names, shape, form, term, points=70 if "point" in name else 0)(generator)


@pytest.fixture(
    params=[
        # Several blocks of rows that cross layers, and splits that end beyond the pixels.
        ("mask_cost", (3, 2, 9, 4, 5, 17, 31, 40, 50), {"rows": 16, "least": 128}),
        # Programs that own a few rows and columns of logits each, and share the outputs between them.
        ("mask_loss", (1, 1, 3, 2, 1, 5, 70, 9, 150), {"cells": 32, "outputs": 2, "min_rows": 2, "pixels": 32}),
        ("mask_loss", (1, 1, 3, 2, 1, 5, 38, 20, 152), {"cells": 32, "min_rows": 2, "pixels": 32}),
        ("point_mask_cost", (2, 1, 4, 3, 2, 5, 7, 9, 19), {"programs": 64, "least": 32}),
        # Backward in bands of one row of two strips; and in bins of two rows, as there are more than counters.
        ("point_mask_loss", (2, 1, 4, 3, 2, 5, 7, 9, 19), {"points": 16, "points_per_split": 32} | SMALL_BANDS),
        ("point_mask_loss", (1, 1, 2, 3, 1, 1100, 3, 40, 5), SMALL_BANDS | {"sums": 64}),
    ],
    ids=lambda param: param[0],
)
def small_blocks(request, monkeypatch) -> Iterator[tuple[OpInfo, tuple[int, ...]]]:
    """An operator whose kernels work in small blocks, and a shape that has several of them."""
    name, shape, changes = request.param
    configs = kernels(name).CONFIGS
    monkeypatch.setitem(configs, None, replace(configs[None], **changes))
    yield OPERATORS[name], shape


def test_blocks_and_splits(small_blocks, generator):
    op, shape = small_blocks
    op.check(drawn(op.operator, shape, generator), torch.float32, "triton")


def of_segments(arguments: Arguments, *more: Any) -> tuple[Any, ...]:
    targets = arguments["targets"]
    return targets.labels, None, targets.segments, None, 255, False, *more


def test_a_label_beyond_the_classes_reads_nothing_and_costs_nan(generator):
    arguments = drawn("mask_cost", SMALL, generator)
    run, logits = kernels("mask_cost").mask_cost, (arguments["class_logits"], arguments["mask_logits"])
    options = (1.0, 1.0, 1.0, "focal", 0.25, 2.0)
    expected = run(*logits, *of_segments(arguments, *options))
    arguments["targets"].labels[1, 2] = 1 << 40
    cost = run(*logits, *of_segments(arguments, *options))
    assert cost[:, 1, :, 2].isnan().all()
    cost[:, 1, :, 2] = expected[:, 1, :, 2]
    assert torch.equal(cost, expected)


@pytest.mark.parametrize("name", ["mask_loss", "point_mask_loss"])
def test_a_query_beyond_the_last_reads_nothing(name, generator):
    arguments = drawn(name, SMALLER, generator)
    arguments["assignment"][0, -1, 0] = 1 << 40
    points = () if arguments["points"] is None else (arguments["points"],)
    run = getattr(kernels(name), name)
    *results, _ = run(
        arguments["mask_logits"], arguments["assignment"], *of_segments(arguments, *points, "focal", 0.25, 2.0, False)
    )
    assert not any(result[0, -1, 0].any() for result in results)


def test_the_gradient_does_not_depend_on_the_order_of_the_points(generator):
    """Its sums are exact, and so it does not matter in which order a GPU's atomics arrive."""
    op, arguments = OPERATORS["point_mask_loss"], drawn("point_mask_loss", SMALLER, generator, "masks")
    operands = op.operands(arguments)
    pair_mask, _, *kept = kernels("point_mask_loss").point_mask_loss(*operands, False)
    flipped = op.operands(arguments | {"points": arguments["points"].flip(-2).contiguous()})
    backward = kernels("point_mask_loss").point_mask_loss_backward
    ones = torch.ones_like(pair_mask)
    assert torch.equal(backward(ones, ones, *kept, *operands), backward(ones, ones, *kept, *flipped))


@pytest.mark.parametrize("name", ["mask_cost", "mask_loss"])
def test_void_pixels_may_hold_anything(name, generator):
    """At the logits' size: elsewhere the battery has void over NaN."""
    op, arguments = OPERATORS[name], drawn(name, LOSS_SHAPES["targets at the logits' size"], generator)
    arguments["term"] = MaskTerm(ignore_void=True)
    void = (arguments["targets"].segments == arguments["targets"].void)[None, :, None]
    poisoned = arguments["mask_logits"].masked_fill(void, torch.nan)
    assert_same_bits(op.run(arguments | {"mask_logits": poisoned}, "triton"), op.run(arguments, "triton"))
