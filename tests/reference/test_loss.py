"""The reference mask and class losses against loops, transformers' loss, and finite differences."""

import math

import pytest
import torch
from torch.autograd import gradcheck
from transformers.models.maskformer.modeling_maskformer import MaskFormerHungarianMatcher, MaskFormerLoss

from fastmask.reference import assign, class_loss, mask_cost, mask_loss
from tests.helpers.inputs import reference_inputs

# (h, w) of the logits and (H, W) of the targets: integer factor, odd sizes, one pixel either way, logits finer
GRIDS = [((4, 4), (8, 8)), ((3, 5), (10, 7)), ((1, 1), (4, 3)), ((5, 3), (1, 1)), ((9, 7), (4, 5))]


def make_inputs(seed, grid, size, *, dtype=torch.float64, leading=()):
    *logits, labels, masks, valid = reference_inputs(seed, grid, size, 3.0, dtype=dtype, leading=leading)
    assignment = torch.tensor([[5, 0, 2], [1, -1, -1], [-1, -1, -1]]).expand(*leading, 3, 3)
    return *logits, labels, assignment, masks, valid


def sample(x, row, column, size):
    """The value of map ``x`` at one output pixel: bilinear, pixel centers at half integers, clamped at the border."""

    def axis(position, output, length):
        source = min(max((position + 0.5) * length / output - 0.5, 0), length - 1)
        low = math.floor(source)
        return low, min(low + 1, length - 1), source - low

    top, bottom, v = axis(row, size[0], x.shape[0])
    left, right, u = axis(column, size[1], x.shape[1])
    upper = (1 - u) * x[top, left] + u * x[top, right]
    lower = (1 - u) * x[bottom, left] + u * x[bottom, right]
    return (1 - v) * upper + v * lower


def expected_pair(x, target, counted, mask_term, alpha, gamma):
    loss, overlap, total_p, total_t, pixels = 0.0, 0.0, 0.0, 0, 0
    for row in range(target.shape[0]):
        for column in range(target.shape[1]):
            if not counted[row, column]:
                continue
            p = 1 / (1 + math.exp(-sample(x, row, column, target.shape)))
            t = int(target[row, column])
            p_t = p if t else 1 - p
            focal = (alpha if t else 1 - alpha) * (1 - p_t) ** gamma if mask_term == "focal" else 1.0
            loss += focal * -math.log(p_t)
            overlap, total_p, total_t, pixels = overlap + p * t, total_p + p, total_t + t, pixels + 1
    return loss / max(pixels, 1), 1 - (2 * overlap + 1) / (total_p + total_t + 1)


@pytest.mark.parametrize("mask_term", ["focal", "bce"])
@pytest.mark.parametrize("with_void", [False, True])
@pytest.mark.parametrize(("grid", "size"), GRIDS)
def test_mask_loss_equals_a_loop_over_pixels(grid, size, with_void, mask_term):
    _, mask_logits, _, assignment, masks, valid = make_inputs(1, grid, size, leading=(2,))
    alpha, gamma = 0.4, 1.3
    void = {"valid": valid} if with_void else {}
    counted = valid if with_void else torch.ones_like(valid)
    result = mask_loss(
        mask_logits, assignment, masks.to(torch.uint8), mask_term=mask_term, alpha=alpha, gamma=gamma, **void
    )
    expected = torch.zeros(2, 2, 3, 3, dtype=torch.float64)  # [mask or dice, L, B, M]
    for layer, b, m in (assignment >= 0).nonzero().tolist():
        x = mask_logits[layer, b, assignment[layer, b, m]].numpy()
        pair = expected_pair(x, masks[b, m].numpy(), counted[b].numpy(), mask_term, alpha, gamma)
        expected[:, layer, b, m] = torch.tensor(pair, dtype=torch.float64)
    torch.testing.assert_close(torch.stack(result), expected, rtol=1e-11, atol=1e-12)


def test_class_loss_equals_a_loop_over_queries():
    class_logits, _, labels, assignment, _, _ = make_inputs(2, (2, 2), (4, 4), leading=(2,))
    result = class_loss(class_logits, labels, assignment, eos_coef=0.3)
    assert result.shape == (2,)
    for layer in range(2):
        total, weights = 0.0, 0.0
        for b in range(3):
            classes = [4] * 6
            for m in range(3):
                if assignment[layer, b, m] >= 0:
                    classes[assignment[layer, b, m]] = int(labels[b, m])
            for n, k in enumerate(classes):
                logits = class_logits[layer, b, n].tolist()
                weight = 0.3 if k == 4 else 1.0
                total += weight * (math.log(sum(math.exp(x) for x in logits)) - logits[k])
                weights += weight
        assert result[layer].item() == pytest.approx(total / weights, rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("grid", "size"), [((8, 8), (32, 32)), ((5, 7), (19, 26))])
def test_losses_equal_those_of_transformers(grid, size, seed):
    class_logits, mask_logits, labels, _, masks, _ = make_inputs(seed, grid, size)
    class_logits, mask_logits, labels, masks = (x[:2] for x in (class_logits, mask_logits, labels, masks))
    counts = (labels >= 0).sum(1)
    assignment = assign(mask_cost(class_logits, mask_logits, labels, masks), counts)
    criterion = MaskFormerLoss(4, MaskFormerHungarianMatcher(), weight_dict={}, eos_coef=0.125).double()
    theirs = criterion(
        mask_logits,
        class_logits,
        [masks[b, :count].double() for b, count in enumerate(counts)],
        [labels[b, :count] for b, count in enumerate(counts)],
    )
    pair_mask, pair_dice = mask_loss(mask_logits, assignment, masks)
    close = {"rtol": 1e-12, "atol": 1e-13}
    torch.testing.assert_close(pair_mask.sum() / counts.sum(), theirs["loss_mask"], **close)
    torch.testing.assert_close(pair_dice.sum() / counts.sum(), theirs["loss_dice"], **close)
    torch.testing.assert_close(
        class_loss(class_logits, labels, assignment, eos_coef=0.125), theirs["loss_cross_entropy"], **close
    )


@pytest.mark.parametrize("mask_term", ["focal", "bce"])
@pytest.mark.parametrize(("grid", "size"), [((2, 3), (5, 4)), ((4, 3), (2, 2))])
def test_mask_loss_gradient(grid, size, mask_term):
    _, mask_logits, _, assignment, masks, valid = make_inputs(3, grid, size, leading=(1,))
    mask_logits = (mask_logits / 3).requires_grad_()
    assert gradcheck(lambda x: mask_loss(x, assignment, masks, mask_term=mask_term, valid=valid), mask_logits)
    sum(map(torch.sum, mask_loss(mask_logits, assignment, masks))).backward()
    used = torch.zeros(1, 3, 6, dtype=torch.bool)
    used[0, [0, 0, 0, 1], [5, 0, 2, 1]] = True
    assert (mask_logits.grad[~used] == 0).all()
    assert (mask_logits.grad[used] != 0).any()


def test_class_loss_gradient():
    class_logits, _, labels, assignment, _, _ = make_inputs(4, (1, 1), (1, 1), leading=(2,))
    assert gradcheck(lambda x: class_loss(x, labels, assignment), class_logits.requires_grad_())


def test_broken_logits_of_unmatched_queries_reach_neither_loss_nor_gradient():
    _, mask_logits, _, assignment, masks, _ = make_inputs(5, (3, 3), (6, 6))
    mask_logits[0, 1] = torch.nan  # nobody's query
    mask_logits[2] = torch.nan  # an image without targets, whose padding points at query 0
    mask_logits.requires_grad_()
    pair_mask, pair_dice = mask_loss(mask_logits, assignment, masks)
    (pair_mask.sum() + pair_dice.sum()).backward()
    assert pair_mask.isfinite().all()
    assert pair_dice.isfinite().all()
    assert mask_logits.grad.isfinite().all()


def test_void_pixels_may_hold_anything():
    _, mask_logits, _, assignment, masks, _ = make_inputs(6, (4, 4), (4, 4))
    valid = torch.ones(3, 4, 4, dtype=torch.bool)
    valid[:, 1, 2] = False
    expected = mask_loss(mask_logits, assignment, masks, valid=valid)
    mask_logits[..., 1, 2] = 50.0
    masks[..., 1, 2] ^= True
    torch.testing.assert_close(mask_loss(mask_logits, assignment, masks, valid=valid), expected)
    pair_mask, pair_dice = mask_loss(mask_logits, assignment, masks, valid=torch.zeros_like(valid))
    assert (pair_mask == 0).all()
    assert (pair_dice == 0).all()


def test_images_without_targets():
    class_logits, mask_logits, labels, assignment, masks, _ = make_inputs(7, (4, 4), (8, 8), leading=(2,))
    class_logits.requires_grad_()
    mask_logits.requires_grad_()
    pair_mask, pair_dice = mask_loss(mask_logits, assignment[..., :0], masks[:, :0])
    assert pair_mask.shape == pair_dice.shape == (2, 3, 0)
    loss = class_loss(class_logits, labels[:, :0], assignment[..., :0])
    torch.testing.assert_close(loss, -class_logits.log_softmax(-1)[..., 4].mean((1, 2)))
    (loss.sum() + pair_mask.sum() + pair_dice.sum()).backward()
    assert (mask_logits.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_keeps_the_dtype_of_the_logits(dtype):
    class_logits, mask_logits, labels, assignment, masks, _ = make_inputs(8, (4, 4), (8, 8))
    class_logits, mask_logits = class_logits.to(dtype), mask_logits.to(dtype)
    results = *mask_loss(mask_logits, assignment, masks), class_loss(class_logits, labels, assignment)
    exact = (
        *mask_loss(mask_logits.double(), assignment, masks),
        class_loss(class_logits.double(), labels, assignment),
    )
    for result, expected in zip(results, exact, strict=True):
        assert result.dtype == dtype
        # a few roundings of values up to 8
        torch.testing.assert_close(result.double(), expected, rtol=0, atol=16 * torch.finfo(dtype).eps)


def test_wrong_arguments_are_named():
    class_logits, mask_logits, labels, assignment, masks, valid = make_inputs(9, (4, 4), (8, 8), leading=(2,))
    with pytest.raises(ValueError, match="mask_term"):
        mask_loss(mask_logits, assignment, masks, mask_term="dice")
    with pytest.raises(ValueError, match=r"assignment has shape \(3, 3\); expected \(\.\.\., 2, 3, 3\)"):
        mask_loss(mask_logits, assignment[0], masks)
    with pytest.raises(ValueError, match="mask_logits has shape"):
        mask_loss(mask_logits[:, 1:], assignment, masks)
    with pytest.raises(ValueError, match="valid has shape"):
        mask_loss(mask_logits, assignment, masks, valid=valid[:, 1:])
    with pytest.raises(ValueError, match="assignment has shape"):
        class_loss(class_logits, labels, assignment[:, 1:])
