"""Broken files are found before training starts: every one, by name, in one error."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from fastmask.data import Augmented, check_dataset, open_dataset, semantic_augmentation
from fastmask.data.coco_instances import draw, segmentation_fault
from tests.helpers import dataset_trees as trees

SIZE = (20, 30)


def faults_of(dataset, full=True):
    """What the check complains about, a line each."""
    try:
        check_dataset(dataset, full=full)
    except ValueError as error:
        first, *lines = str(error).splitlines()
        assert first.startswith(f"{len(lines)} fault")
        return [line.strip() for line in lines]
    return []


@pytest.fixture
def broken_folder(tmp_path):
    """A plain folder with one fault of each kind between sound files."""
    for name in ("cut", "empty", "label", "mode", "noise", "ok", "orphan", "palette", "size", "torn"):
        trees.write_image(tmp_path / f"images/train/{name}.png", SIZE)
        trees.write_labels(tmp_path / f"annotations/train/{name}.png", trees.blocks([0, 1, 255], SIZE))
    images, labels = tmp_path / "images/train", tmp_path / "annotations/train"
    (images / "cut.png").write_bytes((images / "cut.png").read_bytes()[:900])
    (images / "empty.png").write_bytes(b"")
    trees.write_labels(labels / "label.png", trees.blocks([0, 2, 7], SIZE))
    trees.write_image(labels / "mode.png", SIZE)
    (images / "noise.png").write_bytes(bytes(range(256)) * 3)
    (labels / "orphan.png").rename(labels / "alone.png")
    trees.write_labels(labels / "size.png", trees.blocks([0, 1], (20, 31)))
    (labels / "torn.png").write_bytes((labels / "torn.png").read_bytes()[:60])
    trees.write_json(tmp_path / "classes.json", ["one", "two"])
    return tmp_path


EXPECTED = {
    "images/train/orphan.png": "no label map for this image",
    "annotations/train/alone.png": "no image for this label map",
    "images/train/cut.png": "truncated",
    "images/train/empty.png": "cannot identify image file",
    "images/train/noise.png": "cannot identify image file",
    "annotations/train/label.png": "label 2, 7 at 400 pixels; expected 0..1, 255",
    "annotations/train/mode.png": "a label map of mode RGB; expected one channel of integers",
    "images/train/size.png": "20 x 30 pixels, but",
    "annotations/train/torn.png": "",
}
ONLY_DECODED = {
    "images/train/cut.png",
    "annotations/train/label.png",
    "annotations/train/mode.png",
    "annotations/train/torn.png",
}


@pytest.mark.parametrize("full", [True, False])
def test_every_broken_file_is_named_at_once(broken_folder, full):
    lines = faults_of(open_dataset(broken_folder, "train"), full)
    expected = {name: said for name, said in EXPECTED.items() if full or name not in ONLY_DECODED}
    for name, said in expected.items():
        (line,) = [line for line in lines if line.startswith(f"{broken_folder / name}: ")]
        assert said in line
    assert len(lines) == len(expected)


def test_a_broken_sample_says_so_when_it_is_read(broken_folder):
    dataset = open_dataset(broken_folder, "train")
    by_name = {entry.name: i for i, entry in enumerate(dataset.entries)}
    assert dataset[by_name["ok"]].labels.tolist() == [0, 1]
    for name in ("cut", "label", "mode", "size"):
        with pytest.raises(ValueError, match=f"{name}.png: "):
            dataset[by_name[name]]


def test_a_truncated_jpeg_is_found(tmp_path):
    root = trees.ade20k_tree(tmp_path)
    path = root / "images/training/ADE_train_00000001.jpg"
    path.write_bytes(path.read_bytes()[:-300])
    assert faults_of(open_dataset(root, "train"), full=False) == []
    (line,) = faults_of(open_dataset(root, "train"))
    assert "ADE_train_00000001.jpg: " in line
    assert "truncated" in line


def test_ade20k_labels_beyond_150_are_found(tmp_path):
    root = trees.ade20k_tree(tmp_path)
    trees.write_labels(root / "annotations/training/ADE_train_00000000.png", trees.blocks([1, 151], SIZE))
    (line,) = faults_of(open_dataset(root, "train"))
    assert line.endswith("ADE_train_00000000.png: label 151 at 300 pixels; expected 0..150")


def test_cityscapes_ids_of_no_class_are_found(tmp_path):
    root = trees.cityscapes_tree(tmp_path)
    stem = root / "gtFine/train/aachen/aachen_000000_000019_gtFine_"
    trees.write_labels(stem.with_name(stem.name + "labelIds.png"), trees.blocks([7, 34], (16, 24)))
    trees.write_labels(stem.with_name(stem.name + "instanceIds.png"), trees.blocks([7, 35001], (16, 24)), np.uint16)
    assert "label 34 at 192 pixels; expected 0..33, 255" in faults_of(open_dataset(root, "train"))[0]
    assert "instance id 35001 is of no class" in faults_of(open_dataset(root, "train", task="panoptic"))[0]


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c["annotations"][1]["segments_info"].append({"id": 70000, "category_id": 1}), "is listed twice"),
        (lambda c: c["annotations"][1]["segments_info"][0].update(category_id=2), "segment 300 .* unknown category 2"),
        (lambda c: c["annotations"][1]["segments_info"][0].update(id=0), '"id" is 0; expected 1..16777215'),
        (lambda c: c["annotations"][1]["segments_info"].append({"id": 9}), 'segment 9 .*: no "category_id"'),
        (lambda c: c["images"][0].update(height=21), "20 x 30 pixels, but the JSON says 21 x 30"),
        (
            lambda c: c["images"].append({**c["images"][0], "id": 8, "file_name": "8.jpg"}),
            "image 8 .* has no annotation",
        ),
        (
            lambda c: c["annotations"].append({**c["annotations"][0], "image_id": 8}),
            "an annotation belongs to image 8, which is not",
        ),
        (lambda c: c["annotations"][1].update(file_name="none.png"), "none.png: missing"),
    ],
)
def test_panoptic_annotations_that_do_not_fit_are_found(tmp_path, change, said, full):
    root = trees.panoptic_tree(tmp_path)
    edit(root / "annotations/panoptic_val2017.json", change)
    (line,) = faults_of(open_dataset(root, "val"), full)
    assert re.search(said, line)


def test_panoptic_ids_without_their_segment_are_found(tmp_path):
    root = trees.panoptic_tree(tmp_path)
    path = root / "annotations/panoptic_val2017.json"
    edit(path, lambda c: c["annotations"][1]["segments_info"].pop(0))
    (line,) = faults_of(open_dataset(root, "val"))
    assert line.endswith("000000000139.png: id 300 at 120 pixels is not in segments_info")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a: a.update(category_id=2), "unknown category 2"),
        (lambda a: a.pop("segmentation"), "no segmentation; expected polygons"),
        (lambda a: a.update(segmentation=[]), "no polygon"),
        (lambda a: a.update(segmentation=[[1, 2, 3, 4]]), "at least three points"),
        (lambda a: a.update(segmentation=[[1, 2, 3, 4, 5, "6"]]), "something other than finite numbers"),
        (lambda a: a.update(segmentation={"size": [20, 31], "counts": [620]}), "run lengths of size"),
        (lambda a: a.update(segmentation={"size": [20, 30], "counts": [590, 9]}), "do not add up to 20 x 30"),
        (lambda a: a.update(segmentation={"size": [20, 30], "counts": 5}), "counts are of type int"),
        (lambda a: a.update(image_id=77), "belongs to image 77"),
    ],
)
def test_instance_annotations_that_do_not_fit_are_found(tmp_path, change, said):
    pytest.importorskip("pycocotools")
    root = trees.instance_tree(tmp_path)
    edit(root / "annotations/instances_train2017.json", lambda c: change(c["annotations"][1]))
    for full in (False, True):
        (line,) = faults_of(open_dataset(root, "train"), full)
        assert said in line
        assert "annotation 2 " in line


@pytest.mark.parametrize("counts", ["04", "ppppppppppp0", "o" * 40, "", "P", "\x7f0"])
def test_strings_of_run_lengths_that_do_not_fit_are_found(tmp_path, counts):
    pytest.importorskip("pycocotools")
    root = trees.instance_tree(tmp_path)
    segmentation = {"size": [20, 30], "counts": counts}
    edit(
        root / "annotations/instances_train2017.json",
        lambda c: c["annotations"][3].update(segmentation=segmentation),
    )
    for full in (False, True):
        (line,) = faults_of(open_dataset(root, "train"), full)
        assert "annotation 4 of 000000000009.jpg: run lengths that do not add up to 20 x 30 pixels" in line


def test_strings_of_run_lengths_are_read_as_pycocotools_writes_them():
    coder = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for density in (0, 0.001, 0.03, 0.5, 0.999, 1):
        mask = rng.random((240, 333)) < density
        encoded = coder.encode(np.asfortranarray(mask.astype(np.uint8)))
        segmentation = {"size": [240, 333], "counts": encoded["counts"].decode()}
        assert segmentation_fault(segmentation, (240, 333)) is None
        assert np.array_equal(draw(segmentation, (240, 333)), mask)


@pytest.mark.parametrize("layout", ["panoptic", "instances"])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not a JSON file"),
        ("[]", 'no list "images"'),
        ('{"images": [], "annotations": []}', 'no list "categories"'),
        ('{"images": [], "annotations": [], "categories": []}', '"categories" is empty'),
        ("\udc80", "is not a JSON file"),
    ],
)
def test_unreadable_json_is_named(tmp_path, layout, text, said):
    pytest.importorskip("pycocotools")
    tree, split = {"panoptic": (trees.panoptic_tree, "val"), "instances": (trees.instance_tree, "train")}[layout]
    path = next((tree(tmp_path) / "annotations").glob("*.json"))
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=said) as caught:
        open_dataset(tmp_path, split)
    assert path.name in str(caught.value)


def test_a_missing_image_of_coco_is_found(tmp_path):
    root = trees.panoptic_tree(tmp_path)
    (root / "val2017/000000000140.jpg").unlink()
    for full in (False, True):
        assert faults_of(open_dataset(root, "val"), full) == [f"{root / 'val2017/000000000140.jpg'}: missing"]


def test_the_check_looks_behind_an_augmentation(broken_folder):
    dataset = open_dataset(broken_folder, "train")
    assert faults_of(Augmented(dataset, semantic_augmentation())) == faults_of(dataset)


def test_sound_data_passes_and_an_image_all_void_is_sound(tmp_path):
    root = trees.folder_tree(tmp_path)
    trees.write_labels(root / "annotations/train/seq0_00000.png", trees.blocks([11], trees.SIZES[0]))
    dataset = open_dataset(root, "train")
    assert faults_of(dataset) == []
    assert dataset[0].labels.shape == (0,)
    assert torch.equal(dataset[0].segments, torch.full(trees.SIZES[0], -1, dtype=torch.int16))


def test_a_picture_too_large_to_be_one_is_found(tmp_path, monkeypatch):
    root = trees.folder_tree(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    lines = faults_of(open_dataset(root, "train"))
    assert any("decompression bomb" in line for line in lines)
