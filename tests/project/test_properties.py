"""What must hold for any input: orders that do not matter, and ways that lead to the same result."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastmask
from fastmask import HungarianMatcher, SetCriterion, Targets, reference
from fastmask.functional import instance_inference, mask_cost, mask_products, panoptic_inference, semantic_inference
from fastmask.ops import _mask_source
from fastmask.ops.instance import _encode
from tests.helpers.foreign_models import random_batch, tiny_eomt, tiny_mask2former, tiny_maskformer, tiny_oneformer
from tests.helpers.inputs import random_logits, random_targets

WEIGHTS = {"loss_ce": 1.0, "loss_mask": 20.0, "loss_dice": 1.0}
sides = st.integers(1, 24)


@st.composite
def problems(draw, forms=("segments", "masks", "masks+valid")):
    """(class logits, mask logits, targets, generator) of one layer, as ``tests.helpers.inputs`` draws them."""
    images, queries, classes, targets = (draw(st.integers(low, 6)) for low in (1, 2, 1, 0))
    shape = (1, images, queries, classes, targets, draw(sides), draw(sides), draw(sides), draw(sides))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 16)))
    return *random_logits(shape, generator), random_targets(shape, generator, draw(st.sampled_from(forms))), generator


def criterion_of(class_logits):
    return SetCriterion(class_logits.shape[-1] - 1, HungarianMatcher(1.0, 20.0, 1.0), WEIGHTS)


def losses_and_gradients(class_logits, mask_logits, targets):
    leaves = [logits.clone().requires_grad_() for logits in (class_logits, mask_logits)]
    losses = criterion_of(class_logits)({"class_logits": leaves[0], "mask_logits": leaves[1]}, targets)
    return losses, torch.autograd.grad(sum(losses.values()), leaves)


def assert_same(actual, expected):
    """But for the order of sums."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


@settings(max_examples=30)
@given(problems())
def test_the_order_of_queries_does_not_matter(problem):
    class_logits, mask_logits, targets, generator = problem
    order = torch.randperm(class_logits.shape[2], generator=generator)
    shuffled = class_logits[:, :, order], mask_logits[:, :, order]
    cost = mask_cost(class_logits, mask_logits, targets)
    assert torch.equal(mask_cost(*shuffled, targets), cost[:, :, order])
    losses, gradients = losses_and_gradients(class_logits, mask_logits, targets)
    other_losses, other_gradients = losses_and_gradients(*shuffled, targets)
    assert_same(other_losses, losses)
    assert_same(other_gradients, tuple(gradient[:, :, order] for gradient in gradients))
    size = targets.size
    scores = semantic_inference(class_logits[0], mask_logits[0], size, output="scores")
    assert_same(semantic_inference(shuffled[0][0], shuffled[1][0], size, output="scores"), scores)


@settings(max_examples=30)
@given(problems(("masks", "masks+valid")))
def test_the_order_of_targets_does_not_matter(problem):
    class_logits, mask_logits, targets, generator = problem
    order = torch.arange(targets.num_targets).repeat(targets.batch_size, 1)
    for row, count in zip(order, targets.counts.tolist(), strict=True):
        row[:count] = torch.randperm(count, generator=generator)
    index = order[:, :, None, None].expand_as(targets.masks)
    shuffled = Targets(
        targets.labels.gather(1, order), targets.counts, masks=targets.masks.gather(1, index), valid=targets.valid
    )
    cost = mask_cost(class_logits, mask_logits, targets)
    columns = order[None, :, None, :].expand_as(cost)
    assert_same(mask_cost(class_logits, mask_logits, shuffled), cost.gather(3, columns))
    expected = losses_and_gradients(class_logits, mask_logits, targets)
    assert_same(losses_and_gradients(class_logits, mask_logits, shuffled), expected)


@settings(max_examples=30)
@given(problems(("segments",)))
def test_a_segment_map_is_its_masks(problem):
    class_logits, mask_logits, segments, _ = problem
    masks = Targets(segments.labels, segments.counts, masks=segments.dense_masks(), valid=segments.valid_pixels())
    assert_same(mask_cost(class_logits, mask_logits, masks), mask_cost(class_logits, mask_logits, segments))
    expected = losses_and_gradients(class_logits, mask_logits, segments)
    assert_same(losses_and_gradients(class_logits, mask_logits, masks), expected)


@settings(max_examples=30)
@given(problems(), sides, sides)
def test_bands_give_what_the_whole_gives(problem, height, width):
    """Mask logits that are made from embeddings a few rows at a time."""
    class_logits, mask_logits, _, generator = problem
    embeddings = (
        torch.randn(*mask_logits.shape[1:3], 4, generator=generator),
        torch.randn(mask_logits.shape[1], 4, *mask_logits.shape[3:], generator=generator),
    )
    arguments = class_logits[0], (height, width)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_mask_source.BAND_BYTES, "cpu", 1)
        bands = infer(embeddings, *arguments)
    whole = infer(mask_products(*embeddings), *arguments)
    assert_same(bands["scores"], whole["scores"])
    for name in ("panoptic", "instances"):
        for actual, expected in zip(bands[name], whole[name], strict=True):
            assert float((actual != expected).float().mean()) <= 0.01


def infer(masks, class_logits, size):
    instances = instance_inference(class_logits, masks, size, top_k=3)
    panoptic = panoptic_inference(class_logits, masks, size, threshold=0.0)
    return {
        "scores": semantic_inference(class_logits, masks, size, output="scores"),
        "panoptic": [segments for segments, _ in panoptic],
        "instances": [result["masks"] for result in instances],
    }


@settings(max_examples=50)
@given(st.integers(1, 4), st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.integers(0, 1 << 16))
def test_run_lengths_come_back_as_masks(count, height, width, share, seed):
    coco = pytest.importorskip("pycocotools.mask")
    masks = torch.rand(count, height, width, generator=torch.Generator().manual_seed(seed)) < share
    encoded = _encode(masks, (height, width))
    assert encoded == reference.rle_encode(masks)
    assert torch.equal(torch.from_numpy(coco.decode(encoded)).permute(2, 0, 1).bool(), masks)


FOREIGN = {
    "maskformer": tiny_maskformer,
    "mask2former": tiny_mask2former,
    "oneformer": tiny_oneformer,
    "eomt": tiny_eomt,
}
foreign = cache(lambda name: FOREIGN[name]().eval())


def described(model):
    """Classes, attributes and the very tensors of a model's modules."""
    modules = {name: (type(module), vars(module).keys()) for name, module in model.named_modules()}
    return modules, {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}


@settings(max_examples=20)
@given(st.sampled_from(sorted(FOREIGN)), st.lists(st.sampled_from(["patch", "fix", "copy", "unpatch"]), max_size=4))
def test_unpatch_undoes_whatever_was_patched(name, steps):
    model = copy.deepcopy(foreign(name))
    before = described(model)
    for step in steps:
        if step == "copy":
            model = copy.deepcopy(model)
            before = before[0], described(model)[1]
        elif step == "unpatch":
            fastmask.unpatch(model)
        else:
            fastmask.patch(model, fix=step == "fix")
    fastmask.unpatch(model)
    assert described(model) == before
    if name != "oneformer":  # which takes a text as well
        images = random_batch(0)["pixel_values"]
        with torch.no_grad():
            found, expected = (one(images).masks_queries_logits for one in (model, foreign(name)))
        assert found.equal(expected)
