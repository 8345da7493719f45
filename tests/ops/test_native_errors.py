"""What the operators themselves refuse, and that an error says its cause: sizes that overflow, ranks, memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

MOST = 2**63 - 1


def attention(grid, *, mask=(1, 2, 3, 3), q=(1, 2, 4), k=(1, 6, 4), padding=None):
    zeros = torch.zeros
    v = zeros(k)
    mask_logits = None if mask is None else zeros(mask)
    padding = None if padding is None else zeros(padding, dtype=torch.bool)
    return torch.ops.fastmask.masked_attention(zeros(q), zeros(k), v, mask_logits, padding, *grid, 1, 1.0, 0.0, None)


ATTENTION = {
    "mask logits of one dimension": ({"mask": (5,)}, "mask_logits must be"),
    "mask logits of three": ({"mask": (2, 3, 3)}, "mask_logits must be"),
    "no mask logits in a row": ({"mask": (1, 2, 3, 0)}, "with at least one pixel"),
    "mask logits of another batch": ({"mask": (2, 2, 3, 3)}, "mask_logits must be"),
    "q of two dimensions": ({"q": (2, 4)}, "q must have three dimensions"),
    "k of two dimensions": ({"k": (6, 4)}, "k must have three dimensions"),
    "padding of one dimension": ({"padding": (6,)}, "key_padding_mask must be"),
    "a grid of other keys": ({"grid": (2, 4)}, "S keys of the grid"),
    "a grid of no keys": ({"grid": (0, 6)}, "the grid must have at least one key"),
    "a grid whose product overflows to 0": ({"grid": (2**32, 2**32), "k": (1, 0, 4)}, "S keys of the grid"),
    "a grid whose product overflows to 6": ({"grid": (3 * 2**62 + 3 - 2**63, 2)}, "S keys of the grid"),
    "the largest grid": ({"grid": (MOST, MOST)}, "S keys of the grid"),
}


@pytest.mark.parametrize(("change", "message"), ATTENTION.values(), ids=ATTENTION)
def test_attention(change, message):
    options = {"grid": (2, 3), **change}
    with pytest.raises(RuntimeError, match=message):
        attention(options.pop("grid"), **options)


def test_keys_without_end_are_refused():
    """Keys and values that are one row each, of which there is no copy."""
    k = torch.zeros(1, 1, 4).expand(1, 2**32, 4)
    with pytest.raises(RuntimeError, match="S keys of the grid"):
        torch.ops.fastmask.masked_attention(torch.zeros(1, 2, 4), k, k, None, None, 2**16, 2**16, 1, 1.0, 0.0, None)


def deformable(shapes, *, value=(1, 6, 2, 4), locations=(1, 3, 2, 1, 2, 2), weights=(1, 3, 2, 1, 2), grad_out=None):
    tensors = [torch.zeros(size) for size in (value, locations, weights)]
    if grad_out is not None:
        return torch.ops.fastmask.deformable_attention_backward(torch.zeros(grad_out), *tensors, list(shapes))
    return torch.ops.fastmask.deformable_attention(*tensors, list(shapes))


DEFORMABLE = {
    "fewer pixels": ({"shapes": (1, 5)}, "spatial_shapes has 5 pixels in all, value 6"),
    "more pixels": ({"shapes": (2, 4)}, "whose products add up to the 6 pixels of value"),
    "sides below 0": ({"shapes": (-2, -3)}, "positive sizes"),
    "a product that overflows to 6": ({"shapes": (3 * 2**62 + 3 - 2**63, 2)}, "add up to the 6 pixels"),
    "the largest sides": ({"shapes": (MOST, MOST)}, "add up to the 6 pixels"),
    "no levels": ({"shapes": ()}, "at least one level"),
    "a level without width": ({"shapes": (6,)}, "a height and a width"),
    "value of three dimensions": ({"value": (1, 6, 8)}, "value must be"),
    "no channels": ({"value": (1, 6, 2, 0)}, "value must be"),
    "locations of another level": ({"locations": (1, 3, 2, 2, 2, 2)}, "sampling_locations must be"),
    "weights of other points": ({"weights": (1, 3, 2, 1, 1)}, "attention_weights must be"),
    "gradient of other queries": ({"grad_out": (1, 4, 8)}, "grad_out must be"),
}


@pytest.mark.parametrize(("change", "message"), DEFORMABLE.values(), ids=DEFORMABLE)
def test_deformable_attention(change, message):
    with pytest.raises(RuntimeError, match=message):
        deformable(**{"shapes": (2, 3), **change})


GEOMETRIES = {
    "first row and rows overflow": ((6, 7), (12, 14), 0, MOST, 2, "out_top and out_rows must lie within size"),
    "rows overflow": ((6, 7), (12, 14), 0, 1, MOST, "out_top and out_rows must lie within size"),
    "a row too many": ((6, 7), (12, 14), 0, 1, 12, "out_top and out_rows must lie within size"),
    "first row below 0": ((6, 7), (12, 14), 0, -1, 12, "out_top and out_rows must lie within size"),
    "given rows overflow": ((6, 7), (12, 14), MOST, 0, 12, "must lie within grid"),
    "given rows beyond the grid": ((6, 7), (12, 14), 1, 0, 12, "must lie within grid"),
    "given rows below 0": ((6, 7), (12, 14), -1, 0, 12, "must lie within grid"),
    "grid of other columns": ((6, 8), (12, 14), 0, 0, 12, "must have the columns of grid"),
    "a side of 2^63 - 1": ((6, 7), (MOST, 14), 0, 0, MOST, "size must be less than"),
    "not the rows that are read": ((20, 7), (40, 14), 0, 20, 20, "read the rows 9..20 of grid"),
    "one of three sizes": ((6, 7, 8), (12, 14), 0, 0, 12, "grid must be two sizes"),
}


@pytest.mark.parametrize("operator", ["semantic_inference", "panoptic_winners", "instance_masks"])
@pytest.mark.parametrize("case", GEOMETRIES.values(), ids=GEOMETRIES)
def test_geometry(case, operator):
    grid, size, in_top, out_top, out_rows, message = case
    with pytest.raises(RuntimeError, match=message):
        infer(operator, list(grid), None, None, list(size), in_top, out_top, out_rows)


def infer(operator, *geometry):
    mask_logits = torch.zeros(1, 3, 6, 7)
    first, options = {
        "semantic_inference": ((torch.zeros(1, 3, 2), mask_logits), ("masks", "labels", False)),
        "panoptic_winners": ((torch.ones(1, 3), mask_logits), (False, False, 0.5)),
        "instance_masks": ((mask_logits, torch.zeros(1, 2, dtype=torch.int64)), (False,)),
    }[operator]
    return getattr(torch.ops.fastmask, operator)(*first, *options, *geometry)


@pytest.mark.parametrize("operator", ["panoptic_winners", "instance_masks"])
def test_results_of_too_many_pixels_are_refused_before_anything_is_made(operator):
    side = 2**31 - 2
    with pytest.raises(RuntimeError, match="must be less than 2\\^31 pixels"):
        infer(operator, [6, 7], None, None, [side, side], 0, 0, side)


def test_widths_that_overflow():
    with pytest.raises(RuntimeError, match=r"sides of 1 to 2\^31 - 1"):
        torch.ops.fastmask.rle_encode(torch.zeros(1, 2, 3, dtype=torch.uint8), MOST)


def test_memory_that_a_worker_lacks_is_named():
    """In a process that may take two gigabytes, a pair's candidates take three."""
    code = """
import resource, torch
import fastmask
torch.set_num_threads(2)
logits, assignment = torch.zeros(1, 2, 1, 4, 4), torch.zeros(1, 2, 1, dtype=torch.int64)
torch.ops.fastmask.uncertain_points(logits, assignment, torch.tensor([0]), 4, 64, 4)
used = 4096 * int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30), used + (2 << 30)))
try:
    torch.ops.fastmask.uncertain_points(logits, assignment, torch.tensor([0]), 4, 1 << 28, 4)
except Exception as error:
    print(type(error).__name__, error)
try:
    rows = 2**31 - 2
    logits_and_geometry = torch.zeros(1, 1, 1, 1), "masks", "labels", False, [1, 1], None, None, [rows, 1], 0, 0, rows
    torch.ops.fastmask.semantic_inference(torch.ones(1, 1, 2), *logits_and_geometry)
except Exception as error:
    print(type(error).__name__, error)
points = torch.ops.fastmask.uncertain_points(logits, assignment, torch.tensor([0]), 4, 64, 4)
print(points.shape[-2])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    error, result, points = run.stdout.strip().splitlines()
    assert error.startswith("MemoryError a thread needs ")
    assert "cannot make a result of shape (1, 2147483646, 1): not enough memory" in result
    assert points == "4"
