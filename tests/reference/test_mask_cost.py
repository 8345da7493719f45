"""The reference matching cost against a loop over pairs, and against transformers' matcher."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from transformers.models.maskformer import modeling_maskformer

from fastmask.reference import mask_cost
from tests.helpers.inputs import reference_inputs

# (h, w) of the logits and (H, W) of the targets: integer factor, odd sizes, one pixel, logits finer than targets
GRIDS = [((4, 4), (8, 8)), ((3, 5), (10, 7)), ((1, 1), (9, 4)), ((7, 9), (5, 6)), ((1, 1), (1, 1))]


make_inputs = partial(reference_inputs, scale=4.0)


def expected_pair(class_row, x, label, target, counted, weights, mask_term, alpha, gamma):
    """One query and one target, on Python floats; ``target`` and ``counted`` lie at full size."""
    h, w = x.shape
    height, width = target.shape
    loss, overlap, total_p, total_t, pixels = 0.0, 0.0, 0.0, 0, 0
    for i in range(h):
        for j in range(w):
            row, column = i * height // h, j * width // w
            if not counted[row, column]:
                continue
            p = 1 / (1 + math.exp(-x[i, j]))
            t = int(target[row, column])
            p_t = p if t else 1 - p
            focal = (alpha if t else 1 - alpha) * (1 - p_t) ** gamma if mask_term == "focal" else 1.0
            loss += focal * -math.log(p_t)
            overlap, total_p, total_t, pixels = overlap + p * t, total_p + p, total_t + t, pixels + 1
    exponentials = [math.exp(value) for value in class_row]
    terms = (
        -exponentials[label] / sum(exponentials),
        loss / max(pixels, 1),
        1 - (2 * overlap + 1) / (total_p + total_t + 1),
    )
    return sum(weight * term for weight, term in zip(weights, terms, strict=True))


@pytest.mark.parametrize("mask_term", ["focal", "bce"])
@pytest.mark.parametrize("with_void", [False, True])
@pytest.mark.parametrize(("grid", "size"), GRIDS)
def test_equals_a_loop_over_pairs(grid, size, with_void, mask_term):
    class_logits, mask_logits, labels, masks, valid = make_inputs(1, grid, size, leading=(2,))
    weights, alpha, gamma = (0.5, 20.0, 1.5), 0.3, 1.7
    counted = valid if with_void else torch.ones_like(valid)
    cost = mask_cost(
        class_logits,
        mask_logits,
        labels,
        masks.to(torch.uint8),
        cost_class=weights[0],
        cost_mask=weights[1],
        cost_dice=weights[2],
        mask_term=mask_term,
        alpha=alpha,
        gamma=gamma,
        valid=valid if with_void else None,
    )
    expected = torch.zeros(2, 3, 6, 3, dtype=torch.float64)
    for layer, b, n, m in np.ndindex(expected.shape):
        if labels[b, m] >= 0:
            expected[layer, b, n, m] = expected_pair(
                class_logits[layer, b, n].tolist(),
                mask_logits[layer, b, n].numpy(),
                int(labels[b, m]),
                masks[b, m].numpy(),
                counted[b].numpy(),
                weights,
                mask_term,
                alpha,
                gamma,
            )
    torch.testing.assert_close(cost, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_equals_the_matcher_of_transformers(seed, monkeypatch):
    class_logits, mask_logits, labels, masks, _ = make_inputs(seed, (5, 6), (20, 13))
    matrices = []

    def record(matrix):
        matrices.append(torch.as_tensor(matrix))
        return linear_sum_assignment(matrix)

    monkeypatch.setattr(modeling_maskformer, "linear_sum_assignment", record)
    matcher = modeling_maskformer.MaskFormerHungarianMatcher(cost_class=1.0, cost_mask=20.0, cost_dice=2.0)
    counts = [3, 1]
    matcher(
        mask_logits[:2],
        class_logits[:2],
        [masks[b, :count].double() for b, count in enumerate(counts)],
        [labels[b, :count] for b, count in enumerate(counts)],
    )
    cost = mask_cost(class_logits, mask_logits, labels, masks, cost_mask=20.0, cost_dice=2.0)
    for b, count in enumerate(counts):
        torch.testing.assert_close(cost[b, :, :count], matrices[b], rtol=1e-12, atol=1e-12)


def test_leading_dimensions_are_independent_problems():
    class_logits, mask_logits, labels, masks, valid = make_inputs(2, (4, 5), (9, 11), leading=(2, 2))
    cost = mask_cost(class_logits, mask_logits, labels, masks, valid=valid)
    assert cost.shape == (2, 2, 3, 6, 3)
    alone = mask_cost(class_logits[1, 0], mask_logits[1, 0], labels, masks, valid=valid)
    torch.testing.assert_close(cost[1, 0], alone, rtol=1e-13, atol=0)


def test_all_void_leaves_the_class_term():
    class_logits, mask_logits, labels, masks, valid = make_inputs(3, (4, 4), (8, 8))
    cost = mask_cost(class_logits, mask_logits, labels, masks, valid=torch.zeros_like(valid))
    torch.testing.assert_close(cost[0], -class_logits[0].softmax(-1)[:, labels[0]])


def test_void_pixels_and_padding_columns_may_hold_anything():
    class_logits, mask_logits, labels, masks, _ = make_inputs(4, (4, 4), (8, 8))
    valid = torch.ones(3, 8, 8, dtype=torch.bool)
    valid[:, :2, :2] = False
    expected = mask_cost(class_logits, mask_logits, labels, masks, valid=valid)
    mask_logits[..., 0, 0] = torch.nan
    masks[..., :2, :2] = True
    masks[labels < 0] = True
    torch.testing.assert_close(mask_cost(class_logits, mask_logits, labels, masks, valid=valid), expected)
    assert (expected[1, :, 1:] == 0).all()
    assert (expected[2] == 0).all()


def test_a_batch_without_targets():
    class_logits, mask_logits, labels, masks, valid = make_inputs(5, (4, 4), (8, 8))
    cost = mask_cost(class_logits, mask_logits, labels[:, :0], masks[:, :0], valid=valid)
    assert cost.shape == (3, 6, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_keeps_the_dtype_of_the_logits(dtype):
    class_logits, mask_logits, labels, masks, valid = make_inputs(6, (4, 4), (8, 8))
    inputs = class_logits.to(dtype), mask_logits.to(dtype)
    cost = mask_cost(*inputs, labels, masks, valid=valid)
    assert cost.dtype == dtype
    expected = mask_cost(*(x.double() for x in inputs), labels, masks, valid=valid)
    # 16 pixels and four roundings of values up to 2
    torch.testing.assert_close(cost.double(), expected, rtol=0, atol=16 * torch.finfo(dtype).eps)


def test_keeps_relative_precision_far_from_zero():
    """At |x| = 30 the probability of the wrong side is 1e-13: all of it must survive in float32."""
    labels, masks = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, 1, 1, dtype=torch.bool)
    for sign in (1.0, -1.0):
        x = torch.full((1, 1, 1, 1), 30.0 * sign)
        cost = mask_cost(
            torch.zeros(1, 1, 2), x, labels, masks == (sign > 0), cost_class=0, cost_dice=0, mask_term="bce"
        )
        torch.testing.assert_close(cost.item(), math.log1p(math.exp(-30)), rtol=1e-6, atol=0)


def test_wrong_arguments_are_named():
    class_logits, mask_logits, labels, masks, valid = make_inputs(7, (4, 4), (8, 8))
    with pytest.raises(ValueError, match="mask_term must be one of 'focal', 'bce', got 'dice'"):
        mask_cost(class_logits, mask_logits, labels, masks, mask_term="dice")
    with pytest.raises(ValueError, match="alpha"):
        mask_cost(class_logits, mask_logits, labels, masks, alpha=-1)
    with pytest.raises(ValueError, match="gamma"):
        mask_cost(class_logits, mask_logits, labels, masks, gamma=-1)
    with pytest.raises(ValueError, match=r"class_logits has shape \(2, 6, 5\); expected \(\.\.\., 3, 6, \?\)"):
        mask_cost(class_logits[:2], mask_logits, labels, masks)
    with pytest.raises(ValueError, match="masks has shape"):
        mask_cost(class_logits, mask_logits, labels, masks[:, :2])
    with pytest.raises(ValueError, match="valid has shape"):
        mask_cost(class_logits, mask_logits, labels, masks, valid=valid[:, 1:])
