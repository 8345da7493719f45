"""What must hold for any input: orders that do not matter, and ways that lead to the same result."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastmask
from fastmask import Targets, reference
from fastmask.functional import (
    assign,
    instance_inference,
    mask_cost,
    mask_loss,
    mask_products,
    panoptic_inference,
    semantic_inference,
)
from fastmask.ops import _mask_source
from fastmask.ops.instance import _encode
from tests.helpers.foreign_models import random_batch, tiny_eomt, tiny_mask2former, tiny_maskformer, tiny_oneformer
from tests.helpers.inputs import random_logits, random_targets

sides = st.integers(1, 24)


@st.composite
def problems(draw, forms=("segments", "masks", "masks+valid")):
    """(class logits, mask logits, targets, generator) of one layer, as ``tests.helpers.inputs`` draws them."""
    images, queries, classes, targets = (draw(st.integers(low, 6)) for low in (1, 2, 1, 0))
    shape = (1, images, queries, classes, targets, draw(sides), draw(sides), draw(sides), draw(sides))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 16)))
    return *random_logits(shape, generator), random_targets(shape, generator, draw(st.sampled_from(forms))), generator


def losses_and_gradients(mask_logits, targets, assignment):
    leaf = mask_logits.clone().requires_grad_()
    losses = mask_loss(leaf, targets, assignment)
    return *losses, *torch.autograd.grad(sum(loss.sum() for loss in losses), leaf)


def best_total(cost, targets):
    """Costs of the pairs, of which several assignments may have the least sum."""
    assignment = assign(cost, targets.counts)
    chosen = cost.mT.gather(-1, assignment.clamp(min=0)[..., None])[..., 0]
    return (chosen * (assignment >= 0)).sum(-1), assignment


def assert_same(actual, expected):
    """But for the order of sums."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@settings(max_examples=30)
@given(problems())
def test_the_order_of_queries_does_not_matter(problem):
    class_logits, mask_logits, targets, generator = problem
    order = torch.randperm(class_logits.shape[2], generator=generator)
    shuffled = class_logits[:, :, order], mask_logits[:, :, order]
    cost = mask_cost(class_logits, mask_logits, targets)
    assert torch.equal(mask_cost(*shuffled, targets), cost[:, :, order])
    total, assignment = best_total(cost, targets)
    assert_same(best_total(cost[:, :, order], targets)[0], total)
    moved = torch.where(assignment >= 0, order.argsort()[assignment], -1)
    *losses, gradient = losses_and_gradients(mask_logits, targets, assignment)
    assert_same(losses_and_gradients(shuffled[1], targets, moved), (*losses, gradient[:, :, order]))
    scores, other = (
        semantic_inference(classes[0], masks[0], targets.size, output="scores")
        for classes, masks in ((class_logits, mask_logits), shuffled)
    )
    assert_same(other, scores)


@settings(max_examples=30)
@given(problems(("masks", "masks+valid")))
def test_the_order_of_targets_does_not_matter(problem):
    class_logits, mask_logits, targets, generator = problem
    order = torch.arange(targets.num_targets).repeat(targets.batch_size, 1)
    for row, count in zip(order, targets.counts.tolist(), strict=True):
        row[:count] = torch.randperm(count, generator=generator)
    masks = targets.masks.gather(1, order[:, :, None, None].expand_as(targets.masks))
    shuffled = Targets(targets.labels.gather(1, order), targets.counts, masks=masks, valid=targets.valid)
    cost = mask_cost(class_logits, mask_logits, targets)
    moved = cost.gather(3, order[None, :, None, :].expand_as(cost))
    assert_same(mask_cost(class_logits, mask_logits, shuffled), moved)
    total, assignment = best_total(cost, targets)
    assert_same(best_total(moved, targets)[0], total)
    expected = losses_and_gradients(mask_logits, targets, assignment)
    assert_same(losses_and_gradients(mask_logits, shuffled, assignment.gather(2, order[None])), expected)


@settings(max_examples=30)
@given(problems(("segments",)))
def test_a_segment_map_is_its_masks(problem):
    class_logits, mask_logits, segments, _ = problem
    masks = Targets(segments.labels, segments.counts, masks=segments.dense_masks(), valid=segments.valid_pixels())
    cost = mask_cost(class_logits, mask_logits, segments)
    assert_same(mask_cost(class_logits, mask_logits, masks), cost)
    _, assignment = best_total(cost, segments)
    expected = losses_and_gradients(mask_logits, segments, assignment)
    assert_same(losses_and_gradients(mask_logits, masks, assignment), expected)


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
    encoded, _ = _encode(masks, width, (height, width))
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
    modules = {name: (type(module), set(vars(module))) for name, module in model.named_modules()}
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
