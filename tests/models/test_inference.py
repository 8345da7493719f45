"""The public inference functions: what they hand to the reference, and what they refuse."""

from __future__ import annotations

import pytest
import torch

from fastmask import instance_inference, panoptic_inference, reference, semantic_inference

SIZE = (21, 34)


@pytest.fixture
def logits(generator):
    return torch.randn(2, 6, 5, generator=generator) * 3, torch.randn(2, 6, 9, 11, generator=generator) * 3


@pytest.mark.parametrize("order", ["masks", "scores"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_semantic_results_of_the_reference_are_computed_in_float32(logits, order, dtype):
    class_logits, mask_logits = (x.to(dtype) for x in logits)
    options = {"order": order, "backend": "reference"}
    scores = semantic_inference(class_logits, mask_logits, SIZE, output="scores", **options)
    assert scores.dtype == torch.float32
    expected = reference.semantic_inference(
        class_logits.float(), mask_logits.float(), SIZE, order=order, output="scores"
    )
    assert torch.equal(scores, expected)
    labels = semantic_inference(class_logits, mask_logits, SIZE, **options)
    assert labels.dtype == torch.uint8
    assert torch.equal(labels.long(), expected.argmax(1))


@pytest.mark.parametrize("rule", ["maskformer", "mask2former", "huggingface", "huggingface-exact"])
def test_panoptic_results(logits, rule):
    options = {"rule": rule, "threshold": 0.4, "stuff_classes": (2, 3)}
    results = panoptic_inference(*logits, SIZE, **options, backend="reference")
    for (ids, infos), (expected, expected_infos) in zip(
        results, reference.panoptic_inference(*logits, SIZE, overlap_threshold=0.8, **options), strict=True
    ):
        assert torch.equal(ids, expected)
        assert infos == expected_infos


def test_instance_results(logits):
    results = instance_inference(*logits, SIZE, top_k=4, backend="reference")
    for result, expected in zip(results, reference.instance_inference(*logits, SIZE, top_k=4), strict=True):
        assert all(torch.equal(result[name], expected[name]) for name in ("scores", "labels", "masks"))


def test_nothing_carries_a_gradient(logits):
    class_logits, mask_logits = (x.requires_grad_() for x in logits)
    assert not semantic_inference(class_logits, mask_logits, SIZE, output="scores").requires_grad
    assert not instance_inference(class_logits, mask_logits, SIZE)[0]["scores"].requires_grad


def test_bad_arguments(logits):
    class_logits, mask_logits = logits
    with pytest.raises(ValueError, match="size must be"):
        semantic_inference(class_logits, mask_logits, (0, 4))
    with pytest.raises(TypeError, match="mask_logits must be floating point"):
        semantic_inference(class_logits, mask_logits.int(), SIZE)
    with pytest.raises(ValueError, match="class_logits has shape"):
        semantic_inference(class_logits[:1], mask_logits, SIZE)
    with pytest.raises(ValueError, match="order must be one of"):
        semantic_inference(class_logits, mask_logits, SIZE, order="labels")
    with pytest.raises(ValueError, match=r"overlap_threshold must lie in 0\.\.1"):
        panoptic_inference(class_logits, mask_logits, SIZE, overlap_threshold=1.5)
    with pytest.raises(ValueError, match="rule must be one of"):
        panoptic_inference(class_logits, mask_logits, SIZE, rule="detectron2")
    with pytest.raises(ValueError, match="top_k must be at least 1"):
        instance_inference(class_logits, mask_logits, SIZE, top_k=0)
