"""Segment maps in place of masks: the same targets as those of transformers' image processors, and the same losses."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from transformers import Mask2FormerImageProcessor

import fastmask
from fastmask.integrations.transformers import collate_segmentation, segmentation_targets
from tests.helpers.foreign_models import NUM_CLASSES, NUM_QUERIES, SIZE, tiny_maskformer, train_step
from tests.helpers.subclassed_criteria import OtherClassLoss
from tests.integrations.test_patch_points import MODELS as POINT_MODELS
from tests.integrations.test_patch_points import assert_same_step, batch_for

MODELS = {"maskformer": tiny_maskformer, **POINT_MODELS}


def random_map(seed, values, size=(SIZE, SIZE)):
    """Blocks of 8 x 8 pixels."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(len(values), (size[0] // 8, size[1] // 8), generator=generator)
    return torch.tensor(values)[blocks].repeat_interleave(8, 0).repeat_interleave(8, 1)


def masks_of(labels):
    """A map's labels as transformers has them."""
    indices = torch.arange(len(labels["class_labels"]))[:, None, None]
    return {"mask_labels": (labels["mask_labels"] == indices).float(), "class_labels": labels["class_labels"]}


CASES = {
    "classes": ([0, 3, 4], None, {}),
    "classes and void": ([0, 3, 255], None, {"ignore_index": 255}),
    "reduced classes": ([0, 1, 4, 5], None, {"ignore_index": 255, "do_reduce_labels": True}),
    "reduced to a value within": ([0, 1, 4, 5], None, {"ignore_index": 2, "do_reduce_labels": True}),
    "instances": ([1, 7, 9], {1: 4, 7: 4, 9: 0}, {}),
    "instances and void": ([0, 7, 9], {7: 4, 9: 0}, {"ignore_index": 0}),
    "reduced instances": ([0, 7, 9], {7: 4, 9: 1}, {"ignore_index": 255, "do_reduce_labels": True}),
    "void alone": ([255, 255], None, {"ignore_index": 255}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_targets_are_those_of_the_image_processor(case):
    values, classes, options = CASES[case]
    segments = random_map(0, values)
    processor = Mask2FormerImageProcessor(do_resize=False, do_rescale=False, do_normalize=False, **options)
    image = np.zeros((SIZE, SIZE, 3), dtype=np.float32)
    expected = processor([image], [segments.numpy()], instance_id_to_semantic_id=classes, return_tensors="pt")
    labels = segmentation_targets(segments, classes, **options)
    assert labels["mask_labels"].dtype == torch.uint8
    assert labels["class_labels"].equal(expected["class_labels"][0].long())
    masks = masks_of(labels)["mask_labels"]
    assert masks.reshape(-1, SIZE, SIZE).equal(expected["mask_labels"][0].reshape(-1, SIZE, SIZE).float())
    from_numpy = segmentation_targets(segments.numpy().astype(np.uint8), classes, **options)
    assert from_numpy["mask_labels"].equal(labels["mask_labels"])


def test_more_targets_than_a_byte_counts():
    segments = torch.arange(300).view(20, 15)
    labels = segmentation_targets(segments, dict.fromkeys(range(300), 1), ignore_index=299)
    assert labels["mask_labels"].dtype == torch.int32
    assert labels["mask_labels"].flatten().equal(torch.tensor([*range(299), -1], dtype=torch.int32))
    few = segmentation_targets(segments.clamp(max=1), ignore_index=1)
    both = [{"pixel_values": torch.zeros(3, 20, 15), **one} for one in (labels, few)]
    maps = collate_segmentation(both)["mask_labels"]
    assert maps.dtype == torch.int32 and maps[1].unique().tolist() == [-1, 0]


def batch_of_maps(name, sizes=((SIZE, SIZE), (SIZE, SIZE)), values=(0, 1, 2, 3, 255)):
    """Two examples of a model, collated, and the same batch with masks."""
    batch = batch_for(name, 1)
    examples = [
        {"pixel_values": torch.randn(3, *size), **segmentation_targets(random_map(b, values, size), ignore_index=255)}
        for b, size in enumerate(sizes)
    ]
    maps = {**batch, **collate_segmentation(examples)}
    masks = [
        masks_of({**one, "mask_labels": m})["mask_labels"] for one, m in zip(examples, maps["mask_labels"], strict=True)
    ]
    return maps, {**maps, "mask_labels": masks}


@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_are_those_of_masks(name):
    model, (maps, masks) = MODELS[name](), batch_of_maps(name)
    expected = train_step(model, masks)
    fastmask.patch(model)
    assert_same_step(train_step(model, maps), expected)
    assert_same_step(train_step(model, {**maps, "mask_labels": list(maps["mask_labels"])}), expected)
    # Maps of several sizes, which are padded for the losses alone.
    maps["mask_labels"] = [maps["mask_labels"][0], maps["mask_labels"][1][:48]]
    masks["mask_labels"] = [masks["mask_labels"][0], masks["mask_labels"][1][:, :48]]
    expected = train_step(fastmask.unpatch(model), masks)
    assert_same_step(train_step(fastmask.patch(model), maps), expected)


@pytest.mark.parametrize("wide", [False, True])
def test_a_subclass_that_computes_a_part_itself(wide):
    """transformers' forward then hands the map to each part."""
    model, (maps, masks) = MODELS["mask2former"](), batch_of_maps("mask2former")
    model.criterion.__class__ = OtherClassLoss
    expected = train_step(model, masks)
    if wide:
        segments = maps["mask_labels"].int()
        maps["mask_labels"] = torch.where(segments == 255, -1, segments)
    assert_same_step(train_step(fastmask.patch(model), maps), expected)


def test_images_without_targets():
    model, (maps, masks) = MODELS["eomt"](), batch_of_maps("eomt", values=(255,))
    assert all(len(labels) == 0 for labels in maps["class_labels"])
    expected = train_step(model, masks)
    assert_same_step(train_step(fastmask.patch(model), maps), expected)


def test_a_batch_of_several_sizes():
    maps, _ = batch_of_maps("eomt", ((64, 40), (48, 56)))
    assert maps["pixel_values"].shape == (2, 3, 64, 56) and maps["mask_labels"].shape == (2, 64, 56)
    assert not maps["pixel_values"][0, :, :, 40:].any() and not maps["pixel_values"][1, :, 48:].any()
    assert (maps["mask_labels"][0, :, 40:] == 255).all() and (maps["mask_labels"][1, 48:] == 255).all()
    examples = [{"pixel_values": torch.ones(3, *size), **segmentation_targets(torch.zeros(size, dtype=torch.int64))}
                for size in ((8, 4), (6, 5))]  # fmt: skip
    mask = collate_segmentation(examples)["pixel_mask"]
    assert mask.sum((1, 2)).tolist() == [32, 30] and mask[0, :, 4:].sum() == 0


def test_bad_maps():
    segments = torch.zeros(4, 4, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"must hold integers, got torch.float32"):
        segmentation_targets(segments.float())
    with pytest.raises(ValueError, match=r"has shape \(1, 4, 4\); expected \(H, W\)"):
        segmentation_targets(segments[None])
    with pytest.raises(ValueError, match="do_reduce_labels needs an ignore_index"):
        segmentation_targets(segments, do_reduce_labels=True)
    with pytest.raises(ValueError, match=r"no class for the instances \[0\]"):
        segmentation_targets(segments, {1: 1})
    with pytest.raises(ValueError, match="examples is empty"):
        collate_segmentation([])
    with pytest.raises(ValueError, match=r"an image of \(4, 5\) pixels and mask_labels of \(4, 4\)"):
        collate_segmentation([{"pixel_values": torch.zeros(3, 4, 5), **segmentation_targets(segments)}])


@pytest.mark.parametrize("name", ["maskformer", "eomt"])
def test_maps_that_do_not_fit_are_refused(name):
    model, (maps, _) = fastmask.patch(MODELS[name]()), batch_of_maps(name)
    wrong = copy.deepcopy(maps)
    wrong["mask_labels"][1, 3, 5] = 17
    with pytest.raises(ValueError, match=r"mask_labels\[1\] holds 17; expected the index of one of its 4 targets"):
        model(**wrong)
    with pytest.raises(TypeError, match="segment maps must all be uint8, int16 or int32"):
        model(**{**maps, "mask_labels": maps["mask_labels"].long()})
    wrong = copy.deepcopy(maps)
    wrong["class_labels"][0][2] = NUM_CLASSES
    with pytest.raises(ValueError, match=f"class_labels\\[0\\] holds {NUM_CLASSES}; expected 0..{NUM_CLASSES - 1}"):
        model(**wrong)
    assert NUM_QUERIES > 4
