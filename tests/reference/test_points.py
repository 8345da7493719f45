"""The reference of the point-sampled criterion against loops, known answers, and transformers' own functions."""

import math
from unittest import mock

import pytest
import torch
from torch.autograd import gradcheck
from transformers import Mask2FormerConfig
from transformers.models.mask2former import modeling_mask2former as theirs

from fastmask.reference import mask_cost, mask_loss, random_points, sample_points, uncertain_points

POINTS = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 0.4], [0.5, 1.0], [0.31, 0.77], [0.9999, 0.02], [1.3, 0.5]])


def sample(x, point):
    """The value of map ``x`` at one point: bilinear, pixel centers at half integers, zero beyond the map."""
    height, width = x.shape
    column, row = float(point[0]) * width - 0.5, float(point[1]) * height - 0.5
    total = 0.0
    for i in (math.floor(row), math.floor(row) + 1):
        for j in (math.floor(column), math.floor(column) + 1):
            if 0 <= i < height and 0 <= j < width:
                total += (1 - abs(row - i)) * (1 - abs(column - j)) * float(x[i, j])
    return total


def expected_pair(x, target, valid, points, mask_term, alpha, gamma):
    loss, overlap, total_p, total_t, weight = 0.0, 0.0, 0.0, 0.0, 0.0
    for point in points:
        v = 1 - sample(~valid, point)
        t = sample(target & valid, point)
        p = 1 / (1 + math.exp(-sample(x, point)))
        foreground, background = -math.log(p), -math.log(1 - p)
        if mask_term == "focal":
            foreground *= alpha * (1 - p) ** gamma
            background *= (1 - alpha) * p**gamma
        loss += t * foreground + (v - t) * background
        overlap, total_p, total_t, weight = overlap + p * t, total_p + v * p, total_t + t, weight + v
    return loss / max(weight, 1), 1 - (2 * overlap + 1) / (total_p + total_t + 1)


def make_inputs(generator, grid=(3, 5), size=(6, 7)):
    class_logits = torch.randn(2, 3, 6, 5, generator=generator, dtype=torch.float64) * 2
    mask_logits = torch.randn(2, 3, 6, *grid, generator=generator, dtype=torch.float64) * 3
    labels = torch.tensor([[0, 3, 1], [2, -1, -1], [-1, -1, -1]])
    assignment = torch.tensor([[5, 0, 2], [1, -1, -1], [-1, -1, -1]]).expand(2, 3, 3)
    masks = torch.rand(3, 3, *size, generator=generator) > 0.6
    valid = torch.rand(3, *size, generator=generator) > 0.3
    return class_logits, mask_logits, labels, assignment, masks, valid


def random_and_corners(generator, *leading):
    return torch.cat(
        [POINTS.expand(*leading, -1, -1), torch.rand(*leading, 9, 2, generator=generator)], -2
    )  # [..., 16, 2]


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (5, 3)])
def test_samples_equal_a_loop(size, generator):
    maps = torch.randn(2, *size, generator=generator, dtype=torch.float64)
    points = random_and_corners(generator, 2)
    expected = [[sample(x, point) for point in of_map] for x, of_map in zip(maps, points, strict=True)]
    torch.testing.assert_close(sample_points(maps, points), torch.tensor(expected, dtype=torch.float64))


def test_known_answers_of_the_random_stream():
    """Philox-4x32-7 with counter and key zero gives 5f6fb709 0d893f64 4f121f81 4f730a48 (Random123's kat_vectors)."""
    points = random_points(torch.tensor(0), 1, 49)[0, ::16]
    words = (points.flatten() * 2**16 - 0.5).tolist()
    assert words == [0x5F6F, 0xB709, 0x0D89, 0x3F64, 0x4F12, 0x1F81, 0x4F73, 0x0A48]


def test_random_points_are_uniform_and_differ_by_row_and_seed():
    points = random_points(torch.tensor(-5), 3, 5000)
    assert points.min() > 0
    assert points.max() < 1
    counts = torch.histogramdd(points.reshape(-1, 2), 5, range=[0.0, 1.0, 0.0, 1.0]).hist
    assert (counts - 600).abs().max() < 6 * 600**0.5
    assert points.flatten(0, 1).unique(dim=0).shape[0] == 15_000
    distinct = 65_536 * (1 - math.exp(-30_000 / 65_536))  # of 30,000 draws, with a standard deviation of 57
    assert abs(points.unique().numel() - distinct) < 6 * 57
    assert not torch.equal(random_points(torch.tensor(6), 3, 5000), points)
    assert torch.equal(random_points(torch.tensor(-5), 3, 100), points[:, :100])


@pytest.mark.parametrize("mask_term", ["focal", "bce"])
@pytest.mark.parametrize("with_void", [False, True])
def test_losses_equal_a_loop(with_void, mask_term, generator):
    _, mask_logits, _, assignment, masks, valid = make_inputs(generator)
    points = random_and_corners(generator, 2, 3, 3)
    void = {"valid": valid} if with_void else {}
    counted = valid if with_void else torch.ones_like(valid)
    result = mask_loss(mask_logits, assignment, masks, points, mask_term=mask_term, alpha=0.4, gamma=1.3, **void)
    expected = torch.zeros(2, 2, 3, 3, dtype=torch.float64)  # [mask or dice, L, B, M]
    for layer, b, m in (assignment >= 0).nonzero().tolist():
        x = mask_logits[layer, b, assignment[layer, b, m]]
        pair = expected_pair(x, masks[b, m], counted[b], points[layer, b, m], mask_term, 0.4, 1.3)
        expected[:, layer, b, m] = torch.tensor(pair, dtype=torch.float64)
    torch.testing.assert_close(torch.stack(result), expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("mask_term", ["focal", "bce"])
@pytest.mark.parametrize("with_void", [False, True])
def test_costs_equal_a_loop(with_void, mask_term, generator):
    class_logits, mask_logits, labels, _, masks, valid = make_inputs(generator)
    points = random_and_corners(generator, 3)
    void = {"valid": valid} if with_void else {}
    counted = valid if with_void else torch.ones_like(valid)
    options = {"cost_class": 2.0, "cost_mask": 5.0, "cost_dice": 3.0}
    result = mask_cost(
        class_logits, mask_logits, labels, masks, points, mask_term=mask_term, alpha=0.4, gamma=1.3, **options, **void
    )
    expected = torch.zeros(2, 3, 6, 3, dtype=torch.float64)
    for b, m in (labels >= 0).nonzero().tolist():
        for layer in range(2):
            for n in range(6):
                pair = expected_pair(mask_logits[layer, b, n], masks[b, m], counted[b], points[b], mask_term, 0.4, 1.3)
                probability = float(class_logits[layer, b, n].softmax(-1)[labels[b, m]])
                expected[layer, b, n, m] = -2 * probability + 5 * pair[0] + 3 * pair[1]
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.slow
def test_gradient_of_the_losses(generator):
    _, mask_logits, _, assignment, masks, valid = make_inputs(generator)
    points = random_and_corners(generator, 2, 3, 3).double()
    for mask_term in ("focal", "bce"):
        assert gradcheck(
            lambda x, term=mask_term: mask_loss(x, assignment, masks, points, mask_term=term, valid=valid),
            (mask_logits.requires_grad_(),),
        )


def test_costs_equal_those_of_transformers(generator):
    class_logits, mask_logits, labels, _, masks, _ = make_inputs(generator)
    points = torch.rand(3, 50, 2, generator=generator, dtype=torch.float64)
    result = mask_cost(
        class_logits, mask_logits, labels, masks, points, cost_class=2.0, cost_mask=5.0, cost_dice=4.0, mask_term="bce"
    )
    costs = []

    def keep(cost):
        costs.append(cost)
        return [], []

    matcher = theirs.Mask2FormerHungarianMatcher(cost_class=2.0, cost_mask=5.0, cost_dice=4.0, num_points=50)
    draws = [points[b : b + 1] for b in range(3)]
    with (
        mock.patch.object(theirs, "linear_sum_assignment", keep),
        mock.patch.object(torch, "rand", side_effect=draws),
    ):
        counts = (labels >= 0).sum(1).tolist()
        matcher(
            mask_logits[1],
            class_logits[1],
            [mask[:count].double() for mask, count in zip(masks, counts, strict=True)],
            [label[:count] for label, count in zip(labels, counts, strict=True)],
        )
    for b, cost in enumerate(costs):
        torch.testing.assert_close(result[1, b, :, : cost.shape[1]], cost, rtol=1e-12, atol=1e-12)


def test_uncertain_points_are_those_of_transformers(generator):
    mask_logits = torch.randn(1, 4, 9, 8, generator=generator)
    assignment = torch.tensor([[2, 0, 3]])
    candidates = torch.rand(3, 60, 2, generator=generator)
    fresh = torch.rand(3, 5, 2, generator=generator)
    draws = [candidates, fresh]
    criterion = theirs.Mask2FormerLoss(Mask2FormerConfig(num_labels=3), {})
    with mock.patch.object(torch, "rand", side_effect=draws):
        expected = criterion.sample_points_using_uncertainty(
            mask_logits[0, assignment[0]][:, None], criterion.calculate_uncertainty, 20, 3.0, 0.75
        )
    chosen = uncertain_points(mask_logits, assignment, candidates[None], 15)[0]
    for actual, wanted in zip(chosen, expected[:, :15], strict=True):
        assert {tuple(point) for point in actual.tolist()} == {tuple(point) for point in wanted.tolist()}
    assert torch.equal(expected[:, 15:], fresh)


def test_uncertain_points_take_nan_first_and_of_equals_the_earlier():
    mask_logits = torch.tensor([0.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0, float("nan")]).expand(1, 1, 4, 8)
    x = torch.tensor([0.1875, 0.3125, 0.9375, 0.1875, 0.0625])  # centers of columns 1, 2, 7, 1 and 0
    candidates = torch.stack([x, torch.full((5,), 0.5)], -1)[None, None]
    chosen = uncertain_points(mask_logits, torch.tensor([[0]]), candidates, 3)
    assert chosen[0, 0, :, 0].tolist() == [0.1875, 0.9375, 0.0625]
    assert not uncertain_points(mask_logits, torch.tensor([[-1]]), candidates, 3).any()


def test_all_void_points_count_nothing(generator):
    _, mask_logits, _, assignment, masks, valid = make_inputs(generator)
    points = 0.2 + 0.6 * torch.rand(2, 3, 3, 10, 2, generator=generator)
    mask_logits[0, 0, 5] = float("nan")
    losses = mask_loss(mask_logits, assignment, masks, points, valid=torch.zeros_like(valid))
    assert not torch.stack(losses).any()
