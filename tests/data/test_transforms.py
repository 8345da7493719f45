"""Augmentation: what happens to pixels and truth alike, ignore labels, and where the randomness comes from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from fastmask.data import (
    Augmented,
    ColorJitter,
    Compose,
    RandomCrop,
    RandomFlip,
    RandomSizeCrop,
    ResizeJitter,
    ResizeShortSide,
    Sample,
    SceneDataset,
    Sometimes,
    collate,
    detr_augmentation,
    jitter_augmentation,
    open_dataset,
    semantic_augmentation,
)
from fastmask.data.transforms import resized


def rng(seed=0):
    return np.random.default_rng(seed)


def tell_tale(height=40, width=60, labels=(3, 5, 8)):
    """A sample whose image tells the segment of each pixel: red is 40 times the segment plus 40, 0 at void."""
    segments = torch.full((height, width), -1, dtype=torch.int16)
    segments[:, : width // 3] = 0
    segments[: height // 2, width // 3 : width // 2] = 1
    segments[height // 2 :, width // 3 : width // 2] = 2
    red = (segments.long() + 1) * 40
    image = torch.stack([red, torch.zeros_like(red), torch.full_like(red, 200)]).to(torch.uint8)
    crowd = torch.tensor([label == 5 for label in labels])
    return Sample(image, torch.tensor(labels), segments, crowd=crowd, areas=torch.ones(3), name="tell-tale")


def as_masks(sample):
    indices = torch.arange(len(sample.labels))[:, None, None]
    return sample._replace(masks=sample.segments == indices, segments=None)


GEOMETRY = {
    "crop": RandomCrop((17, 23)),
    "crop of any size": RandomSizeCrop(17, 45),
    "flip": RandomFlip(1.0),
    "resize by whole steps": ResizeShortSide((80,)),
    "several": Compose((ResizeShortSide((40, 120)), RandomCrop((30, 31)), RandomFlip())),
}


@pytest.mark.parametrize("name", GEOMETRY)
@pytest.mark.parametrize("seed", range(4))
def test_truth_stays_with_its_pixels(name, seed):
    original = tell_tale()
    sample = GEOMETRY[name](original, rng(seed))
    assert sample.image.dtype == torch.uint8
    assert sample.segments.dtype == torch.int16
    assert sample.segments.is_contiguous()
    # Segments are numbered anew where one is lost: follow them by their class.
    original_index = torch.tensor([(3, 5, 8).index(label) for label in sample.labels.tolist()] + [-1])
    expected = (original_index[sample.segments.long()] + 1) * 40
    agree = sample.image[0] == expected
    # Bilinear pixels lie between two segments at their border.
    assert agree.float().mean() > 0.85
    assert agree.all() or "resize" in name or "several" in name
    assert set(sample.segments.unique().tolist()) - {-1} == set(range(len(sample.labels)))
    assert sample.crowd.tolist() == [label == 5 for label in sample.labels.tolist()]
    assert (sample.areas is not None) == (name == "flip")
    masked = GEOMETRY[name](as_masks(original), rng(seed))
    assert torch.equal(masked.image, sample.image)
    assert torch.equal(masked.masks, as_masks(sample).masks)
    assert masked.labels.tolist() == sample.labels.tolist()


def test_segments_that_are_cropped_away_are_gone():
    sample = tell_tale()
    gone = [RandomCrop((10, 10))(sample, rng(seed)).labels.tolist() for seed in range(20)]
    assert [] in gone
    assert any(labels == [8] for labels in gone)


def test_resizing_equals_pillow_and_the_nearest_pixel():
    image = torch.from_numpy(rng().integers(0, 256, (3, 37, 53)).astype(np.uint8))
    segments = torch.from_numpy(rng(1).integers(-1, 4, (37, 53)).astype(np.int16))
    sample = Sample(image, torch.arange(4), segments)
    for size in ((80, 99), (20, 30), (37, 10)):
        out = resized(sample, size)
        picture = Image.fromarray(image.permute(1, 2, 0).numpy().copy()).resize(size[::-1], Image.Resampling.BILINEAR)
        assert np.array_equal(out.image.permute(1, 2, 0).numpy(), np.asarray(picture))
        plane = Image.fromarray((segments + 1).numpy().astype(np.uint8)).resize(size[::-1], Image.Resampling.NEAREST)
        assert np.array_equal(out.segments.numpy() + 1, np.asarray(plane))
    assert resized(sample, (37, 53)) is sample


@pytest.mark.parametrize(("size", "expected"), [((40, 80), (50, 100)), ((40, 300), (16, 120)), ((200, 50), (120, 30))])
def test_the_short_side_is_chosen_and_the_long_side_limited(size, expected):
    sample = Sample(torch.zeros(3, *size, dtype=torch.uint8), torch.zeros(0).long(), -torch.ones(size).short())
    assert ResizeShortSide((50,), 120)(sample, rng()).size == expected
    sides = {ResizeShortSide((10, 20, 30))(sample, rng(seed)).size for seed in range(30)}
    assert {min(size) for size in sides} == {10, 20, 30}


def test_jitter_scales_to_the_frame():
    sample = tell_tale(40, 60)
    sizes = [ResizeJitter((30, 30), (0.5, 2.0))(sample, rng(seed)).size for seed in range(60)]
    widths = [width for _, width in sizes]
    assert 15 <= min(widths) < 20
    assert 50 < max(widths) <= 60
    assert all(abs(height - width * 2 / 3) <= 1 for height, width in sizes)
    for seed in range(10):
        out = jitter_augmentation((30, 30))(sample, rng(seed))
        assert max(out.size) <= 30


def test_the_single_category_limit_prefers_mixed_crops():
    sample = tell_tale(60, 300)
    crop = RandomCrop((20, 20), max_category_share=0.75)

    def is_mixed(out):
        areas = torch.bincount(
            out.labels, weights=(out.segments == torch.arange(len(out.labels))[:, None, None]).sum((1, 2)).double()
        )
        return len(out.labels) > 1 and areas.max() < 0.75 * areas.sum()

    plain = np.mean([is_mixed(RandomCrop((20, 20))(sample, rng(seed))) for seed in range(60)])
    limited = np.mean([is_mixed(crop(sample, rng(seed))) for seed in range(60)])
    assert plain < 0.25
    assert limited > 2 * plain
    # Void does not count: two classes of equal share are mixed, however much void there is.
    segments = torch.full((20, 20), -1, dtype=torch.int16)
    segments[0, :2], segments[0, 2:4] = 0, 1
    assert crop._is_mixed(sample._replace(segments=segments, labels=torch.tensor([4, 6])))
    assert not crop._is_mixed(sample._replace(segments=segments, labels=torch.tensor([4, 4])))
    # Without a choice the crop is taken as it is.
    alone = sample._replace(segments=torch.zeros_like(sample.segments), labels=torch.tensor([1]), crowd=None)
    assert crop(alone, rng()).size == (20, 20)


def test_an_image_smaller_than_the_crop_stays():
    sample = tell_tale(40, 60)
    assert RandomCrop((100, 30))(sample, rng()).size == (40, 30)
    assert RandomCrop((100, 100))(sample, rng()).size == (40, 60)


def test_crops_of_any_size_keep_within_their_limits_and_the_image():
    sizes = [RandomSizeCrop(20, 50)(tell_tale(40, 60), rng(seed)).size for seed in range(200)]
    assert {h for h, _ in sizes} == set(range(20, 41)) and {w for _, w in sizes} == set(range(20, 51))
    assert {RandomSizeCrop(50, 70)(tell_tale(40, 60), rng(seed)).size[0] for seed in range(5)} == {40}


def test_sometimes_is_when_the_first_number_is_small_enough():
    crop = RandomCrop((10, 10))
    for seed in range(40):
        changed = Sometimes(crop, 0.25)(tell_tale(), rng(seed)).size == (10, 10)
        assert changed == (rng(seed).random() < 0.25)


def test_detrs_augmentation_has_its_sides():
    sizes = [detr_augmentation()(tell_tale(120, 160), rng(seed)).size for seed in range(12)]
    assert {min(size) for size in sizes} <= set(range(480, 801, 32)) and len(set(sizes)) > 6
    assert max(detr_augmentation()(tell_tale(60, 200), rng(1)).size) == 1333


def test_color_changes_the_image_alone_and_within_its_limits():
    sample = tell_tale()
    sample = sample._replace(image=torch.from_numpy(rng(5).integers(0, 256, (3, 40, 60)).astype(np.uint8)))
    outs = [ColorJitter()(sample, rng(seed)) for seed in range(40)]
    for out in outs:
        assert torch.equal(out.segments, sample.segments)
        assert out.areas is not None
        assert out.image.dtype == torch.uint8
        assert out.image.shape == sample.image.shape
    same = sum(torch.equal(out.image, sample.image) for out in outs)
    assert 0 < same < 10  # one in sixteen on average
    brightness = ColorJitter(contrast=(1, 1), saturation=(1, 1), hue=0)
    shifts = [(brightness(tell_tale(), rng(seed)).image[2].float() - 200).mean().item() for seed in range(60)]
    assert all(abs(shift) <= 35 for shift in shifts)
    assert min(shifts) < -15
    assert max(shifts) > 15
    contrast = ColorJitter(brightness=0, saturation=(1, 1), hue=0)
    factors = [(contrast(tell_tale(), rng(seed)).image[0, 0, 0].float() / 40).item() for seed in range(60)]
    assert 0.45 < min(factors) < 0.8
    assert 1.2 < max(factors) < 1.55
    gray = sample._replace(image=sample.image[:1].expand(3, -1, -1).contiguous())
    colored = ColorJitter(brightness=0, contrast=(1, 1))
    assert all(torch.equal(colored(gray, rng(seed)).image, gray.image) for seed in range(10))


def test_a_turn_of_the_hue_by_a_third_changes_the_primary_colors():
    red = tell_tale()._replace(image=torch.tensor([200, 0, 0], dtype=torch.uint8)[:, None, None].expand(3, 40, 60))
    outs = [ColorJitter(0, (1, 1), (1, 1), hue=180)(red, rng(seed)).image[:, 0, 0].tolist() for seed in range(40)]
    assert any(out[0] < 100 and max(out) >= 195 for out in outs)
    assert all(max(out) >= 195 and min(out) <= 5 for out in outs)


def test_randomness_depends_on_seed_epoch_and_index_alone():
    scenes = SceneDataset("train", 6, (64, 64))
    transform = semantic_augmentation((48, 48), short_side=64, max_category_share=0.75)
    augmented = Augmented(scenes, transform, seed=7)
    first = augmented[(2, 3)]
    _ = [augmented[(e, i)] for e in range(2) for i in range(6)]
    again = Augmented(SceneDataset("train", 6, (64, 64)), transform, seed=7)[(2, 3)]
    assert all(torch.equal(a, b) for a, b in zip(first[:3], again[:3], strict=True))
    assert torch.equal(augmented[3].image, augmented[(0, 3)].image)
    assert torch.equal(augmented[-1].image, augmented[5].image)
    others = [augmented[(3, 3)], Augmented(scenes, transform, seed=8)[(2, 3)]]
    assert not any(a.image.shape == first.image.shape and torch.equal(a.image, first.image) for a in others)
    assert (augmented.info, augmented.split, len(augmented)) == (scenes.info, "train", 6)
    with pytest.raises(IndexError):
        augmented[6]
    with pytest.raises(ValueError, match="seed must not be negative"):
        Augmented(scenes, transform, seed=-1)


def test_workers_do_not_change_what_a_sampler_asks_for():
    augmented = Augmented(SceneDataset("train", 6, (64, 64)), semantic_augmentation((48, 48), short_side=64), seed=1)
    order = [(1, 4), (1, 0), (2, 4), (2, 1)]
    loader = DataLoader(augmented, batch_size=2, sampler=order, num_workers=2, collate_fn=collate)
    for batch, keys in zip(loader, (order[:2], order[2:]), strict=True):
        images, targets = collate([augmented[key] for key in keys])
        assert all(torch.equal(a, b) for a, b in zip(batch[0], images, strict=True))
        assert torch.equal(batch[1].segments, targets.segments)


def test_ignored_pixels_stay_ignored():
    dataset = open_dataset("composed:scenes", "train")
    transform = semantic_augmentation((96, 96), short_side=128)
    for i in range(6):
        sample = dataset[i]
        sample = sample._replace(segments=sample.segments.clone())
        sample.segments[:, 40:70] = -1
        # Void is painted where no scene has that color.
        sample.image[:, :, 40:70] = torch.tensor([255, 0, 255], dtype=torch.uint8)[:, None, None]
        out = Compose((*transform.transforms[:2], RandomFlip()))(sample, rng(i))
        painted = (out.image == torch.tensor([255, 0, 255], dtype=torch.uint8)[:, None, None]).all(0)
        assert (out.segments[painted] == -1).all()
        assert (out.class_map()[painted] == 255).all()
        _, targets = collate([out])
        assert not targets.valid_pixels()[0][painted].any()
