"""Subclasses of transformers' criteria and matchers keep what they override, and get the rest replaced."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch

import fastmask
from tests.helpers.foreign_models import (
    NUM_CLASSES,
    NUM_QUERIES,
    SIZE,
    random_batch,
    tiny_eomt,
    tiny_mask2former,
    tiny_maskformer,
    train_step,
)
from tests.helpers.subclassed_criteria import (
    LastQueryMatcher,
    MaskClassificationLoss,
    OtherClassLoss,
    PlainSubclass,
)
from tests.integrations.test_patch_points import assert_same_step

COUNTS = {
    "usual": (4, 2),
    "an image without targets": (3, 0),
    "no targets": (0, 0),
    "more targets than queries": (NUM_QUERIES + 3, 1),
}


def inputs(seed, counts, dtype=torch.float32):
    """Logits of one layer, and targets as dicts."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.randn(2, NUM_QUERIES, 16, 16, generator=generator).to(dtype).requires_grad_()
    classes = torch.randn(2, NUM_QUERIES, NUM_CLASSES + 1, generator=generator).to(dtype).requires_grad_()
    batch = random_batch(seed, counts)
    pairs = zip(batch["mask_labels"], batch["class_labels"], strict=True)
    return masks, [{"masks": m.bool(), "labels": labels} for m, labels in pairs], classes


def losses_and_gradients(criterion, arguments):
    torch.manual_seed(0)
    losses = criterion(*arguments)
    gradients = torch.autograd.grad(sum(losses.values()), (arguments[0], arguments[2]), allow_unused=True)
    return losses, gradients, torch.rand(1)


def assert_same(actual, expected, **close):
    assert list(actual[0]) == list(expected[0])
    for name, loss in expected[0].items():
        torch.testing.assert_close(actual[0][name], loss, **(close or {"rtol": 1e-5, "atol": 1e-7}))
    for ours, theirs in zip(actual[1], expected[1], strict=True):
        torch.testing.assert_close(ours, theirs, **(close or {"rtol": 1e-4, "atol": 1e-6}))
    assert actual[2] == expected[2]


@pytest.mark.parametrize("matcher", [None, LastQueryMatcher()], ids=["transformers' matcher", "a matcher of its own"])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_the_criterion_of_eomts_authors(counts, matcher):
    """Its forward and loss_masks stay, and what they call with super() is replaced."""
    if matcher is not None and max(counts) > NUM_QUERIES:
        counts = (NUM_QUERIES, 1)
    criterion, arguments = MaskClassificationLoss(matcher), inputs(0, counts)
    expected = losses_and_gradients(criterion, arguments)
    fastmask.patch(criterion)
    for twin in (criterion, copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert isinstance(twin, MaskClassificationLoss)
        assert_same(losses_and_gradients(twin, arguments), expected)
    fastmask.unpatch(criterion)
    assert type(criterion) is MaskClassificationLoss
    assert losses_and_gradients(criterion, arguments)[0]["loss_mask"].equal(expected[0]["loss_mask"])


def test_half_precision():
    criterion, arguments = MaskClassificationLoss(), inputs(1, (4, 2), torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        expected = losses_and_gradients(criterion, arguments)
        actual = losses_and_gradients(fastmask.patch(criterion), arguments)
    assert_same(actual, expected, rtol=5e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [tiny_maskformer, tiny_eomt])
def test_low_precision_is_computed_in_float32(make, dtype):
    criterion, (masks, targets, classes) = fastmask.patch(make().criterion), inputs(5, (4, 2), dtype)
    labels = [t["masks"].float() for t in targets], [t["labels"] for t in targets]
    results = []
    for logits in ((masks, classes), [x.detach().float().requires_grad_() for x in (masks, classes)]):
        torch.manual_seed(0)
        losses = torch.stack([loss.squeeze() for loss in criterion(*logits, *labels).values()])
        results.append((losses, *(x.float() for x in torch.autograd.grad(losses.sum(), logits))))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)
    for actual, expected in zip(results[0][1:], results[1][1:], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-5)


def test_a_criterion_without_a_matcher_is_refused():
    criterion = MaskClassificationLoss()
    del criterion.matcher
    with pytest.raises(TypeError, match="the matcher of MaskClassificationLoss is a NoneType"):
        fastmask.patch(criterion)


def test_what_the_class_overrides_is_named(caplog):
    with caplog.at_level(logging.INFO, "fastmask"):
        fastmask.patch(MaskClassificationLoss())
    left = [record.getMessage() for record in caplog.records if "overrides" in record.getMessage()]
    assert len(caplog.records) == 2 and len(left) == 1
    assert "MaskClassificationLoss" in left[0] and "loss_masks, forward" in left[0] and "of Mask2FormerLoss" in left[0]


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("cls", [PlainSubclass, OtherClassLoss])
def test_a_subclass_inside_a_model(cls, counts):
    model, batch = tiny_mask2former(), random_batch(2, counts)
    model.criterion.__class__ = cls
    expected = train_step(model, batch)
    assert_same_step(train_step(fastmask.patch(model), batch), expected)
    # Only where nothing is overridden do all losses come from one call, to which the model hands its embeddings.
    assert (type(model) is type(tiny_mask2former())) == (cls is OtherClassLoss)


def test_a_model_with_a_matcher_of_its_own():
    model, batch = tiny_mask2former(), random_batch(3, (3, 2), (SIZE, 48))
    model.criterion.matcher.__class__ = LastQueryMatcher
    expected = train_step(model, batch)
    assert_same_step(train_step(fastmask.patch(model), batch), expected)


def test_labels_out_of_range_and_nan():
    criterion, (masks, targets, classes) = fastmask.patch(MaskClassificationLoss()), inputs(4, (2, 1))
    targets[0]["labels"][0] = NUM_CLASSES
    with pytest.raises(ValueError, match=f"holds {NUM_CLASSES}; expected 0..{NUM_CLASSES - 1}"):
        criterion(masks, targets, classes)
    targets[0]["labels"][0] = 0
    with torch.no_grad():
        masks[0, 0] = torch.nan
    queries, _ = criterion.matcher(
        masks, classes, [t["masks"].float() for t in targets], [t["labels"] for t in targets]
    )[0]
    assert 0 not in queries  # a query of NaN is taken last
