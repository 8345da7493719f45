"""Which images are predicted, what their results are called, and how pictures of any kind become RGB."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from PIL import Image

from fastmask.data.pictures import decode_picture, picture_size
from fastmask.prediction import find_images


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def named(images, output=None):
    return {file.name: file.path.name for file in find_images(images, output)}


def test_a_folder_at_any_depth(tmp_path):
    touch(tmp_path, "b.jpg", "a.PNG", "deep/er/c.tiff", "notes.txt", ".hidden.png", ".cache/d.png", "v1.2.webp")
    files = find_images(tmp_path)
    assert [file.name for file in files] == ["a", "b", "deep/er/c", "v1.2"]
    assert [file.file_name for file in files] == ["a.PNG", "b.jpg", "deep/er/c.tiff", "v1.2.webp"]
    assert [file.image_id for file in files] == [1, 2, 3, 4]


def test_files_and_folders_in_the_order_given(tmp_path):
    touch(tmp_path, "folder/b.jpg", "folder/a.jpg", "z.photo")
    files = find_images([tmp_path / "z.photo", str(tmp_path / "folder"), tmp_path / "folder" / "b.jpg"])
    assert [file.name for file in files] == ["z", "a", "b"], "each file once; a file given by name may have any suffix"


def test_results_of_an_earlier_run_are_no_images(tmp_path):
    touch(tmp_path, "a.jpg", "out/labels/a.png", "outside/a.jpg")
    assert named(tmp_path, tmp_path / "out") == {"a": "a.jpg", "outside/a": "a.jpg"}
    touch(tmp_path, "outside/labels/a.png", "outside/overlays/a.png")
    assert named(tmp_path / "outside", tmp_path / "outside") == {"a": "a.jpg"}


def test_equal_names_do_not_collide(tmp_path):
    touch(tmp_path, "x/a.jpg", "y/a.jpg", "y/b.jpg")
    assert named([tmp_path / "x" / "a.jpg", tmp_path / "y"]) == {"x/a": "a.jpg", "y/a": "a.jpg", "y/b": "b.jpg"}
    touch(tmp_path, "y/b.png")
    assert named(tmp_path / "y") == {"a.jpg": "a.jpg", "b.jpg": "b.jpg", "b.png": "b.png"}


def test_names_do_not_lead_out_of_the_folder(tmp_path):
    touch(tmp_path, "x/a.jpg", "y/a.jpg")
    roundabout = tmp_path / "x" / ".." / "y" / "a.jpg"
    assert list(named([roundabout, tmp_path / "x" / "a.jpg", tmp_path / "y" / "a.jpg"])) == ["y/a", "x/a"]
    assert list(named([tmp_path / "y" / ".." / "x", roundabout])) == ["x/a", "y/a"]


def test_names_that_are_odd(tmp_path, monkeypatch):
    names = ["Übersicht & Co.jpg", "日本 語.png", "a'b\"c.jpg", "100%.jpg", "-x.jpg", "two..dots.jpg", "ends in .jpg"]
    touch(tmp_path, *names)
    assert sorted(named(tmp_path)) == sorted(os.path.splitext(name)[0] for name in names)
    monkeypatch.chdir(tmp_path)
    assert named(".") == named(tmp_path)
    assert named("-x.jpg") == {"-x": "-x.jpg"}


def test_numbers_as_names_are_the_ids(tmp_path):
    touch(tmp_path, "000000000139.jpg", "000000000285.jpg")
    assert [file.image_id for file in find_images(tmp_path)] == [139, 285]
    touch(tmp_path, "139.png")
    assert [file.image_id for file in find_images(tmp_path)] == [1, 2, 3], "twice the same number"


def test_nothing_to_predict(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no image or folder .*absent"):
        find_images([tmp_path, tmp_path / "absent.jpg"])
    with pytest.raises(FileNotFoundError, match=r"no image in .*; expected files that end with \.jpg"):
        find_images(tmp_path)
    with pytest.raises(FileNotFoundError, match="an empty list"):
        find_images([])


GRAY = np.arange(200, dtype=np.uint8).reshape(10, 20)
COLOR = np.random.default_rng(0).integers(0, 256, (10, 20, 3)).astype(np.uint8)


def decoded(tmp_path, image, name="picture.png", **options):
    image.save(tmp_path / name, **options)
    pixels = decode_picture(tmp_path / name)
    assert pixels.dtype == torch.uint8 and pixels.is_contiguous()
    return pixels.permute(1, 2, 0).numpy()


def test_pictures_of_any_kind(tmp_path):
    gray = np.repeat(GRAY[..., None], 3, 2)
    assert (decoded(tmp_path, Image.fromarray(COLOR)) == COLOR).all()
    assert (decoded(tmp_path, Image.fromarray(GRAY)) == gray).all()
    assert (decoded(tmp_path, Image.fromarray(GRAY > 99)) == np.where(gray > 99, 255, 0)).all()
    palette = Image.fromarray(COLOR // 128 * 255).quantize(8)
    assert (decoded(tmp_path, palette) == COLOR // 128 * 255).all()
    cmyk = Image.fromarray(COLOR).convert("CMYK")
    assert (decoded(tmp_path, cmyk, "cmyk.tiff") == np.asarray(cmyk.convert("RGB"))).all()


def test_sixteen_bits_become_eight(tmp_path):
    wide = GRAY.astype(np.uint16) * 256 + 77
    for name in ("wide.png", "wide.tiff"):
        assert (decoded(tmp_path, Image.fromarray(wide), name) == GRAY[..., None]).all()
    assert (decoded(tmp_path, Image.fromarray(wide.astype(np.int32)), "wide32.tiff") == GRAY[..., None]).all()
    share = Image.fromarray((GRAY / 255).astype(np.float32))
    assert (decoded(tmp_path, share, "share.tiff") == GRAY[..., None]).all()
    for values in (wide.astype(np.int32) * 100, np.full((4, 4), np.nan, np.float32)):
        with pytest.raises(ValueError, match="expected 0"):
            decoded(tmp_path, Image.fromarray(values), "outside.tiff")


def test_transparent_pixels_are_white(tmp_path):
    alpha = np.full((10, 20, 1), 255, np.uint8)
    alpha[:5] = 0
    expected = np.where(alpha == 255, COLOR, 255)
    assert (decoded(tmp_path, Image.fromarray(np.concatenate([COLOR, alpha], 2))) == expected).all()
    gray = Image.fromarray(np.concatenate([GRAY[..., None], alpha], 2), "LA")
    assert (decoded(tmp_path, gray) == np.where(alpha == 255, GRAY[..., None], 255)).all()
    index = Image.fromarray(COLOR // 128 * 255).quantize(8)
    hidden = np.asarray(index)[0, 0].item()
    pixels = decoded(tmp_path, index, transparency=hidden)
    assert (pixels[np.asarray(index) == hidden] == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(tmp_path, orientation):
    """A picture that a camera stored turned is upright, and so is its size."""
    turned = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.transpose(1, 0, 2),
        6: lambda x: np.rot90(x, -1),
        7: lambda x: x.transpose(1, 0, 2)[::-1, ::-1],
        8: lambda x: np.rot90(x),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    for suffix in ("png", "tiff", "webp"):
        path = tmp_path / f"photo.{suffix}"
        Image.fromarray(COLOR).save(path, exif=exif, **({"lossless": True} if suffix == "webp" else {}))
        assert np.array_equal(decode_picture(path).permute(1, 2, 0).numpy(), turned[orientation](COLOR)), suffix
        if suffix != "tiff":
            assert picture_size(path) == turned[orientation](COLOR).shape[:2], suffix


def test_a_picture_with_damaged_exif_is_read_as_it_is_stored(tmp_path):
    for data in (b"Exif\0\0", b"Exif\0\0rubbish", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02"):
        Image.fromarray(COLOR).save(tmp_path / "photo.png", exif=data)
        assert np.array_equal(decode_picture(tmp_path / "photo.png").permute(1, 2, 0).numpy(), COLOR)
        assert picture_size(tmp_path / "photo.png") == COLOR.shape[:2]
