"""Composed scenes: the same everywhere, and true to the last pixel."""

import hashlib
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.utils.data import DataLoader

from fastmask.data import CLASS_NAMES, ICON_CLASSES, PALETTE, STUFF_LABELS, THING_LABELS, ComposedScenes, collate_scenes
from fastmask.data.composed.library import load_library
from fastmask.data.composed.plan import MAX_THINGS, Draws
from fastmask.data.composed.render import MIN_VISIBLE_PIXELS, MIN_VISIBLE_SHARE, VOID

SPLITS = ("train", "val")
# Of the first 32 scenes; other machines and versions of NumPy and Pillow must give the same bits.
DIGESTS = {
    "train": "088afe58b177451dde98adab180cb69d247cc58febc57e96c7704f24b4bcb6e2",
    "val": "9a123b66715f833ec48d54e2c341093c1e38677f379b580781c40bda4efbc0a5",
}

DIGESTS_OF_ICONS = {
    "train": "3d6535e59316e07a515d866f7d82d84e8286a053633c9ba0484f686f5ee9d718",
    "val": "8f50629cc47d16e6945b21d9d92573b9011fa7ef657b50879ca82cc50d77087b",
}


def digest(scenes, indices) -> str:
    state = hashlib.sha256()
    for i in indices:
        for tensor in scenes[i]:
            state.update(tensor.numpy().tobytes())
    return state.hexdigest()


@pytest.mark.parametrize("split", SPLITS)
def test_scenes_are_the_same_on_every_machine(split):
    assert digest(ComposedScenes(split), range(32)) == DIGESTS[split]


@pytest.mark.parametrize("split", SPLITS)
def test_scenes_of_icons_are_the_same_on_every_machine(split):
    assert digest(ComposedScenes(split, icons=150), range(32)) == DIGESTS_OF_ICONS[split]


def test_icons_have_colors_of_their_own():
    scenes = ComposedScenes("val", length=40, icons=13)
    library = load_library("val", 13)
    checked = 0
    for i, scene in enumerate(scenes):
        things = scenes.plan(i).things
        for segment, label in enumerate(scene.labels.tolist()):
            if label in scenes.stuff_labels:
                continue
            thing = next(t for t in things if t.label == label)
            if sum(t.label == label for t in things) > 1:
                continue
            green, blue = (library.stamps[label, thing.number, plane] for plane in (0, 1))
            covered = green & 0xFFFF == 255
            own = np.array([(blue >> 16)[covered].mean(), (green >> 16)[covered].mean(), (blue & 255)[covered].mean()])
            shown = scene.image.permute(1, 2, 0).numpy()[scene.segments.numpy() == segment].mean(0) * 255
            mask = scene.segments.numpy() == segment
            if (
                mask[[0, -1]].any()
                or mask[:, [0, -1]].any()
                or mask.sum() < 0.8 * library.areas[label, 0] * thing.length**2
            ):
                continue
            np.testing.assert_allclose(shown, own * thing.color, atol=40)
            checked += 1
    assert checked > 20


def test_scenes_depend_on_neither_order_nor_length_nor_process():
    script = (
        "from fastmask.data import ComposedScenes; from tests.data.test_scenes import digest\n"
        "scenes = ComposedScenes('val', length=40, seed=3)\n"
        "[scenes[i] for i in (39, 2)]; print(digest(scenes, range(4, 9)))"
    )
    root = Path(__file__).parents[2]
    other = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert digest(ComposedScenes("val", length=9, seed=3), range(4, 9)) == other.stdout.strip()


def test_seed_split_and_index_choose_the_scene():
    digests = {
        digest(ComposedScenes(split, seed=seed), [i])
        for split in SPLITS
        for seed in (0, 1, 2**64 - 1)
        for i in range(5)
    }
    assert len(digests) == 2 * 3 * 5


def test_scene_has_the_documented_form():
    scenes = ComposedScenes("train", length=20, size=(96, 160))
    assert len(scenes) == 20
    for image, segments, labels in scenes:
        assert image.shape == (3, 96, 160)
        assert image.dtype == torch.float32
        assert image.is_contiguous()
        assert image.min() >= 0
        assert image.max() <= 1
        assert segments.shape == (96, 160)
        assert segments.dtype == torch.uint8
        assert labels.dtype == torch.int64
        assert labels.dim() == 1


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("size", [(128, 128), (32, 32), (67, 201)])
def test_every_pixel_has_one_segment_or_is_void(split, size):
    for scene in ComposedScenes(split, length=60, size=size):
        labels = scene.labels.tolist()
        present, areas = scene.segments.unique(return_counts=True)
        counted = dict(zip(present.tolist(), areas.tolist(), strict=True))
        assert counted.pop(VOID, 0) < 3 * MIN_VISIBLE_PIXELS
        assert list(counted) == list(range(len(labels)))
        assert min(counted.values()) >= MIN_VISIBLE_PIXELS
        things = [label for label in labels if label in THING_LABELS]
        stuff = [label for label in labels if label in STUFF_LABELS]
        assert labels == things + stuff
        assert len(things) <= MAX_THINGS
        assert len(set(stuff)) == len(stuff)


def _float_coverage(stamp, garment, size):
    """The coverage of a garment at every pixel of a scene, in float64 and without a window."""
    angle = 2 * np.arctan(garment.half_turn)
    y, x = np.indices(size) + 0.5
    x, y = x - garment.x, y - garment.y
    step = 56 / garment.length
    u = step * (np.cos(angle) * x + np.sin(angle) * y) * (-1 if garment.is_mirrored else 1)
    v = step * (np.cos(angle) * y - np.sin(angle) * x)
    return ndimage.map_coordinates(stamp.astype(float), [v + 31.5, u + 31.5], order=1)


def _ground(plan):
    """The stuff class of every pixel, region by region."""
    y, x = np.indices(plan.size) + 0.5
    ground = np.full(plan.size, plan.regions[0].stuff)
    for region in plan.regions[1:]:
        line = region.boundary
        nx, ny = line.normal
        assert np.hypot(nx, ny) == pytest.approx(1)
        across = (x - line.point[0]) * nx + (y - line.point[1]) * ny
        phase = (((y - line.point[1]) * nx - (x - line.point[0]) * ny) / line.wavelength + line.phase) % 1
        wave = 4 * np.where(phase < 0.5, 2 * phase * (1 - 2 * phase), -(2 * phase - 1) * (2 - 2 * phase))
        ground[across + line.amplitude * wave >= 0] = region.stuff
    return ground


@pytest.mark.parametrize("icons", [0, 50])
@pytest.mark.parametrize("split", SPLITS)
def test_truth_equals_an_independent_composition(split, icons):
    library = load_library(split, icons)
    scenes = ComposedScenes(split, length=60, icons=icons)
    for i, scene in enumerate(scenes):
        plan = scenes.plan(i)
        covers, areas = [], []
        for garment in plan.things:
            stamp = library.stamps[garment.label, garment.number, 0] & 0xFFFF
            covers.append(_float_coverage(stamp, garment, plan.size))
            areas.append((stamp >= 128).sum() * (garment.length / 56) ** 2)
        shown = set(range(len(covers)))
        while True:
            owner = -1 - _ground(plan)
            for j in sorted(shown):
                owner[covers[j] >= 128] = j
            seen = {j: (owner == j).sum() for j in shown}
            hidden = {j for j in shown if seen[j] < max(MIN_VISIBLE_PIXELS, MIN_VISIBLE_SHARE * areas[j])}
            if not hidden:
                break
            shown -= hidden
        uncertain = np.zeros(plan.size, bool)
        for cover in covers:
            uncertain |= np.abs(cover - 128) < 2.5
        segments = scene.segments.numpy()
        expected_labels = [plan.things[j].label for j in sorted(shown)]
        assert scene.labels.tolist()[: len(shown)] == expected_labels
        for segment, j in enumerate(sorted(shown)):
            np.testing.assert_array_equal((segments == segment)[~uncertain], (owner == j)[~uncertain])
        for segment, label in list(enumerate(scene.labels.tolist()))[len(shown) :]:
            expected = owner == -1 - (label - library.num_classes)
            np.testing.assert_array_equal((segments == segment)[~uncertain], expected[~uncertain])
        void = segments == VOID
        assert (owner[void & ~uncertain] < 0).all()


def _distance_from_tint(pixels, color):
    """How far 99 of 100 of ``(P, 3)`` pixels lie at most from the shades of a color, in gray levels."""
    direction = np.array(color) / np.linalg.norm(color)
    distances = np.abs(pixels - (pixels @ direction)[:, None] * direction)
    return np.quantile(distances, 0.99) if len(pixels) > 0 else 0.0


def test_segments_show_their_own_garment():
    """Deep inside a segment pixels have the tint of that segment's garment, whatever lies beside it."""
    scenes = ComposedScenes("val", length=60)
    checked = 0
    for i, scene in enumerate(scenes):
        garments = scenes.plan(i).things
        pixels = scene.image.permute(1, 2, 0).numpy() * 255
        for segment, label in enumerate(scene.labels.tolist()):
            if label in STUFF_LABELS:
                continue
            inside = ndimage.binary_erosion(scene.segments.numpy() == segment, iterations=5)
            gray = pixels[inside]
            assert any(g.label == label and _distance_from_tint(gray, g.color) < 4 for g in garments)
            checked += len(gray) > 0
    assert checked > 100


def test_scenes_have_occlusion_truncation_and_emptiness():
    occluded = truncated = empty = void = 0
    num_regions = set()
    scenes = ComposedScenes("train", length=300)
    for i, scene in enumerate(scenes):
        segments = scene.segments.numpy()
        void += (segments == VOID).any()
        num_things = sum(label in THING_LABELS for label in scene.labels.tolist())
        empty += num_things == 0
        num_regions.add(len(scenes.plan(i).regions))
        for segment in range(num_things):
            mask = segments == segment
            truncated += mask[[0, -1]].any() or mask[:, [0, -1]].any()
            around = ndimage.binary_dilation(mask) & ~mask
            occluded += (segments[around] < num_things).any()
    assert occluded > 100
    assert truncated > 100
    assert 3 <= empty <= 30
    assert void < 30
    assert num_regions == {1, 2, 3}


def test_collate_pads_images_with_different_numbers_of_segments():
    scenes = list(ComposedScenes("val", length=8))
    counts = [len(scene.labels) for scene in scenes]
    assert len(set(counts)) > 1
    images, targets = collate_scenes(scenes)
    assert images.shape == (8, 3, 128, 128)
    assert targets.counts.tolist() == counts
    assert targets.labels.shape == (8, max(counts))
    masks = targets.dense_masks()
    for b, scene in enumerate(scenes):
        assert torch.equal(images[b], scene.image)
        assert targets.labels[b].tolist() == scene.labels.tolist() + [-1] * (max(counts) - counts[b])
        assert torch.equal(masks[b].sum(0) == 1, targets.valid_pixels()[b])
        assert not masks[b, counts[b] :].any()


def test_loader_workers_give_the_scenes_of_this_process():
    scenes = ComposedScenes("val", length=6, size=(64, 64))
    images, targets = next(iter(DataLoader(scenes, batch_size=6, num_workers=1, collate_fn=collate_scenes)))
    expected_images, expected_targets = collate_scenes(list(scenes))
    assert torch.equal(images, expected_images)
    assert torch.equal(targets.segments, expected_targets.segments)


def test_pickling_leaves_the_pictures_behind():
    scenes = ComposedScenes("val", length=3, seed=5, icons=150)
    dump = pickle.dumps(scenes)
    assert len(dump) < 2000
    assert digest(pickle.loads(dump), range(3)) == digest(scenes, range(3))


def test_draws_are_uniform_and_their_own():
    draws = Draws(1, 0, 7)
    values = np.array([draws.uniform() for _ in range(4000)])
    assert values.min() >= 0
    assert values.max() < 1
    assert abs(values.mean() - 0.5) < 0.02
    assert sorted(Draws(1, 0, 7).permutation(5)) == list(range(5))
    assert len({Draws(seed, split, 0).word() for seed in range(3) for split in range(2)}) == 6


def test_classes_of_icons():
    assert len(ICON_CLASSES) == len(set(ICON_CLASSES)) == 150
    scenes = ComposedScenes("train", length=200, icons=13)
    assert scenes.class_names == (*ICON_CLASSES[:13], "brick", "grass", "gravel")
    assert scenes.stuff_labels == (13, 14, 15)
    assert {label for scene in scenes for label in scene.labels.tolist()} == set(range(16))


def test_classes_have_names_and_distinct_colors():
    assert len(CLASS_NAMES) == len(set(CLASS_NAMES)) == len(PALETTE) == len(set(PALETTE)) == 13
    assert (*THING_LABELS, *STUFF_LABELS) == tuple(range(13))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"split": "test"}, ValueError, "split='test'"),
        ({"split": "train", "length": -1}, ValueError, "length must not be negative, got -1"),
        ({"split": "train", "length": 2.5}, TypeError, "length must be an integer, got 2.5"),
        ({"split": "train", "size": (128, 31)}, ValueError, "at least 32 x 32 pixels, got 128 x 31"),
        ({"split": "train", "size": 128}, ValueError, "size must be"),
        ({"split": "train", "size": (128, 128, 3)}, ValueError, "size must be"),
        ({"split": "train", "seed": -1}, ValueError, "seed must be in 0"),
        ({"split": "train", "seed": 0.5}, TypeError, "seed must be an integer"),
        ({"split": "train", "icons": 151}, ValueError, "icons must be in 0..150, got 151"),
        ({"split": "train", "icons": 2.5}, TypeError, "icons must be an integer, got 2.5"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        ComposedScenes(**arguments)


def test_wrong_index_is_named():
    scenes = ComposedScenes("val", length=4)
    for index in (4, -1):
        with pytest.raises(IndexError, match=f"index {index} is out of range for the 4 scenes of split 'val'"):
            scenes[index]
    with pytest.raises(TypeError, match="index must be an integer"):
        scenes[1.0]
    assert torch.equal(scenes[torch.tensor(2)].segments, scenes[2].segments)


def test_collate_refuses_what_it_cannot_batch():
    with pytest.raises(ValueError, match="scenes is empty"):
        collate_scenes([])
    scenes = [ComposedScenes("val", size=size)[0] for size in ((64, 64), (64, 96))]
    with pytest.raises(ValueError, match="different sizes"):
        collate_scenes(scenes)
