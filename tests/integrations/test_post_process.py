"""Post-processing against the image processors of transformers, bit for bit."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import interpolate
from transformers import (
    EomtImageProcessor,
    Mask2FormerImageProcessor,
    MaskFormerImageProcessor,
    OneFormerImageProcessor,
)
from transformers.models.eomt.modeling_eomt import EomtForUniversalSegmentationOutput
from transformers.models.mask2former.modeling_mask2former import Mask2FormerForUniversalSegmentationOutput
from transformers.models.maskformer.modeling_maskformer import MaskFormerForInstanceSegmentationOutput
from transformers.models.oneformer.modeling_oneformer import OneFormerForUniversalSegmentationOutput
from transformers.models.rf_detr.modeling_rf_detr import RfDetrInstanceSegmentationOutput

from fastmask import reference
from fastmask.integrations.transformers import (
    post_process_instance_segmentation,
    post_process_panoptic_segmentation,
    post_process_semantic_segmentation,
)

FAMILIES = {
    "maskformer": (MaskFormerImageProcessor, MaskFormerForInstanceSegmentationOutput),
    "mask2former": (Mask2FormerImageProcessor, Mask2FormerForUniversalSegmentationOutput),
}
OTHER_FAMILIES = {
    "oneformer": (OneFormerImageProcessor, OneFormerForUniversalSegmentationOutput),
    "eomt": (EomtImageProcessor, EomtForUniversalSegmentationOutput),
}
SIZES = {"own size": None, "one size": [(40, 56)] * 3, "sizes": [(40, 56), (7, 90), (33, 33)]}


def random_outputs(family, seed, *, queries=12, classes=4, grid=(24, 32)):
    """Class scores that often pass 0.5, smooth masks of which many overlap; one image without any object."""
    generator = torch.Generator().manual_seed(seed)
    class_logits = torch.randn(3, queries, classes + 1, generator=generator) * 3
    class_logits[2, :, -1] = 30
    coarse = torch.randn(3, queries, 3, 3, generator=generator) * 6
    return (FAMILIES | OTHER_FAMILIES)[family][1](
        class_queries_logits=class_logits, masks_queries_logits=interpolate(coarse, size=grid, mode="bicubic")
    )


def processor(family):
    if family == "oneformer":
        return object.__new__(OneFormerImageProcessor)  # its constructor downloads the names of classes
    options = {"size": {"shortest_edge": 96, "longest_edge": 96}} if family == "eomt" else {}
    return (FAMILIES | OTHER_FAMILIES)[family][0](**options)


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
        with pytest.raises(TypeError, match="class logits and mask logits"):
            function(SimpleNamespace(logits=outputs.class_queries_logits))
    with pytest.raises(TypeError, match="expected fix=True"):
        post_process_instance_segmentation(OneFormerForUniversalSegmentationOutput(**outputs))
    with pytest.raises(ValueError, match="needs fix=True"):
        post_process_panoptic_segmentation(outputs, return_binary_maps=True)
    with pytest.raises(ValueError, match=r"must lie in 0..1, got 1.5"):
        post_process_instance_segmentation(outputs, mask_threshold=1.5, fix=True)
    with pytest.raises(ValueError, match="target_sizes must be given"):
        post_process_semantic_segmentation(outputs, valid_sizes=[(4, 4)] * 3)
    with pytest.raises(ValueError, match="no panoptic inference"):
        post_process_panoptic_segmentation(rf_detr_outputs(0))
    with pytest.raises(ValueError, match="cannot both be True"):
        post_process_instance_segmentation(outputs, return_coco_annotation=True, return_binary_maps=True)


def square_outputs(family, seed):
    return random_outputs(family, seed, grid=(24, 24))


@pytest.mark.parametrize("family", OTHER_FAMILIES)
@pytest.mark.parametrize("seed", range(2))
def test_semantic_of_other_families(family, seed):
    outputs, sizes = square_outputs(family, seed), SIZES["sizes"]
    theirs = processor(family).post_process_semantic_segmentation(outputs, sizes)
    ours = post_process_semantic_segmentation(outputs, torch.tensor(sizes))
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == torch.int64 and one.shape == other.shape
        assert (one != other).float().mean() < 1e-3


@pytest.mark.parametrize("scores", [False, True])
def test_windows_of_eomt_are_merged(scores):
    sizes = [(40, 64), (80, 50)]
    outputs = EomtForUniversalSegmentationOutput(
        class_queries_logits=torch.randn(4, 6, 4, generator=torch.Generator().manual_seed(0)),
        masks_queries_logits=interpolate(torch.randn(4, 6, 4, 4, generator=torch.Generator().manual_seed(1)), (24, 24)),
        patch_offsets=[[0, 0, 96], [0, 57, 153], [1, 0, 96], [1, 57, 153]],
    )
    options = {"return_segmentation_scores": scores}
    theirs = EomtImageProcessor(size={"shortest_edge": 96, "longest_edge": None}).post_process_semantic_segmentation(
        outputs, sizes, **options
    )
    ours = post_process_semantic_segmentation(outputs, sizes, **options)
    for one, other in zip(ours, theirs, strict=True):
        if scores:
            torch.testing.assert_close(one.segmentation_scores, other.segmentation_scores)
        else:
            assert (one != other).float().mean() < 1e-3


@pytest.mark.parametrize("fuse", [None, {0, 2}])
@pytest.mark.parametrize("seed", range(3))
def test_panoptic_of_eomt(seed, fuse):
    outputs, sizes = square_outputs("eomt", seed), SIZES["sizes"]
    options = {"threshold": 0.4, "mask_threshold": 0.3, "overlap_mask_area_threshold": 0.4}
    theirs = processor("eomt").post_process_panoptic_segmentation(
        outputs, sizes, **options, stuff_classes=None if fuse is None else list(fuse)
    )
    ours = post_process_panoptic_segmentation(outputs, **options, target_sizes=sizes, label_ids_to_fuse=fuse)
    for one, other in zip(ours, theirs, strict=True):
        assert one["segmentation"].dtype == other["segmentation"].dtype
        assert (one["segmentation"] != other["segmentation"]).float().mean() < 1e-3
        assert [(i["id"], i["label_id"]) for i in one["segments_info"]] == [
            (i["id"], i["label_id"]) for i in other["segments_info"]
        ]


def test_panoptic_of_oneformer():
    outputs = random_outputs("oneformer", 1)
    options = {"threshold": 0.4, "label_ids_to_fuse": {0}}  # its processor resizes by torchvision
    theirs = processor("oneformer").post_process_panoptic_segmentation(outputs, **options)
    assert_same(post_process_panoptic_segmentation(outputs, **options), theirs)


@pytest.mark.parametrize("seed", range(3))
def test_instances_of_eomt(seed):
    outputs, sizes = square_outputs("eomt", seed), SIZES["sizes"]
    theirs = processor("eomt").post_process_instance_segmentation(outputs, sizes, threshold=0.4)
    ours = post_process_instance_segmentation(outputs, threshold=0.4, target_sizes=sizes)
    assert any(one["segments_info"] for one in theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert (one["segmentation"] != other["segmentation"]).float().mean() < 1e-3
        for info, wanted in zip(one["segments_info"], other["segments_info"], strict=True):
            assert (info["id"], info["label_id"]) == (wanted["id"], wanted["label_id"])
            assert info["score"] == pytest.approx(wanted["score"], abs=1e-5)


def rf_detr_outputs(seed):
    outputs = random_outputs("maskformer", seed)
    return RfDetrInstanceSegmentationOutput(
        logits=outputs.class_queries_logits[..., :-1],
        pred_masks=outputs.masks_queries_logits,
        pred_boxes=torch.rand(3, 12, 4),
    )


def plain_rf_detr(outputs, size, b, threshold, mask_threshold, binary):
    """The text of transformers' image processor, which needs torchvision."""
    probabilities = outputs.logits[b].sigmoid()
    best = probabilities.flatten().topk(len(probabilities))
    segmentation, maps, infos = torch.full(size, -1, dtype=torch.int32), [], []
    for score, index in zip(*best, strict=True):
        query, label = divmod(int(index), probabilities.shape[1])
        logits = interpolate(outputs.pred_masks[b : b + 1, query : query + 1], size=size, mode="bilinear")[0, 0]
        mask = logits > mask_threshold
        if not score > threshold or not mask.any():
            continue
        if not binary:
            mask &= segmentation == -1
            if not mask.any():
                continue
        infos.append({"id": len(infos) + 1, "label_id": label, "score": score.item()})
        maps.append(mask)
        segmentation[mask] = len(infos)
    return torch.stack(maps) if binary and maps else segmentation, infos


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("probability", [0.5, 0.7])
def test_instances_of_rf_detr(binary, probability):
    outputs, sizes = rf_detr_outputs(3), SIZES["sizes"]
    results = post_process_instance_segmentation(
        outputs, mask_threshold=probability, target_sizes=sizes, return_binary_maps=binary
    )
    logit = torch.tensor(probability).logit().item()
    for b, (result, size) in enumerate(zip(results, sizes, strict=True)):
        expected, infos = plain_rf_detr(outputs, size, b, 0.5, logit, binary)
        assert len(infos) > 1
        assert result["segmentation"].dtype == expected.dtype and result["segmentation"].shape == expected.shape
        assert (result["segmentation"] != expected).float().mean() < 1e-3
        for info, wanted in zip(result["segments_info"], infos, strict=True):
            assert (info["id"], info["label_id"]) == (wanted["id"], wanted["label_id"])
            assert info["score"] == pytest.approx(wanted["score"], abs=1e-6)


@pytest.mark.parametrize("family", [*FAMILIES, *OTHER_FAMILIES, "rf_detr"])
def test_thresholds_are_used_with_fix(family):
    """Masks are resized logits above the threshold; better instances come first and cover worse ones."""
    outputs = rf_detr_outputs(4) if family == "rf_detr" else square_outputs(family, 4)
    options = {"threshold": 0.2, "target_sizes": SIZES["sizes"], "fix": True}
    for mask_threshold in (0.3, 0.5, 0.8):
        for overlap in (0.0, 0.6):
            chosen = {"mask_threshold": mask_threshold, "overlap_mask_area_threshold": overlap}
            binary = post_process_instance_segmentation(outputs, **options, **chosen, return_binary_maps=True)
            maps = post_process_instance_segmentation(outputs, **options, **chosen)
            for one, other, size in zip(binary, maps, SIZES["sizes"], strict=True):
                assert one["segments_info"] == other["segments_info"]
                scores = [info["score"] for info in one["segments_info"]]
                assert scores == sorted(scores, reverse=True)
                covered = torch.zeros(size, dtype=torch.bool)
                for index, _ in enumerate(scores):
                    mask = one["segmentation"][index].bool()
                    visible = mask & ~covered
                    assert visible.sum() > overlap * mask.sum()
                    assert (other["segmentation"] == index).equal(visible)
                    covered |= mask
    areas = []
    for mask_threshold in (0.2, 0.5, 0.7):
        best = post_process_instance_segmentation(
            outputs, **options, mask_threshold=mask_threshold, return_binary_maps=True
        )
        areas.append(float(best[0]["segmentation"][0].sum()))
    assert areas[0] > areas[1] > areas[2] > 0


def test_fixed_run_lengths_are_those_of_pycocotools():
    outputs = random_outputs("mask2former", 4)
    options = {"threshold": 0.2, "target_sizes": SIZES["sizes"], "fix": True}
    maps = post_process_instance_segmentation(outputs, **options, return_binary_maps=True)
    runs = post_process_instance_segmentation(outputs, **options, return_coco_annotation=True)
    assert any(one["segments_info"] for one in maps)
    for one, other in zip(maps, runs, strict=True):
        masks = one["segmentation"].bool() if one["segments_info"] else torch.zeros(0, 4, 4, dtype=torch.bool)
        assert other["segmentation"] == reference.rle_encode(masks)


def test_sizes_of_the_network_input():
    """Images of a padded batch are cropped from it, and Mask2Former's logits need not pass through 384 x 384."""
    outputs = random_outputs("mask2former", 5)
    steps = {"padded_size": (96, 128), "valid_sizes": [(96, 100), (50, 128), (96, 100)]}
    options = {"target_sizes": SIZES["sizes"], **steps}
    labels = post_process_semantic_segmentation(outputs, **options)
    segments = post_process_panoptic_segmentation(outputs, **options, fix=True, return_binary_maps=True)
    for b, (size, valid) in enumerate(zip(SIZES["sizes"], steps["valid_sizes"], strict=True)):
        arguments = outputs.class_queries_logits[b], outputs.masks_queries_logits[b], size
        steps_of_image = {"padded_size": (96, 128), "valid_size": valid}
        expected = reference.semantic_inference(*arguments, order="scores", **steps_of_image)[0]
        assert (labels[b] != expected).float().mean() < 1e-3
        ids, infos = reference.panoptic_inference(*arguments, rule="huggingface", threshold=0.5, **steps_of_image)[0]
        assert [info["label_id"] for info in segments[b]["segments_info"]] == [info["category_id"] for info in infos]
        assert segments[b]["segmentation"].shape == (len(infos), *size)
        for info, plane in zip(infos, segments[b]["segmentation"], strict=True):
            assert (plane.bool() != (ids == info["id"])).float().mean() < 1e-3
