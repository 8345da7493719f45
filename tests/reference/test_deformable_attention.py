"""The reference deformable attention against a loop over points, the code of transformers, and its form by gathers."""

import math

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck
from transformers.models.mask2former.modeling_mask2former import multi_scale_deformable_attention

from fastmask.reference import deformable_attention, gathered_deformable_attention

SHAPES = [(5, 7), (1, 1), (1, 4), (3, 1)]


def make_inputs(shapes=SHAPES, *, batch_size=2, queries=6, heads=3, dim=4, points=2, dtype=torch.float64):
    pixels = sum(height * width for height, width in shapes)
    value = torch.randn(batch_size, pixels, heads, dim, dtype=dtype)
    locations = torch.rand(batch_size, queries, heads, len(shapes), points, 2, dtype=dtype) * 1.6 - 0.3
    weights = torch.randn(batch_size, queries, heads, len(shapes), points, dtype=dtype)
    return value, shapes, locations, weights


def bilinear(level, x, y):
    """Of a map (H, W, dim) at (x, y) in 0..1, by the definition: each pixel has the share that a tent leaves it."""
    height, width, _ = level.shape
    total = torch.zeros_like(level[0, 0])
    for row, column in np.ndindex(height, width):
        share = max(0, 1 - abs(y * height - 0.5 - row)) * max(0, 1 - abs(x * width - 0.5 - column))
        total += share * level[row, column]
    return total


def expected_attention(value, shapes, locations, weights):
    out = torch.zeros(*locations.shape[:3], value.shape[-1], dtype=value.dtype)
    levels = value.split([height * width for height, width in shapes], 1)
    for b, q, head, level, point in np.ndindex(weights.shape):
        x, y = locations[b, q, head, level, point].tolist()
        if math.isfinite(x) and math.isfinite(y):
            pixels = levels[level][b, :, head].unflatten(0, shapes[level])
            out[b, q, head] += weights[b, q, head, level, point] * bilinear(pixels, x, y)
    return out.flatten(2)


@pytest.mark.parametrize("attend", [deformable_attention, gathered_deformable_attention])
def test_equals_a_loop_over_points(attend):
    value, shapes, locations, weights = make_inputs()
    strange = torch.tensor([math.nan, math.inf, -math.inf, 1e30, -1e30, -0.5])
    locations[0, :, 0, 0, 0, 0] = strange
    locations[1, :, 0, 1, 1, 1] = strange
    expected = expected_attention(value, shapes, locations, weights)
    weights[0, 0, 0, 0, 0] = math.nan  # of the point at NaN
    torch.testing.assert_close(attend(value, shapes, locations, weights), expected)


@pytest.mark.parametrize("attend", [deformable_attention, gathered_deformable_attention])
def test_equals_transformers(attend):
    value, shapes, locations, weights = make_inputs()
    leaves = [x.requires_grad_() for x in (value, locations, weights)]
    expected = multi_scale_deformable_attention(value, shapes, locations, weights)
    actual = attend(value, shapes, locations, weights)
    torch.testing.assert_close(actual, expected)
    grad = torch.randn_like(expected)
    pairs = (torch.autograd.grad(out, leaves, grad) for out in (actual, expected))
    for of_actual, of_expected in zip(*pairs, strict=True):
        torch.testing.assert_close(of_actual, of_expected)


@pytest.mark.parametrize("attend", [deformable_attention, gathered_deformable_attention])
def test_gradients_are_those_of_finite_differences(attend):
    value, shapes, locations, weights = make_inputs([(3, 4), (2, 2)], queries=2, heads=2, dim=3)
    inputs = [x.requires_grad_() for x in (value, locations, weights)]
    assert gradcheck(lambda value, *points: attend(value, shapes, *points), inputs)


@pytest.mark.parametrize("attend", [deformable_attention, gathered_deformable_attention])
def test_points_at_nan_have_no_gradient(attend):
    value, shapes, locations, weights = make_inputs()
    locations[0, 0, 0, 0, 0, 1] = math.nan
    leaves = [x.requires_grad_() for x in (value, locations, weights)]
    grads = torch.autograd.grad(attend(value, shapes, locations, weights).sum(), leaves)
    assert all(grad.isfinite().all() for grad in grads)
    assert not grads[1][0, 0, 0, 0, 0].any()
    assert grads[2][0, 0, 0, 0, 0] == 0


def test_shapes_that_do_not_fit():
    value, shapes, locations, weights = make_inputs()
    with pytest.raises(ValueError, match=r"the levels have 42 pixels; value has shape \(2, 43, 3, 4\)"):
        deformable_attention(value, [(5, 7), (1, 1), (1, 4), (2, 1)], locations, weights)
    with pytest.raises(ValueError, match="sampling_locations has shape"):
        deformable_attention(value, shapes, locations[..., :1], weights)
    with pytest.raises(ValueError, match="attention_weights has shape"):
        deformable_attention(value, shapes, locations, weights[..., :1])
