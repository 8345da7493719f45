"""Semantic maps by the hard assignment of pixels to queries."""

from __future__ import annotations

import pytest
import torch

from fastmask import MaskFormer, MaskFormerConfig, general_inference, semantic_inference
from fastmask.functional import mask_products
from fastmask.reference._common import image_logits, resize_bilinear

GEOMETRIES = {
    "one step": {"size": (40, 56)},
    "two steps": {"size": (37, 41), "padded_size": (48, 64), "valid_size": (45, 50)},
    "smaller": {"size": (5, 7)},
}


def random_logits(generator, queries=12, classes=6, size=(12, 16)):
    class_logits = 3 * torch.randn(2, queries, classes + 1, generator=generator)
    return class_logits, 4 * torch.randn(2, queries, *size, generator=generator)


def by_hand(class_logits, mask_logits, ignore_index=255):
    """At the logits' own size, a pixel at a time."""
    probabilities = class_logits.softmax(-1)
    labels = torch.full((len(class_logits), *mask_logits.shape[2:]), ignore_index)
    for b, y, x in torch.cartesian_prod(*(torch.arange(side) for side in labels.shape)).tolist():
        best = 0.0
        for n, query in enumerate(probabilities[b]):
            score, label = query.max(0)
            value = float(score * mask_logits[b, n, y, x].sigmoid())
            if label < class_logits.shape[2] - 1 and value > best:
                best, labels[b, y, x] = value, label
    return labels


def assert_equal_where_sure(labels, class_logits, mask_logits, geometry):
    """Equal to the float64 reference wherever its best query is ahead of the next by more than rounding."""
    expected = general_inference(class_logits.double(), mask_logits.double(), **geometry)
    steps = {name: geometry.get(name) for name in ("padded_size", "valid_size")}
    masks = resize_bilinear(image_logits(mask_logits.double(), *steps.values()), geometry["size"]).sigmoid()
    scores, classes = class_logits.double().softmax(-1).max(-1)
    kept = classes < class_logits.shape[2] - 1
    best = ((scores * kept)[..., None, None] * masks).topk(2, dim=1).values
    sure = best[:, 0] - best[:, 1] > 1e-5 * best[:, 0]
    assert sure.float().mean() > 0.99 and torch.equal(labels[sure], expected[sure])


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_equals_the_rule_by_hand(backend, generator):
    class_logits, mask_logits = random_logits(generator)
    labels = general_inference(class_logits, mask_logits, (12, 16), backend=backend)
    assert labels.dtype == torch.uint8
    assert torch.equal(labels.long(), by_hand(class_logits, mask_logits))


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_equals_the_reference_where_it_is_sure(geometry, generator):
    class_logits, mask_logits = random_logits(generator)
    labels = general_inference(class_logits, mask_logits, **geometry)
    assert_equal_where_sure(labels, class_logits, mask_logits, geometry)
    embeddings = torch.randn(2, 12, 8, generator=generator), torch.randn(2, 8, 12, 16, generator=generator)
    labels = general_inference(class_logits, embeddings, **geometry)
    assert_equal_where_sure(labels, class_logits, mask_products(*embeddings), geometry)


def test_differs_from_the_sum_over_queries(generator):
    """Two queries that say the same class together outvote one that is surer of another."""
    class_logits = torch.tensor([[[0.9, 0.05, 0.05], [0.05, 0.6, 0.35], [0.05, 0.6, 0.35]]]).log()
    mask_logits = torch.full((1, 3, 4, 4), 5.0)
    assert (general_inference(class_logits, mask_logits, (4, 4)) == 0).all()
    assert (semantic_inference(class_logits, mask_logits, (4, 4)) == 1).all()


def test_pixels_without_a_query(generator):
    class_logits, mask_logits = random_logits(generator)
    class_logits[..., -1] = 50.0
    assert (general_inference(class_logits, mask_logits, (20, 20), ignore_index=7) == 7).all()
    assert general_inference(class_logits, mask_logits, (20, 20), ignore_index=300).dtype == torch.int16
    empty = general_inference(class_logits[:, :0], mask_logits[:, :0], (3, 3))
    assert (empty == 255).all()


def test_nan_never_wins(generator):
    class_logits, mask_logits = random_logits(generator)
    expected = general_inference(class_logits[:, 1:], mask_logits[:, 1:], (30, 30))
    mask_logits[:, 0] = torch.nan
    assert torch.equal(general_inference(class_logits, mask_logits, (30, 30)), expected)


def test_a_model_predicts_both_ways():
    torch.manual_seed(0)
    model = MaskFormer(MaskFormerConfig.preset("tiny", 5))
    images = [torch.rand(3, 50, 70), torch.rand(3, 64, 32)]
    results = model.predict(images, "general")
    assert [tuple(labels.shape) for labels in results] == [(50, 70), (64, 32)]


def test_bad_arguments(generator):
    class_logits, mask_logits = random_logits(generator)
    with pytest.raises(ValueError, match="ignore_index must be at least 0, got -1"):
        general_inference(class_logits, mask_logits, (4, 4), ignore_index=-1)
    with pytest.raises(ValueError, match="ignore_index must fit in int32, got 2147483648"):
        general_inference(class_logits, mask_logits, (4, 4), ignore_index=2**31)
    with pytest.raises(ValueError, match="size must be"):
        general_inference(class_logits, mask_logits, (0, 4))
