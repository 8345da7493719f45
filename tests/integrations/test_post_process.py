"""Post-processing against the image processors of transformers, bit for bit."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import interpolate
from transformers import Mask2FormerImageProcessor, MaskFormerImageProcessor
from transformers.models.eomt.modeling_eomt import EomtForUniversalSegmentationOutput
from transformers.models.mask2former.modeling_mask2former import Mask2FormerForUniversalSegmentationOutput
from transformers.models.maskformer.modeling_maskformer import MaskFormerForInstanceSegmentationOutput
from transformers.models.oneformer.modeling_oneformer import OneFormerForUniversalSegmentationOutput

from fastmask.integrations.transformers import (
    post_process_instance_segmentation,
    post_process_panoptic_segmentation,
    post_process_semantic_segmentation,
)

FAMILIES = {
    "maskformer": (MaskFormerImageProcessor, MaskFormerForInstanceSegmentationOutput),
    "mask2former": (Mask2FormerImageProcessor, Mask2FormerForUniversalSegmentationOutput),
}
SIZES = {"own size": None, "one size": [(40, 56)] * 3, "sizes": [(40, 56), (7, 90), (33, 33)]}


def random_outputs(family, seed, *, queries=12, classes=4, grid=(24, 32)):
    """Class scores that often pass 0.5, smooth masks of which many overlap; one image without any object."""
    generator = torch.Generator().manual_seed(seed)
    class_logits = torch.randn(3, queries, classes + 1, generator=generator) * 3
    class_logits[2, :, -1] = 30
    coarse = torch.randn(3, queries, 3, 3, generator=generator) * 6
    return FAMILIES[family][1](
        class_queries_logits=class_logits, masks_queries_logits=interpolate(coarse, size=grid, mode="bicubic")
    )


def processor(family):
    return FAMILIES[family][0]()


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert list(one) == list(other) == ["segmentation", "segments_info"]
        segmentation, expected = one["segmentation"], other["segmentation"]
        if isinstance(expected, list):
            assert segmentation == expected
        else:
            assert segmentation.dtype == expected.dtype
            assert segmentation.equal(expected)
        assert len(one["segments_info"]) == len(other["segments_info"])
        for info, wanted in zip(one["segments_info"], other["segments_info"], strict=True):
            assert info == wanted | {"score": info["score"]}
            assert info["score"] == pytest.approx(wanted["score"], abs=1.5e-6)  # the last of 6 digits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("seed", range(2))
def test_semantic(family, sizes, seed):
    outputs = random_outputs(family, seed)
    theirs = processor(family).post_process_semantic_segmentation(outputs, SIZES[sizes])
    ours = post_process_semantic_segmentation(outputs, SIZES[sizes])
    assert all(one.dtype == torch.int64 and one.equal(other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sizes", SIZES)
def test_semantic_scores(family, sizes):
    outputs = random_outputs(family, 3)
    theirs = processor(family).post_process_semantic_segmentation(
        outputs, SIZES[sizes], return_segmentation_scores=True
    )
    ours = post_process_semantic_segmentation(outputs, SIZES[sizes], return_segmentation_scores=True)
    for one, other in zip(ours, theirs, strict=True):
        assert type(one) is type(other)
        assert one.segmentation.equal(other.segmentation)
        torch.testing.assert_close(one.segmentation_scores, other.segmentation_scores)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("form", [{}, {"return_coco_annotation": True}, {"return_binary_maps": True}])
@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_instances(family, sizes, form, threshold):
    options = {"threshold": threshold, "target_sizes": SIZES[sizes], **form}
    outputs = random_outputs(family, 4)
    theirs = processor(family).post_process_instance_segmentation(outputs, **options)
    assert_same(post_process_instance_segmentation(outputs, **options), theirs)


def test_instances_in_the_order_of_an_unsorted_topk():
    """With many queries topk leaves its results in another order than by value, and they overlap."""
    outputs = random_outputs("maskformer", 5, queries=100, classes=60)
    theirs = processor("maskformer").post_process_instance_segmentation(outputs, threshold=0.1)
    assert_same(post_process_instance_segmentation(outputs, threshold=0.1), theirs)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("fuse", [None, {0, 2}, {0, 1, 2, 3}])
@pytest.mark.parametrize("seed", range(2))
def test_panoptic(family, sizes, fuse, seed):
    options = {
        "threshold": 0.4,
        "mask_threshold": 0.3,
        "overlap_mask_area_threshold": 0.4,
        "label_ids_to_fuse": fuse,
        "target_sizes": SIZES[sizes],
    }
    outputs = random_outputs(family, seed)
    theirs = processor(family).post_process_panoptic_segmentation(outputs, **options)
    assert_same(post_process_panoptic_segmentation(outputs, **options), theirs)


def test_panoptic_fixed_gives_each_segment_its_own_id():
    outputs = random_outputs("maskformer", 0)
    options = {"threshold": 0.2, "overlap_mask_area_threshold": 0.0, "mask_threshold": 0.1, "label_ids_to_fuse": {0, 1}}
    for result in post_process_panoptic_segmentation(outputs, fix=True, **options):
        ids = [info["id"] for info in result["segments_info"]]
        assert len(set(ids)) == len(ids)
    repeated = post_process_panoptic_segmentation(outputs, **options)
    assert any(len({i["id"] for i in r["segments_info"]}) < len(r["segments_info"]) for r in repeated)


def test_any_object_with_the_two_logits_will_do():
    outputs = random_outputs("maskformer", 6)
    plain = SimpleNamespace(
        class_queries_logits=outputs.class_queries_logits.requires_grad_(),
        masks_queries_logits=outputs.masks_queries_logits.requires_grad_(),
    )
    for function in (post_process_instance_segmentation, post_process_panoptic_segmentation):
        assert_same(function(plain), function(outputs))


def test_bad_arguments():
    outputs = random_outputs("maskformer", 7)
    for function in (
        post_process_semantic_segmentation,
        post_process_instance_segmentation,
        post_process_panoptic_segmentation,
    ):
        with pytest.raises(ValueError, match="target_sizes has 2 sizes for 3 images"):
            function(outputs, target_sizes=[(4, 4)] * 2)
        for kind in (OneFormerForUniversalSegmentationOutput, EomtForUniversalSegmentationOutput):
            with pytest.raises(TypeError, match=kind.__name__):
                function(kind(**outputs))
    with pytest.raises(ValueError, match="cannot both be True"):
        post_process_instance_segmentation(outputs, return_coco_annotation=True, return_binary_maps=True)
