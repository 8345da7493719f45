"""The embedded pictures and sounds: their size, their licences, what the splits share, and where they come from."""

import numpy as np
import pytest
from PIL import Image

from fastmask.data.composed.library import (
    ASSET_DIRECTORY,
    GARMENTS_PER_CLASS,
    SPRITE_SIZE,
    load_library,
    read_sprites,
    read_textures,
)
from fastmask.data.composed.prepare_assets import FASHION_MNIST, MIN_DISTANCE, cut_out, prepare

MAX_BYTES = 2_000_000


def test_assets_are_small_and_carry_their_licences():
    files = list(ASSET_DIRECTORY.iterdir())
    assert sum(file.stat().st_size for file in files) < MAX_BYTES
    assert {file.name for file in files} == {
        "LICENSE-fashion-mnist.txt",
        "LICENSE-sounds.txt",
        "LICENSE-textures.txt",
        "README.md",
        "garments-train.png",
        "garments-val.png",
        "sounds-train.flac",
        "sounds-val.flac",
        "sounds.json",
        "textures-train.png",
        "textures-val.png",
    }
    assert "Zalando" in (ASSET_DIRECTORY / "LICENSE-fashion-mnist.txt").read_text()
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
    stamps = load_library(split).stamps
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
