"""Each layout, read from a small tree of exactly its form."""

from __future__ import annotations

import itertools
import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmask.data import check_dataset, collate, open_dataset
from tests.helpers import dataset_trees as trees

VOID = 255


def class_stripes(dataset, index=0):
    """The classes of a sample's upright stripes, from left to right."""
    row = dataset[index].class_map()[0].tolist()
    return [row[0], *(b for a, b in itertools.pairwise(row) if a != b)]


def test_plain_folder(tmp_path):
    root = trees.folder_tree(tmp_path)
    dataset = open_dataset(root, "train")
    info = dataset.info
    assert (info.class_names, info.stuff_classes, info.task) == (("sky", "road", "car"), (0, 1), "semantic")
    assert info.thing_classes == (2,)
    assert len(info.palette) == 3
    assert len(dataset) == 2
    assert class_stripes(dataset, 0) == [0, 1, VOID]
    assert class_stripes(dataset, 1) == [2, 0]
    sample = dataset[1]
    assert sample.name == "seq1_00001"
    assert sample.labels.tolist() == [0, 2]
    assert sample.segments.dtype == torch.int16
    assert torch.equal(sample.image, torch.tensor(trees.write_image(tmp_path / "again.jpg", trees.SIZES[1], 1)))
    check_dataset(dataset)


def test_plain_folder_with_names_alone_deep_labels_and_folders_within(tmp_path):
    trees.write_image(tmp_path / "images/test/town/a.png", (8, 9))
    trees.write_labels(tmp_path / "annotations/test/town/a.png", trees.blocks([0, 299], (8, 9)), np.uint16)
    trees.write_json(tmp_path / "classes.json", {"classes": [f"class {k}" for k in range(300)], "void": [400, 300]})
    dataset = open_dataset(str(tmp_path), "test", kind="folder")
    assert dataset[0].name == "town/a"
    assert dataset[0].labels.tolist() == [0, 299]
    assert dataset.info.ignore_index == 65535  # 255 is a class
    trees.write_json(tmp_path / "classes.json", ["one", "two"])
    dataset = open_dataset(tmp_path, "test")
    assert dataset.info.class_names == ("one", "two")
    with pytest.raises(ValueError, match=r"a.png: label 299 at 32 pixels; expected 0..1, 255"):
        dataset[0]


def test_label_maps_with_palettes_and_of_one_bit_keep_their_values(tmp_path):
    root = trees.folder_tree(tmp_path)
    values = trees.blocks([0, 2], trees.SIZES[0]).astype(np.uint8)
    picture = Image.fromarray(values)
    picture.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    assert picture.mode == "P"
    picture.save(root / "annotations/train/seq0_00000.png")
    Image.fromarray(trees.blocks([0, 1], trees.SIZES[1]).astype(bool)).save(root / "annotations/train/seq1_00001.png")
    dataset = open_dataset(root, "train")
    assert class_stripes(dataset, 0) == [0, 2]
    assert class_stripes(dataset, 1) == [0, 1]


def test_a_check_shows_a_bar_on_a_terminal(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tqdm")
    dataset = open_dataset(trees.ade20k_tree(tmp_path), "train")
    check_dataset(dataset)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    check_dataset(dataset)
    assert "checking train: 100%" in capsys.readouterr().err


def test_ade20k(tmp_path):
    root = trees.ade20k_tree(tmp_path)
    dataset = open_dataset(root, "train")
    assert dataset.info.num_classes == 150
    assert dataset.info.class_names[:3] == ("wall", "building", "sky")
    assert dataset.info.class_names[149] == "flag"
    assert dataset.info.category_ids == tuple(range(1, 151))
    assert class_stripes(dataset, 0) == [VOID, 0, 149, 12]
    assert class_stripes(dataset, 1) == [VOID, 0, 149, 13]
    assert class_stripes(open_dataset(root, "val")) == [2]
    check_dataset(dataset)


def test_ade20k_panoptic(tmp_path):
    root = trees.ade20k_panoptic_tree(trees.ade20k_tree(tmp_path))
    dataset = open_dataset(root, "val", task="panoptic")
    assert dataset.info.class_names == ("wall", "sky", "person")
    assert (dataset.info.stuff_classes, dataset.info.category_ids) == ((0, 1), (0, 2, 12))
    sample = dataset[0]
    assert sample.name == "ADE_val_00000001"
    # Segments by id: 9, 600, 700. The sky, 800, is covered.
    assert sample.labels.tolist() == [0, 2, 2]
    assert sample.segments[0, ::8].tolist() == [1, 2, -1, 0]
    assert dataset[1].labels.tolist() == [0]
    instances = open_dataset(root, "val", task="instance")
    assert instances.info.class_names == ("person",)
    assert instances[0].masks.shape == (2, *trees.SIZES[0])
    assert class_stripes(open_dataset(root, "val", "ade20k-panoptic", "semantic")) == [2, VOID, 0]
    assert open_dataset(root, "train").info.task == "semantic", "without a task the challenge's own"
    assert open_dataset(root, "train", task="semantic").info.num_classes == 150
    with pytest.raises(FileNotFoundError, match=r"split 'train' has no file .*ade20k_panoptic_train.json"):
        open_dataset(root, "train", task="panoptic")
    check_dataset(dataset)


def test_cityscapes(tmp_path):
    root = trees.cityscapes_tree(tmp_path)
    dataset = open_dataset(root, "train")
    assert dataset.info.num_classes == 19
    assert dataset.info.task == "semantic"
    assert dataset[0].name == "aachen/aachen_000000_000019"
    # road, car, (static, caravan: void), person; sky, bicycle, unlabeled, building
    assert class_stripes(dataset, 0) == [0, 13, VOID, 11]
    assert class_stripes(dataset, 1) == [10, 18, VOID, 2]
    panoptic = open_dataset(root, "train", task="panoptic")
    sample = panoptic[0]
    # By instance id: road, a group of persons, two cars.
    assert sample.labels.tolist() == [0, 11, 13, 13]
    assert sample.crowd.tolist() == [False, True, False, False]
    assert sample.segments[0, ::4].tolist() == [0, 2, 3, -1, -1, 1]
    assert panoptic.info.thing_classes == tuple(range(11, 19))
    instances = open_dataset(root, "train", task="instance")
    assert instances.info.class_names[:3] == ("person", "rider", "car")
    assert instances[0].labels.tolist() == [0, 2, 2]
    assert instances[0].crowd.tolist() == [True, False, False]
    assert instances[0].masks.sum((1, 2)).tolist() == [64, 64, 64]
    for each in (dataset, panoptic, instances):
        check_dataset(each)


def test_cityscapes_segments_are_those_of_its_scripts(tmp_path):
    """The scripts' own conversion, read as COCO panoptic, gives the same segments."""
    scripts = pytest.importorskip("cityscapesscripts.preparation.createPanopticImgs")
    root = trees.cityscapes_tree(tmp_path)
    scripts.convert2panoptic(str(root / "gtFine"), str(root / "gtFine"), useTrainId=True, setNames=["train"])
    ours = open_dataset(root, "train", task="panoptic")
    content = json.loads((root / "gtFine/cityscapes_panoptic_train_trainId.json").read_text())
    for annotation in content["annotations"]:
        sample = next(sample for sample in ours if sample.name.endswith(annotation["image_id"]))
        with Image.open(root / "gtFine/cityscapes_panoptic_train_trainId" / annotation["file_name"]) as picture:
            ids = torch.from_numpy(np.array(picture).astype(int) @ [1, 256, 65536])
        assert len(annotation["segments_info"]) == len(sample.labels)
        assert torch.equal(ids == 0, sample.segments == -1)
        for segment in annotation["segments_info"]:
            (m,) = sample.segments[ids == segment["id"]].unique().tolist()
            assert sample.labels[m] == segment["category_id"]
            assert sample.crowd[m] == segment["iscrowd"] if sample.crowd is not None else not segment["iscrowd"]
            assert (sample.segments == m).sum() == segment["area"]


def test_two_images_of_one_name_are_refused(tmp_path):
    root = trees.folder_tree(tmp_path)
    trees.write_image(root / "images/train/seq0_00000.png", trees.SIZES[0])
    with pytest.raises(ValueError, match=r"seq0_00000.jpg and .*seq0_00000.png have the same name"):
        open_dataset(root, "train")


def test_cityscapes_classes_are_those_of_its_scripts():
    labels = pytest.importorskip("cityscapesscripts.helpers.labels").labels
    from fastmask.data.cityscapes import INFO, _class_of_label_id

    known = sorted((label for label in labels if 0 <= label.trainId < 19), key=lambda label: label.trainId)
    assert INFO.class_names == tuple(label.name for label in known)
    assert INFO.palette == tuple(label.color for label in known)
    assert INFO.thing_classes == tuple(label.trainId for label in known if label.hasInstances)
    table = _class_of_label_id()
    assert all(table[label.id] == (label.trainId if label.trainId < 19 else -1) for label in labels if label.id >= 0)


def test_coco_panoptic(tmp_path):
    root = trees.panoptic_tree(tmp_path)
    dataset = open_dataset(root, "val")
    assert dataset.info.class_names == ("person", "car", "rug")
    assert dataset.info.category_ids == (1, 3, 200)
    assert dataset.info.stuff_classes == (2,)
    assert dataset.info.task == "panoptic"
    sample = dataset[0]
    assert sample.name == "000000000139"
    # Segments by id: 5 (crowd), 300, 70000, 16000000.
    assert sample.labels.tolist() == [0, 1, 1, 2]
    assert sample.crowd.tolist() == [True, False, False, False]
    assert sample.segments[0, ::6].tolist() == [2, 1, -1, 0, 3]
    assert dataset[1].labels.tolist() == [2]
    assert dataset[1].crowd is None
    semantic = open_dataset(root, "val", task="semantic")
    assert class_stripes(semantic) == [1, VOID, 0, 2]
    assert semantic[0].labels.tolist() == [0, 1, 2]
    assert semantic[0].crowd is None
    instances = open_dataset(root, "val", task="instance")
    assert instances.info.class_names == ("person", "car")
    assert instances[0].labels.tolist() == [0, 1, 1]
    assert instances[0].masks[2, 0].nonzero().flatten().tolist() == list(range(6))
    assert instances[1].masks.shape == (0, *trees.SIZES[1])
    check_dataset(dataset)


def test_coco_panoptic_with_everything_in_the_root(tmp_path):
    root = trees.panoptic_tree(tmp_path)
    for name in ("panoptic_val2017.json", "panoptic_val2017"):
        (root / "annotations" / name).rename(root / name)
    (root / "images").mkdir()
    (root / "val2017").rename(root / "images/val2017")
    check_dataset(open_dataset(root, "val"))


def test_coco_instances(tmp_path):
    pytest.importorskip("pycocotools")
    from skimage.draw import polygon2mask

    dataset = open_dataset(trees.instance_tree(tmp_path), "train")
    assert dataset.info.class_names == ("person", "car")
    assert dataset.info.category_ids == (1, 3)
    assert dataset.info.task == "instance"
    sample = dataset[0]
    assert sample.labels.tolist() == [1, 0, 0, 1]
    assert sample.crowd.tolist() == [False, False, True, False]
    assert sample.areas.tolist()[:3] == [70, 90, 36]
    square = np.zeros(trees.SIZES[0], bool)
    square[3:10, 2:12] = True
    assert np.array_equal(sample.masks[0].numpy(), square)
    both = square | polygon2mask(trees.SIZES[0], [(1, 15), (1, 20), (9, 20)])
    assert (sample.masks[1].numpy() != both).sum() <= 12  # rules differ at the rim
    columns = np.zeros(trees.SIZES[0], bool)
    columns[2:, 4:6] = True
    assert np.array_equal(sample.masks[2].numpy(), columns)
    disc = np.hypot(*(np.indices(trees.SIZES[0]) - np.array([[[8]], [[20]]]))) < 6
    assert np.array_equal(sample.masks[3].numpy(), disc)
    assert dataset[1].masks.shape == (0, *trees.SIZES[1])
    check_dataset(dataset)
    _, targets = collate([dataset[0], dataset[1]])
    assert targets.counts.tolist() == [3, 0]


def test_coco_instances_without_hotcoco_say_so(tmp_path, monkeypatch):
    root = trees.instance_tree(tmp_path)
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    with pytest.raises(ImportError, match=r"pip install 'fastmask-kernels\[coco\]'"):
        open_dataset(root, "train")


@pytest.mark.parametrize("form", ["raw", "raw-annotations", "train-ids", "10k", "10k-detectron2"])
def test_coco_stuff(tmp_path, form):
    dataset = open_dataset(trees.stuff_tree(tmp_path, form), "train")
    assert dataset.info.num_classes == 171
    assert dataset.info.class_names[0] == "person"
    assert dataset.info.class_names[170] == "wood"
    assert len(dataset.info.thing_classes) == 80
    assert dataset.info.class_names[79] == "toothbrush"
    assert dataset.info.category_ids[170] == 182
    assert class_stripes(dataset) == [0, 170, 10, VOID]
    check_dataset(dataset)


def test_coco_stuff_has_no_unused_ids(tmp_path):
    root = trees.stuff_tree(tmp_path, "raw")
    trees.write_labels(next((root / "stuffthingmaps/train2017").iterdir()), trees.blocks([11], trees.SIZES[0]))
    with pytest.raises(ValueError, match="label 11 at 600 pixels"):
        check_dataset(open_dataset(root, "train"))


def test_the_task_decides_where_coco_has_several_layouts(tmp_path):
    pytest.importorskip("pycocotools")
    root = trees.stuff_tree(trees.instance_tree(trees.panoptic_tree(tmp_path)), "raw")
    (root / "annotations/instances_train2017.json").rename(root / "annotations/instances_val2017.json")
    (root / "stuffthingmaps/train2017").rename(root / "stuffthingmaps/val2017")
    assert open_dataset(root, "val").info.task == "panoptic"
    assert open_dataset(root, "val", task="instance").info.class_names == ("person", "car")
    assert open_dataset(root, "val", task="instance", kind="coco-panoptic").info.task == "instance"
    assert open_dataset(root, "val", task="semantic").info.num_classes == 171


TREES = {
    "folder": trees.folder_tree,
    "ade20k": trees.ade20k_tree,
    "cityscapes": trees.cityscapes_tree,
    "ade20k-panoptic": trees.ade20k_panoptic_tree,
    "coco-panoptic": trees.panoptic_tree,
    "coco-stuff": lambda root: trees.stuff_tree(root, "10k"),
}


@pytest.mark.parametrize("kind", TREES)
def test_data_sets_pickle_name_their_samples_and_batch(tmp_path, kind):
    split = "val" if kind.endswith("panoptic") else "train"
    dataset = open_dataset(TREES[kind](tmp_path), split)
    copy = pickle.loads(pickle.dumps(dataset))
    names = [sample.name for sample in copy]
    assert len(set(names)) == len(dataset) == 2
    assert torch.equal(copy[-1].segments, dataset[1].segments)
    with pytest.raises(IndexError):
        dataset[2]
    images, targets = collate([dataset[0], dataset[1]])
    assert targets.class_map().shape[1:] == targets.size
    for b in range(2):
        height, width = dataset[b].size
        expected = dataset[b].class_map()
        if dataset[b].crowd is not None:
            expected = expected.masked_fill((dataset[b].segments == dataset[b].crowd.nonzero()[0]), VOID)
        assert torch.equal(targets.class_map()[b, :height, :width], expected)
        assert torch.equal(images[b], dataset[b].image / 255)


def test_wrong_paths_kinds_splits_and_tasks_are_named(tmp_path):
    root = trees.folder_tree(tmp_path / "set")
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        open_dataset(tmp_path / "nowhere", "train")
    with pytest.raises(ValueError, match=r"has no known layout; expected one of folder \(classes.json\); cityscapes"):
        open_dataset(tmp_path, "train")
    with pytest.raises(FileNotFoundError, match=f"split 'val' has no folder .*{Path('images/val')}"):
        open_dataset(root, "val")
    with pytest.raises(ValueError, match="kind='voc' is unknown"):
        open_dataset(root, "train", kind="voc")
    with pytest.raises(ValueError, match="task='depth' is unknown"):
        open_dataset(root, "train", task="depth")
    with pytest.raises(ValueError, match="task='panoptic': a plain folder has truth for semantic"):
        open_dataset(root, "train", task="panoptic")
    with pytest.raises(FileNotFoundError, match=r"split 'train' has no file .*instances_train2017.json"):
        open_dataset(root, "train", kind="coco-instances")
    for folder in ("images", "annotations"):
        (root / folder / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="nothing in split 'empty'"):
        open_dataset(root, "empty")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a JSON file"),
        ("[]", "expected a list of class names"),
        ('{"names": ["a"]}', "expected a list of class names"),
        ('{"classes": ["a", "b"], "void": 1}', '"void" is \\[1\\]'),
        ('{"classes": ["a"], "stuff": ["b"]}', '"stuff" is'),
        ('{"classes": ["a"], "palette": [[1, 2]]}', "classes.json"),
        ('{"classes": ["a"], "palette": [[1, 2, 3], [4, 5, 6]]}', "palette has 2 entries; expected 1"),
        ('{"classes": ["a"], "color": []}', "unknown key 'color'"),
    ],
)
def test_wrong_classes_are_named(tmp_path, content, message):
    root = trees.folder_tree(tmp_path)
    (root / "classes.json").write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        open_dataset(root, "train")
    assert "classes.json" in str(caught.value)
