"""Samples, their batches, and one truth seen by three tasks."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch.utils.data import DataLoader

from fastmask.data import ComposedScenes, DatasetInfo, Sample, SceneDataset, collate, open_dataset
from fastmask.data.derived_truth import semantic_segments
from fastmask.models._images import fit_targets, pad_images

VOID = 255


def sample(size, segments, labels, crowd=None):
    image = torch.arange(3 * size[0] * size[1], dtype=torch.uint8).view(3, *size)
    crowd = None if crowd is None else torch.tensor(crowd)
    return Sample(image, torch.tensor(labels).long(), torch.tensor(segments, dtype=torch.int16), crowd=crowd)


def test_segment_maps_batch_with_void_beyond_smaller_images():
    first = sample((2, 3), [[0, 1, -1], [0, 1, 1]], [4, 7])
    second = sample((3, 2), [[0, 0], [-1, 0], [0, 0]], [5])
    images, targets = collate([first, second])
    assert [tuple(image.shape) for image in images] == [(3, 2, 3), (3, 3, 2)]
    assert images[0].dtype == torch.float32
    assert torch.equal(images[0] * 255, first.image.float())
    assert targets.labels.tolist() == [[4, 7], [5, -1]]
    assert targets.segments.dtype == torch.uint8
    assert targets.segments.tolist() == [
        [[0, 1, VOID], [0, 1, 1], [VOID] * 3],
        [[0, 0, VOID], [VOID, 0, VOID], [0, 0, VOID]],
    ]


def test_crowd_regions_are_no_targets():
    one = sample((1, 4), [[0, 1, 2, -1]], [3, 8, 5], crowd=[False, True, False])
    images, targets = collate([one, one])
    assert images.shape == (2, 3, 1, 4)
    assert targets.labels.tolist() == [[3, 5]] * 2
    assert targets.segments[0].tolist() == [[0, VOID, 1, VOID]]


def test_masks_batch_and_crowd_is_void_where_no_target_is():
    masks = torch.tensor([[[1, 1, 0, 0]], [[0, 1, 1, 0]]], dtype=torch.bool)
    image = torch.zeros(3, 1, 4, dtype=torch.uint8)
    one = Sample(image, torch.tensor([3, 8]), masks=masks, crowd=torch.tensor([False, True]))
    none = Sample(image[..., :2], torch.zeros(0).long(), masks=torch.zeros(0, 1, 2, dtype=torch.bool))
    _, targets = collate([one, none])
    assert targets.labels.tolist() == [[3], [-1]]
    assert targets.masks.tolist() == [[[[1, 1, 0, 0]]], [[[0, 0, 0, 0]]]]
    assert targets.valid.tolist() == [[[True, True, False, True]], [[True, True, False, False]]]
    assert collate([none])[1].valid is None


def test_more_segments_than_a_byte_holds():
    segments = torch.arange(300).view(15, 20)
    one = sample((15, 20), segments.tolist(), list(range(300)))
    _, targets = collate([one])
    assert targets.segments.dtype == torch.int32
    assert torch.equal(targets.class_map()[0], segments)


def test_models_take_batches_of_several_sizes():
    """What collate leaves to the model: padding to its stride, and void there."""
    for task in ("panoptic", "instance"):
        samples = [SceneDataset("val", 2, size, task=task)[1] for size in ((40, 70), (64, 33))]
        images, targets = collate(samples)
        batch = pad_images(images, 32)
        fitted = fit_targets(targets, batch, 13)
        assert batch.padded_size == fitted.size == (64, 96)
        valid, masks = fitted.valid_pixels(), fitted.dense_masks()
        for b, one in enumerate(samples):
            height, width = one.size
            assert valid[b].sum() == height * width - (0 if one.segments is None else (one.segments < 0).sum())
            assert masks[b, : len(one.labels), :height, :width].sum() == masks[b].sum()


def test_what_does_not_batch_is_named():
    with pytest.raises(ValueError, match="samples is empty"):
        collate([])
    one = sample((1, 1), [[0]], [0])
    other = Sample(one.image, one.labels, masks=torch.ones(1, 1, 1, dtype=torch.bool), name="b")
    with pytest.raises(ValueError, match="segment maps beside masks"):
        collate([one, other])
    with pytest.raises(ValueError, match="b: instances have no class map"):
        other.class_map()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "depth"}, "task='depth' is unknown"),
        ({"palette": ((0, 0, 0),)}, "palette has 1 entries; expected 2"),
        ({"category_ids": (1, 2, 3)}, "category_ids has 3 entries; expected 2"),
        ({"ignore_index": 1}, "ignore_index=1 is also one of the 2 classes"),
        ({"stuff_classes": (2,)}, "stuff_classes holds 2; expected 0..1"),
    ],
)
def test_wrong_descriptions_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        DatasetInfo(("a", "b"), **arguments)


def test_composed_scenes_are_samples():
    dataset, scenes = open_dataset("composed:scenes", "val"), ComposedScenes("val")
    assert len(dataset) == len(scenes)
    assert dataset.info.task == "panoptic"
    for i in range(5):
        scene, one = scenes[i], dataset[i]
        assert torch.equal(one.image / 255, scene.image)
        assert torch.equal(one.labels, scene.labels)
        assert torch.equal(one.segments.to(torch.uint8), scene.segments)
    with pytest.raises(ValueError, match="split='dev' is unknown"):
        open_dataset("composed:scenes", "dev")


def test_the_semantic_and_the_instance_view_hold_the_panoptic_truth():
    views = {task: SceneDataset("train", 8, (64, 80), 3, task) for task in ("panoptic", "semantic", "instance")}
    info = views["panoptic"].info
    assert views["instance"].info.class_names == info.class_names[:10]
    for i in range(8):
        whole, semantic, instance = (views[task][i] for task in ("panoptic", "semantic", "instance"))
        assert torch.equal(semantic.class_map(), whole.class_map())
        assert semantic.labels.tolist() == sorted(set(whole.labels.tolist()))
        things = [m for m, label in enumerate(whole.labels.tolist()) if label in info.thing_classes]
        assert instance.labels.tolist() == whole.labels[things].tolist()
        for mask, m in zip(instance.masks, things, strict=True):
            assert torch.equal(mask, whole.segments == m)


def test_workers_give_the_samples_of_this_process():
    dataset = pickle.loads(pickle.dumps(SceneDataset("val", 4, (32, 32), task="instance")))
    _, targets = next(iter(DataLoader(dataset, batch_size=4, num_workers=1, collate_fn=collate)))
    assert torch.equal(targets.masks, collate(list(dataset))[1].masks)


def test_classes_beyond_the_range_are_void():
    segments, labels = semantic_segments(torch.tensor([[3, 0, -1, 9, 3]]), 4)
    assert segments.tolist() == [[1, 0, -1, -1, 1]]
    assert labels.tolist() == [0, 3]
