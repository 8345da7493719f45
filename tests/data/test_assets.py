"""The embedded pictures and sounds: their size, their licences, what the splits share, and where they come from."""

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from fastmask.data import ICON_CLASSES
from fastmask.data.composed.library import (
    ASSET_DIRECTORY,
    GARMENTS_PER_CLASS,
    SPRITE_SIZE,
    load_library,
    read_icons,
    read_sprites,
    read_textures,
)
from fastmask.data.composed.prepare_assets import FASHION_MNIST, MIN_DISTANCE, cut_out, prepare

MAX_BYTES = 3_000_000


def test_assets_are_small_and_carry_their_licences():
    files = list(ASSET_DIRECTORY.iterdir())
    assert sum(file.stat().st_size for file in files) < MAX_BYTES
    assert {file.name for file in files} == {
        "LICENSE-fashion-mnist.txt",
        "LICENSE-icons.txt",
        "LICENSE-sounds.txt",
        "LICENSE-textures.txt",
        "README.md",
        "garments-train.png",
        "garments-val.png",
        "icons-train.webp",
        "icons-val.webp",
        "sounds-train.flac",
        "sounds-val.flac",
        "sounds.json",
        "textures-train.png",
        "textures-val.png",
    }
    assert "Zalando" in (ASSET_DIRECTORY / "LICENSE-fashion-mnist.txt").read_text()
    assert "Twemoji" in (ASSET_DIRECTORY / "LICENSE-icons.txt").read_text()
    assert "CC0" in (ASSET_DIRECTORY / "LICENSE-textures.txt").read_text()
    assert "CC0" in (ASSET_DIRECTORY / "LICENSE-sounds.txt").read_text()
    assert "composited real pixels" in (ASSET_DIRECTORY / "README.md").read_text()


def test_no_garment_is_in_both_splits_or_twice_in_one():
    for label in range(10):
        sprites = [
            read_sprites(split)[label].reshape(-1, SPRITE_SIZE**2).astype(np.float64) for split in GARMENTS_PER_CLASS
        ]
        assert [len(of_split) for of_split in sprites] == list(GARMENTS_PER_CLASS.values())
        pixels = np.concatenate(sprites).astype(np.float64)
        squares = (pixels**2).sum(1)
        distances = squares[:, None] + squares[None, :] - 2 * pixels @ pixels.T
        np.fill_diagonal(distances, np.inf)
        assert distances.min() >= SPRITE_SIZE**2 * MIN_DISTANCE**2


def test_no_patch_of_a_texture_is_in_both_splits():
    train, val = (read_textures(split) for split in ("train", "val"))
    for name, ours, theirs in zip(("brick", "grass", "gravel"), train, val, strict=True):
        patches = [
            {patch.tobytes() for patch in np.lib.stride_tricks.sliding_window_view(half, (8, 8)).reshape(-1, 8, 8)}
            for half in (ours, theirs)
        ]
        assert not patches[0] & patches[1], name


@pytest.mark.parametrize("split", GARMENTS_PER_CLASS)
def test_stamps_cover_their_garment_and_nothing_else(split):
    stamps = load_library(split).stamps[:, :, 0]
    coverage = stamps & 0xFFFF
    assert coverage.max() == 255
    assert (stamps >> 16).max() == 255
    border = np.concatenate([coverage[..., [0, -1], :].ravel(), coverage[..., :, [0, -1]].ravel()])
    assert border.max() == 0
    inside = np.pad(read_sprites(split) > 0, ((0, 0), (0, 0), (2, 2), (2, 2)))
    far_outside = ~np.any([np.roll(inside, (i, j), (2, 3)) for i in range(-2, 3) for j in range(-2, 3)], axis=0)
    assert coverage[far_outside.repeat(2, 2).repeat(2, 3)].max() == 0
    core = np.all([np.roll(inside, (i, j), (2, 3)) for i in range(-2, 3) for j in range(-2, 3)], axis=0)
    assert coverage[core.repeat(2, 2).repeat(2, 3)].min() >= 240


@pytest.mark.parametrize("split", GARMENTS_PER_CLASS)
def test_icons_of_every_class_fill_their_sprite_and_differ(split):
    icons = read_icons(split)
    assert icons.shape == (len(ICON_CLASSES), {"train": 4, "val": 1}[split], 56, 56, 4)
    coverage = icons[..., 3]
    shares = (coverage >= 128).mean((2, 3))
    assert shares.min() > 0.08
    rows, columns = (coverage.any(axis).argmax(-1) for axis in (-1, -2))  # before the first that is covered
    assert np.minimum(rows, columns).max() <= 1
    assert len({icon.tobytes() for of_class in icons for icon in of_class}) == icons.shape[0] * icons.shape[1]


def test_icons_stamps_hold_colors_beyond_their_edge():
    icons = read_icons("val")
    stamps = load_library("val", 20).stamps
    assert stamps.shape == (20, 1, 2, 64, 64)
    middle = stamps[:, :, :, 4:-4, 4:-4]
    planes = middle[:, :, 1] >> 16, middle[:, :, 0] >> 16, middle[:, :, 1] & 0xFFFF, middle[:, :, 0] & 0xFFFF
    for plane, channel in zip(planes[:3], range(3), strict=True):
        covered = icons[:20, ..., 3] > 0
        np.testing.assert_array_equal(plane[covered], icons[:20, ..., channel][covered])
    np.testing.assert_array_equal(planes[3], icons[:20, ..., 3])
    beside = ndimage.binary_dilation(icons[5, 0, ..., 3] > 0) & (icons[5, 0, ..., 3] == 0)
    assert (stamps[5, 0, 0, 4:-4, 4:-4][beside] >> 16).min() > 0


def test_cutting_out_fills_dark_parts_but_not_openings():
    picture = np.zeros((28, 28), np.uint8)
    picture[6:26, 4:24] = 200
    picture[10:12, 8:11] = 0
    picture[14:20, 12:18] = 0
    picture[2, 2] = 5
    sprite = cut_out(picture, has_gaps=False)
    assert (sprite[10:12, 8:11] == 1).all()
    assert (sprite[14:20, 12:18] == 0).all()
    assert sprite[2, 2] == 0
    assert (sprite[6:10, 4:24] == 200).all()


@pytest.mark.parametrize("flaw", ["small", "dark", "in two parts", "notched"])
def test_garments_that_cannot_be_cut_out_are_refused(flaw):
    picture = np.zeros((28, 28), np.uint8)
    if flaw == "small":
        picture[10:15, 10:15] = 200
    elif flaw == "dark":
        picture[4:24, 4:24] = 30
    elif flaw == "in two parts":
        picture[2:12, 4:24] = picture[16:26, 4:24] = 200
    else:
        picture[4:24, 4:24] = 200
        picture[5:24:4, 4:10] = 0
    assert cut_out(picture, has_gaps=False) is None


def test_the_script_makes_the_embedded_pictures():
    pytest.importorskip("skimage")
    if not FASHION_MNIST.is_dir():
        pytest.skip("the Debian package dataset-fashion-mnist is not installed")
    for name, pixels in prepare().items():
        with Image.open(ASSET_DIRECTORY / name) as picture:
            np.testing.assert_array_equal(np.asarray(picture), pixels, err_msg=name)
