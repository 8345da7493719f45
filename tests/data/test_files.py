"""Files as cameras, editors and file systems leave them: turned pictures, byte order marks, hidden files."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from fastmask.data import check_dataset, open_dataset
from fastmask.data.pictures import decode_picture
from fastmask.files import read_json
from fastmask.prediction import find_images
from tests.data.test_check import edit, faults_of
from tests.helpers import dataset_trees as trees

SIDEWAYS = 6  # EXIF: the first row is the right side
UPRIGHT = trees.SIZES[0]


def turn(path, orientation=SIDEWAYS):
    """Rewrites a picture, upright as it is shown, in the form in which a turned camera stores it."""
    with Image.open(path) as image:
        pixels = np.asarray(image)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.rot90(pixels))
    stored.save(path, exif=exif)
    assert stored.size == (pixels.shape[0], pixels.shape[1])


TREES = {
    "folder": (trees.folder_tree, "train", "images/train/seq0_00000.jpg"),
    "ade20k": (trees.ade20k_tree, "train", "images/training/ADE_train_00000000.jpg"),
    "ade20k-panoptic": (trees.ade20k_panoptic_tree, "val", "images/validation/ADE_val_00000001.jpg"),
    "coco-panoptic": (trees.panoptic_tree, "val", "val2017/000000000139.jpg"),
    "coco-instances": (trees.instance_tree, "train", "train2017/000000000009.jpg"),
    "coco-stuff": (lambda root: trees.stuff_tree(root, "raw"), "train", "train2017/COCO_000000000000.jpg"),
    "cityscapes": (
        trees.cityscapes_tree,
        "train",
        "leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png",
    ),
}


@pytest.mark.parametrize("kind", TREES)
def test_images_are_upright_for_training_as_for_prediction(tmp_path, kind):
    if kind == "coco-instances":
        pytest.importorskip("pycocotools")
    tree, split, name = TREES[kind]
    root = tree(tmp_path)
    before = open_dataset(root, split, kind)[0]
    turn(root / name)
    dataset = open_dataset(root, split, kind)
    sample = dataset[0]
    assert sample.size == before.size
    (file,) = find_images(root / name)
    assert torch.equal(sample.image, decode_picture(file.path))
    assert (sample.image.float() - before.image.float()).abs().mean() < (0.1 if name.endswith("png") else 40)
    for full in (False, True):
        assert faults_of(dataset, full) == []


def test_a_truth_of_the_stored_pixels_is_a_fault_that_names_exif(tmp_path):
    root = trees.folder_tree(tmp_path)
    turn(root / "images/train/seq0_00000.jpg")
    trees.write_labels(root / "annotations/train/seq0_00000.png", trees.blocks([0, 1], UPRIGHT[::-1]))
    for full in (False, True):
        (line,) = faults_of(open_dataset(root, "train"), full)
        assert "20 x 30 pixels, but" in line and "has 30 x 20; EXIF turns this image" in line
    with pytest.raises(ValueError, match="EXIF turns this image"):
        open_dataset(root, "train")[0]


def test_label_maps_are_not_turned(tmp_path):
    root = trees.folder_tree(tmp_path)
    path = root / "annotations/train/seq0_00000.png"
    exif = Image.Exif()
    exif[0x0112] = SIDEWAYS
    with Image.open(path) as image:
        image.load()
    image.save(path, exif=exif)
    for full in (False, True):
        assert faults_of(open_dataset(root, "train"), full) == []
    assert open_dataset(root, "train")[0].labels.tolist() == [0, 1]


def test_turned_pictures_whose_header_does_not_tell_pass_the_quick_check(tmp_path):
    """A TIFF, whose size Pillow may turn itself, and a PNG with its EXIF behind the pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (*UPRIGHT, 3)).astype(np.uint8)
    root = trees.folder_tree(tmp_path)
    for path in (root / "images/train").iterdir():
        path.unlink()
    for name in ("a.tiff", "b.png"):
        Image.fromarray(pixels).save(root / "images/train" / name)
        turn(root / "images/train" / name)
        trees.write_labels(root / f"annotations/train/{name[0]}.png", trees.blocks([0, 1], UPRIGHT))
    for path in (root / "annotations/train").glob("seq*"):
        path.unlink()
    data = (root / "images/train/b.png").read_bytes()
    begin = data.index(b"eXIf") - 4
    end = begin + 12 + int.from_bytes(data[begin : begin + 4], "big")
    last = data.index(b"IEND") - 4
    (root / "images/train/b.png").write_bytes(data[:begin] + data[end:last] + data[begin:end] + data[last:])
    dataset = open_dataset(root, "train")
    assert len(dataset) == 2
    for full in (False, True):
        assert faults_of(dataset, full) == []
    assert all(np.array_equal(sample.image.permute(1, 2, 0), pixels) for sample in dataset)


def test_hidden_files_and_folders_are_no_samples(tmp_path):
    for kind, (tree, split, name) in TREES.items():
        if kind == "coco-instances":
            continue
        root = tree(tmp_path / kind)
        expected = [sample.name for sample in open_dataset(root, split, kind)]
        pictures = [path for path in root.rglob("*") if path.suffix in (".png", ".jpg")]
        for path in pictures:
            for hidden in (path.with_name(f"._{path.name}"), path.parent / ".ipynb_checkpoints" / path.name):
                hidden.parent.mkdir(exist_ok=True)
                hidden.write_bytes(b"no picture")
        dataset = open_dataset(root, split, kind)
        assert [sample.name for sample in dataset] == expected, kind
        assert faults_of(dataset) == []
        assert len(find_images((root / name).parent)) == len([p for p in pictures if p.parent == (root / name).parent])


def test_hidden_label_maps_do_not_make_a_layout(tmp_path):
    trees.stuff_tree(tmp_path, "raw")
    for path in (tmp_path / "stuffthingmaps/train2017").iterdir():
        path.rename(path.with_name(f".{path.name}"))
    with pytest.raises(ValueError, match="has no known layout"):
        open_dataset(tmp_path, "train")


def test_a_data_set_below_a_hidden_folder_is_read(tmp_path):
    assert len(open_dataset(trees.folder_tree(tmp_path / ".cache/data"), "train")) == 2


def test_json_with_a_byte_order_mark_is_read(tmp_path):
    pytest.importorskip("pycocotools")
    for kind in ("folder", "ade20k-panoptic", "coco-panoptic", "coco-instances"):
        tree, split, _ = TREES[kind]
        root = tree(tmp_path / kind)
        (path,) = [*root.glob("*.json"), *root.glob("annotations/*.json")]
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        check_dataset(open_dataset(root, split, kind))
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps({"type": "x"}).encode())
    assert read_json(tmp_path / "config.json") == {"type": "x"}


def two_classes(root, values):
    for split in ("train", "val"):
        trees.write_image(root / f"images/{split}/a.png", UPRIGHT)
        trees.write_labels(root / f"annotations/{split}/a.png", trees.blocks(values, UPRIGHT))
    trees.write_json(root / "classes.json", ["bg", "fg"])
    return open_dataset(root, "train")


def test_the_full_check_says_what_the_truth_holds(tmp_path):
    assert check_dataset(two_classes(tmp_path, [0, 1, 1, 255])) == [
        f"split 'train': {100 * 7 / 30:.1f} % of the pixels are void; every class has pixels"
    ]
    (note,) = check_dataset(two_classes(tmp_path, [0, 0, 255]))
    assert note == (
        "split 'train': 33.3 % of the pixels are void; no pixel of 1 of 2 classes: fg; "
        "only 0 (bg) and void occur, as in masks of 0 and 255; here 255 is void, and the second class is 1"
    )
    (note,) = check_dataset(two_classes(tmp_path, [1, 1, 255]))
    assert note.endswith("no pixel of 1 of 2 classes: bg")
    assert check_dataset(two_classes(tmp_path, [0, 0]))[0].endswith("no pixel of 1 of 2 classes: fg")
    assert check_dataset(two_classes(tmp_path, [0, 0]), full=False) == []


def test_what_each_layout_holds(tmp_path):
    notes = {}
    for kind, (tree, split, _) in TREES.items():
        if kind != "coco-instances":
            notes[kind] = check_dataset(open_dataset(tree(tmp_path / kind), split, kind))[0]
    assert (
        "no pixel of 1 of 3 classes: sky; annotations that draw no pixel and are left out: 1"
        in notes["ade20k-panoptic"]
    )
    assert "every class has pixels" in notes["coco-panoptic"] and "every class has pixels" in notes["folder"]
    assert "no pixel of 146 of 150 classes: building, sky" in notes["ade20k"]
    assert not any("only 0" in note for note in notes.values())
    void = [float(note.partition("': ")[2].partition(" %")[0]) for note in notes.values()]
    assert all(0 < share < 50 for share in void)


def test_classes_without_things_are_said_of_instances(tmp_path):
    root = trees.panoptic_tree(tmp_path)
    path = root / "annotations/panoptic_val2017.json"
    edit(path, lambda c: c["categories"].append({"id": 50, "name": "bird", "isthing": 1}))
    assert check_dataset(open_dataset(root, "val", task="instance")) == [
        "split 'val': no pixel of 1 of 3 classes: bird"
    ]
