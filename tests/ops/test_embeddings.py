"""Losses from embeddings: the same values and gradients as from mask logits, with matched rows alone in backward."""

from __future__ import annotations

import pytest
import torch

from fastmask import HungarianMatcher, SetCriterion, mask_loss
from fastmask.functional import mask_products, matched_mask_logits
from tests.helpers.inputs import SHAPES, random_assignment, random_targets

CHANNELS = 16


def random_embeddings(shape, generator, dtype=torch.float32):
    layers, batch_size, num_queries, _, _, h, w, *_ = shape
    mask_embed = torch.randn(layers, batch_size, num_queries, CHANNELS, generator=generator, dtype=dtype)
    pixel_embed = torch.randn(batch_size, CHANNELS, h, w, generator=generator, dtype=dtype)
    return mask_embed.requires_grad_(), pixel_embed.requires_grad_()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_losses_and_gradients_equal_those_from_all_mask_logits(shape, generator):
    embeddings = random_embeddings(shape, generator, torch.float64)
    targets = random_targets(shape, generator, "segments")
    assignment = random_assignment(shape, targets, generator)
    matched, rows = matched_mask_logits(*embeddings, targets, assignment)
    assert matched.shape[2] <= min(shape[2], max(shape[4], 0))
    losses = []
    for mask_logits, queries in ((matched, rows), (mask_products(*embeddings), assignment)):
        loss = mask_loss(mask_logits, targets, queries, backend="reference")
        losses.append((*loss, *torch.autograd.grad(sum(part.sum() for part in loss), embeddings)))
    for ours, expected in zip(*losses, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", ["usual", "more targets than queries", "no targets"])
def test_the_criterion_takes_either_form(shape, generator):
    shape = SHAPES[shape]
    embeddings = random_embeddings(shape, generator)
    class_logits = torch.randn(*shape[:3], shape[3] + 1, generator=generator)
    targets = random_targets(shape, generator, "segments")
    criterion = SetCriterion(shape[3], HungarianMatcher(), {})
    results = []
    for masks in (
        {"mask_logits": mask_products(*embeddings)},
        {"mask_embed": embeddings[0], "pixel_embed": embeddings[1]},
    ):
        losses = criterion({"class_logits": class_logits, **masks}, targets)
        total = sum(loss for name, loss in losses.items() if not name.startswith("loss_ce"))
        results.append([*losses.values(), *torch.autograd.grad(total, embeddings)])
    for ours, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


def test_backward_carries_matched_rows_only(generator):
    shape = (3, 2, 50, 4, 5, 16, 16, 32, 32)
    embeddings = random_embeddings(shape, generator)
    targets = random_targets(shape, generator, "segments")
    sizes = []

    def keep(tensor):
        sizes.append(tensor.numel())
        return tensor

    criterion = SetCriterion(shape[3], HungarianMatcher(), {}, losses=["masks"])
    outputs = {"class_logits": torch.zeros(*shape[:3], shape[3] + 1), "mask_embed": embeddings[0]}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = criterion({**outputs, "pixel_embed": embeddings[1]}, targets)
    sum(losses.values()).backward()
    matched_rows = shape[0] * shape[1] * shape[4] * shape[5] * shape[6]
    assert max(sizes) == max(2 * matched_rows, embeddings[1].numel())  # slopes of both losses


def test_bad_arguments(generator):
    shape = SHAPES["usual"]
    mask_embed, pixel_embed = random_embeddings(shape, generator)
    targets = random_targets(shape, generator, "segments")
    assignment = random_assignment(shape, targets, generator)
    with pytest.raises(ValueError, match=r"pixel_embed has shape .*; expected \(2, 16, h, w\)"):
        matched_mask_logits(mask_embed, pixel_embed[:, 1:], targets, assignment)
    with pytest.raises(TypeError, match="mask_embed must be floating point"):
        matched_mask_logits(mask_embed.int(), pixel_embed, targets, assignment)
    with pytest.raises(ValueError, match="assignment holds 20; expected -1..19"):
        matched_mask_logits(mask_embed, pixel_embed, targets, torch.full_like(assignment, 20))
    with pytest.raises(ValueError, match="assignment has shape"):
        matched_mask_logits(mask_embed[0], pixel_embed, targets, assignment)
