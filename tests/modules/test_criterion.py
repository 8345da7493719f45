from __future__ import annotations

import pytest
import torch
from transformers.models.maskformer.modeling_maskformer import MaskFormerHungarianMatcher, MaskFormerLoss

from fastmask import HungarianMatcher, MaskTerm, SetCriterion, Targets
from fastmask.testing import assert_within_budget
from tests.helpers.inputs import SHAPES, random_logits, random_targets

COSTS = {"cost_class": 1.0, "cost_mask": 20.0, "cost_dice": 1.0}
WEIGHTS = {"loss_ce": 1.0, "loss_mask": 20.0, "loss_dice": 1.0}


def make_criterion(num_classes, backend="auto", **term):
    compared = {"term": MaskTerm(**term), "backend": backend}
    matcher = HungarianMatcher(**COSTS, **compared)
    return SetCriterion(num_classes, matcher, WEIGHTS, 0.1, ["labels", "masks"], **compared)


def as_outputs(class_logits, mask_logits, *, stacked=False):
    *aux, last = [
        {"pred_logits": classes, "pred_masks": masks} for classes, masks in zip(class_logits, mask_logits, strict=True)
    ]
    extra = {"class_logits": class_logits, "mask_logits": mask_logits} if stacked else {}
    return {**last, "aux_outputs": aux, **extra}


def weighted(losses):
    return sum(WEIGHTS[name.rsplit("_", 1)[0] if name[-1].isdigit() else name] * loss for name, loss in losses.items())


@pytest.mark.parametrize("shape", ["usual", "odd sizes", "more targets than queries", "no targets"])
@pytest.mark.parametrize("form", ["segments", "masks"])
def test_losses_and_gradients_equal_the_reference(shape, form, generator):
    logits = random_logits(SHAPES[shape], generator)
    targets = random_targets(SHAPES[shape], generator, form)
    results = []
    for backend, dtype in (("native", torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in logits]
        losses = make_criterion(SHAPES[shape][3], backend)(as_outputs(*leaves), targets)
        gradients = torch.autograd.grad(weighted(losses), leaves, allow_unused=True)
        results.append({**losses, **dict(zip(("class gradient", "mask gradient"), gradients, strict=True))})
    for name in results[0]:
        assert_within_budget(results[0][name], results[1][name], results[2][name], name=name)


def test_stacked_outputs_give_the_same_losses_and_gradients(generator):
    logits = [x.requires_grad_() for x in random_logits(SHAPES["usual"], generator)]
    targets = random_targets(SHAPES["usual"], generator, "segments")
    criterion = make_criterion(5)
    separate = criterion(as_outputs(*logits), targets)
    stacked = criterion(as_outputs(*logits, stacked=True), targets)
    assert separate.keys() == stacked.keys()
    for name, loss in separate.items():
        torch.testing.assert_close(stacked[name], loss, rtol=1e-6, atol=0)
    for one, other in zip(
        torch.autograd.grad(weighted(separate), logits), torch.autograd.grad(weighted(stacked), logits), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("seed", range(3))
def test_equals_transformers(seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (3, 2, 12, 5, 6, 16, 16, 64, 64)
    class_logits, mask_logits = random_logits(shape, generator)
    images = [
        {
            "labels": torch.randint(0, 5, (count,), generator=generator),
            "masks": torch.rand(count, 64, 64, generator=generator) < 0.3,
        }
        for count in (6, 2)
    ]
    losses = make_criterion(5)(as_outputs(class_logits, mask_logits), images)
    theirs = MaskFormerLoss(
        5, MaskFormerHungarianMatcher(cost_class=1.0, cost_mask=20.0, cost_dice=1.0), WEIGHTS, eos_coef=0.1
    )(
        mask_logits[-1],
        class_logits[-1],
        [image["masks"].float() for image in images],
        [image["labels"] for image in images],
        [{"masks_queries_logits": mask_logits[i], "class_queries_logits": class_logits[i]} for i in range(2)],
    )
    assert len(theirs) == len(losses) == 9
    for name, loss in theirs.items():
        ours = losses[name.replace("cross_entropy", "ce")]
        torch.testing.assert_close(ours, loss, rtol=2e-6, atol=1e-7)


def test_loss_names_and_selection(generator):
    logits = random_logits(SHAPES["usual"], generator)
    targets = random_targets(SHAPES["usual"], generator, "segments")
    both = make_criterion(5)(as_outputs(*logits), targets)
    assert list(both) == ["loss_ce", "loss_ce_0", "loss_mask", "loss_mask_0", "loss_dice", "loss_dice_0"]
    labels = SetCriterion(5, HungarianMatcher(**COSTS), WEIGHTS, 0.1, ["labels"])(as_outputs(*logits), targets)
    assert list(labels) == ["loss_ce", "loss_ce_0"]
    assert torch.equal(labels["loss_ce"], both["loss_ce"])


def test_empty_weight_is_a_buffer_that_the_loss_uses(generator):
    logits = random_logits(SHAPES["usual"], generator)
    targets = random_targets(SHAPES["usual"], generator, "segments")
    criterion = make_criterion(5)
    assert criterion.state_dict()["empty_weight"].tolist() == pytest.approx([1, 1, 1, 1, 1, 0.1])
    before = criterion(as_outputs(*logits), targets)["loss_ce"]
    criterion.empty_weight[-1] = 1.0
    assert not torch.equal(criterion(as_outputs(*logits), targets)["loss_ce"], before)


def test_images_without_objects_are_legitimate(generator):
    class_logits, mask_logits = (x.requires_grad_() for x in random_logits(SHAPES["usual"], generator))
    images = [{"labels": torch.zeros(0, dtype=torch.int64), "masks": torch.zeros(0, 40, 40)} for _ in range(2)]
    losses = make_criterion(5)(as_outputs(class_logits, mask_logits), images)
    assert losses["loss_mask"] == losses["loss_dice"] == 0
    weighted(losses).backward()
    assert class_logits.grad.isfinite().all()
    assert not mask_logits.grad.any()


def test_images_of_different_sizes_are_padded(generator):
    shape = (1, 2, 8, 4, 3, 16, 16, 64, 64)
    logits = random_logits(shape, generator)
    masks = [torch.rand(3, 64, 48, generator=generator) < 0.4, torch.rand(2, 50, 64, generator=generator) < 0.4]
    labels = [torch.tensor([0, 1, 2]), torch.tensor([3, 3])]
    images = [{"labels": image_labels, "masks": mask} for image_labels, mask in zip(labels, masks, strict=True)]
    padded = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    padded[0, :3, :, :48] = masks[0]
    padded[1, :2, :50, :] = masks[1]
    targets = Targets(torch.tensor([[0, 1, 2], [3, 3, -1]]), torch.tensor([3, 2]), masks=padded)
    criterion = make_criterion(4)
    for name, loss in criterion(as_outputs(*logits), images).items():
        assert torch.equal(loss, criterion(as_outputs(*logits), targets)[name])


def test_ignoring_void(generator):
    logits = random_logits(SHAPES["usual"], generator)
    targets = random_targets(SHAPES["usual"], generator, "segments")
    counted = make_criterion(5)(as_outputs(*logits), targets)
    ignored = make_criterion(5, ignore_void=True)(as_outputs(*logits), targets)
    assert not torch.equal(counted["loss_mask"], ignored["loss_mask"])


def test_bfloat16_model_gets_float32_losses_and_bfloat16_gradients(generator):
    class_logits, mask_logits = (x.bfloat16().requires_grad_() for x in random_logits(SHAPES["usual"], generator))
    losses = make_criterion(5)(
        as_outputs(class_logits, mask_logits), random_targets(SHAPES["usual"], generator, "masks")
    )
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    weighted(losses).backward()
    assert class_logits.grad.dtype == mask_logits.grad.dtype == torch.bfloat16


def test_bad_arguments(generator):
    logits = random_logits(SHAPES["usual"], generator)
    targets = random_targets(SHAPES["usual"], generator, "segments")
    with pytest.raises(ValueError, match="losses holds 'boxes'"):
        SetCriterion(5, HungarianMatcher(), {}, 0.1, ["boxes"])
    with pytest.raises(ValueError, match="num_classes must be at least 1"):
        SetCriterion(0, HungarianMatcher(), {})
    with pytest.raises(ValueError, match="expected num_classes"):
        make_criterion(4)(as_outputs(*logits), targets)
    with pytest.raises(ValueError, match='no "masks"'):
        make_criterion(5)(as_outputs(*logits), [{"labels": torch.tensor([1])}] * 2)
    with pytest.raises(ValueError, match="expected \\(1, H, W\\)"):
        make_criterion(5)(as_outputs(*logits), [{"labels": torch.tensor([1]), "masks": torch.ones(2, 8, 8)}] * 2)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_broken_query_does_not_spoil_the_others(value, generator):
    """More queries than targets: the broken one is matched last, so that nothing of it reaches the losses."""
    shape = (1, 2, 8, 4, 3, 16, 16, 64, 64)
    class_logits, mask_logits = random_logits(shape, generator)
    targets = random_targets(shape, generator, "segments")
    expected = make_criterion(4)(as_outputs(class_logits[:, :, 1:], mask_logits[:, :, 1:]), targets)
    mask_logits[:, :, 0] = value
    mask_logits[:, :, 0, 0] = torch.nan
    mask_logits.requires_grad_()
    losses = make_criterion(4)(as_outputs(class_logits, mask_logits), targets)
    for name in ("loss_mask", "loss_dice"):
        torch.testing.assert_close(losses[name], expected[name])
    (gradient,) = torch.autograd.grad(losses["loss_mask"] + losses["loss_dice"], mask_logits)
    assert gradient.isfinite().all()


def test_a_broken_query_that_must_be_matched_gives_nan(generator):
    """As many queries as targets: its pair's loss is NaN, and its gradient alone."""
    shape = (1, 1, 3, 4, 3, 16, 16, 64, 64)
    class_logits, mask_logits = random_logits(shape, generator)
    targets = random_targets(shape, generator, "segments")
    mask_logits[:, :, 1] = torch.nan
    mask_logits.requires_grad_()
    losses = make_criterion(4)(as_outputs(class_logits, mask_logits), targets)
    assert losses["loss_mask"].isnan() and losses["loss_ce"].isfinite()
    (gradient,) = torch.autograd.grad(losses["loss_mask"], mask_logits)
    assert gradient[:, :, [0, 2]].isfinite().all()
