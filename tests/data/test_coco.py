"""COCO's JSON: every broken field is a line of its own, and what draws nothing is no target."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

from fastmask.data import check_dataset, open_dataset
from fastmask.metrics import InstanceMetrics
from tests.data.test_check import edit, faults_of
from tests.helpers import dataset_trees as trees

pytest.importorskip("pycocotools")
OUTSIDE = [[100.0, 100.0, 120.0, 100.0, 120.0, 110.0]]
SUB_PIXEL = [[3.1, 3.1, 3.2, 3.1, 3.2, 3.2]]


def changed(root, change, kind="instances_train2017"):
    edit(root / f"annotations/{kind}.json", change)
    return open_dataset(root, "train" if kind.startswith("instances") else "val")


NO_INTEGER, NO_FLAG, NO_AREA = "expected an integer", "expected 0 or 1", "expected a number, 0 or more"
BROKEN = [
    ("area", None, f'"area" is null; {NO_AREA}'),
    ("area", "12", f'"area" is "12"; {NO_AREA}'),
    ("area", -1, f'"area" is -1; {NO_AREA}'),
    ("area", float("nan"), f'"area" is NaN; {NO_AREA}'),
    ("area", 10**400, '"area" is 1000'),
    ("area", True, f'"area" is true; {NO_AREA}'),
    ("iscrowd", None, f'"iscrowd" is null; {NO_FLAG}'),
    ("iscrowd", "0", f'"iscrowd" is "0"; {NO_FLAG}'),
    ("iscrowd", [], f'"iscrowd" is []; {NO_FLAG}'),
    ("category_id", None, f'"category_id" is null; {NO_INTEGER}'),
    ("category_id", "3", f'"category_id" is "3"; {NO_INTEGER}'),
    ("category_id", [3], f'"category_id" is [3]; {NO_INTEGER}'),
    ("category_id", {}, f'"category_id" is {{}}; {NO_INTEGER}'),
    ("segmentation", None, "no segmentation; expected polygons, or an object of size and counts; got null"),
    ("segmentation", [None], "a list of x, y of at least three points"),
    ("segmentation", [[1, 2, 3, 4, 5, True]], "something other than finite numbers"),
    ("segmentation", [[1, 2, 3, 4, 5, 10**400]], "something other than finite numbers"),
    ("segmentation", [[1, 2, 3, 4, 5, 1e9]], "something other than finite numbers"),
    ("segmentation", {"size": None, "counts": [600]}, "run lengths of size null; the image has [20, 30]"),
    ("segmentation", {"size": 20, "counts": [600]}, "run lengths of size 20"),
    ("segmentation", {"size": [20, 30], "counts": [600.0]}, "do not add up to 20 x 30"),
    ("segmentation", {"size": [20, 30], "counts": None}, "counts are of type NoneType"),
]


@pytest.mark.parametrize("full", [True, False])
def test_each_broken_field_of_an_annotation_is_a_line(tmp_path, full):
    def change(content):
        square = content["annotations"][0]
        content["annotations"] = [{**square, "id": k, key: value} for k, (key, value, _) in enumerate(BROKEN)]

    root = trees.instance_tree(tmp_path)
    lines = faults_of(changed(root, change), full)
    path = root / "annotations/instances_train2017.json"
    assert len(lines) == len(BROKEN)
    for k, (line, (_, _, said)) in enumerate(zip(lines, BROKEN, strict=True)):
        assert line.startswith(f"{path}: annotation {k} of 000000000009.jpg: ")
        assert said in line


def test_broken_fields_do_not_hide_each_other(tmp_path):
    def change(content):
        square, other = content["annotations"][:2]
        square.update(area=None, iscrowd=2, category_id=77)
        other.pop("id")
        other["area"] = "12"
        content["annotations"] += [None, {**square, "image_id": [9]}, {"id": "x", "image_id": 10, "category_id": 3}]
        content["images"] += [{"id": 11, "file_name": "", "height": 0, "width": None}, 5]
        content["images"].append({**content["images"][0], "id": {}})

    root = trees.instance_tree(tmp_path)
    (root / "train2017/000000000010.jpg").write_bytes(b"")
    path = root / "annotations/instances_train2017.json"
    said = [line.removeprefix(f"{path}: ") for line in faults_of(changed(root, change), full=False)]
    assert sorted(said) == sorted(
        [
            'annotation 1 of 000000000009.jpg: "area" is null; expected a number, 0 or more',
            'annotation 1 of 000000000009.jpg: "iscrowd" is 2; expected 0 or 1',
            "annotation 1 of 000000000009.jpg: unknown category 77",
            '"annotations"[1] of 000000000009.jpg: no "id"',
            '"annotations"[1] of 000000000009.jpg: "area" is "12"; expected a number, 0 or more',
            '"annotations"[4]: null; expected an object',
            'annotation 1: "image_id" is [9]; expected an integer or a string',
            'annotation 1: "area" is null; expected a number, 0 or more',
            'annotation 1: "iscrowd" is 2; expected 0 or 1',
            "annotation x of 000000000010.jpg: no segmentation; "
            "expected polygons, or an object of size and counts; got null",
            'image 11: "file_name" is ""; expected the name of a file',
            'image 11: "height" is 0; expected pixels, 1 or more',
            'image 11: "width" is null; expected pixels, 1 or more',
            '"images"[3]: 5; expected an object',
            '"images"[4]: "id" is {}; expected an integer or a string',
            next(line for line in said if line.startswith(str(root / "train2017/000000000010.jpg"))),
        ]
    )


def test_a_sample_with_broken_fields_says_so_when_it_is_read(tmp_path):
    dataset = changed(trees.instance_tree(tmp_path), lambda c: c["annotations"][1].update(area=None))
    with pytest.raises(ValueError, match='annotation 2 of 000000000009.jpg: "area" is null'):
        dataset[0]
    assert len(dataset[1].labels) == 0


@pytest.mark.parametrize("full", [True, False])
def test_each_broken_field_of_panoptic_truth_is_a_line(tmp_path, full):
    def change(content):
        content["annotations"][1]["segments_info"] += [
            {"id": 1, "category_id": None, "iscrowd": "no"},
            {"id": "2", "category_id": [3]},
            None,
        ]
        content["annotations"][0]["segments_info"] = None
        content["annotations"].append({"image_id": None, "file_name": 3, "segments_info": []})

    root = trees.panoptic_tree(tmp_path)
    path = root / "annotations/panoptic_val2017.json"
    lines = faults_of(changed(root, change, "panoptic_val2017"), full)
    assert sorted(line.removeprefix(f"{path}: ") for line in lines) == sorted(
        [
            'segment 1 of 000000000139.png: "category_id" is null; expected an integer',
            'segment 1 of 000000000139.png: "iscrowd" is "no"; expected 0 or 1',
            'segment 2 of 000000000139.png: "id" is "2"; expected 1..16777215',
            'segment 2 of 000000000139.png: "category_id" is [3]; expected an integer',
            '"segments_info"[6] of 000000000139.png: null; expected an object',
            'annotation of image 140: "segments_info" is null; expected a list',
            '"annotations"[2]: "image_id" is null; expected an integer or a string',
            '"annotations"[2]: "file_name" is 3; expected the name of a file',
        ]
    )


CATEGORIES = [
    (lambda c: c.append({**c[0], "name": "again"}), r"2 categories have the id 3: car, again"),
    (lambda c: c[0].update(id="3"), 'category 3: "id" is "3"; expected an integer'),
    (lambda c: c[0].update(id=[3]), r'"categories"\[0\]: "id" is \[3\]; expected an integer'),
    (lambda c: c[0].update(name=None), 'category 3: "name" is null; expected a string'),
    (lambda c: c.append(None), r'"categories"\[2\]: null; expected an object'),
    (lambda c: c.clear(), '"categories" is empty'),
]


@pytest.mark.parametrize(("change", "said"), CATEGORIES)
def test_broken_categories_are_named_with_the_file(tmp_path, change, said):
    with pytest.raises(ValueError, match=rf"instances_train2017.json: {said}"):
        changed(trees.instance_tree(tmp_path), lambda content: change(content["categories"]))


def test_panoptic_categories_say_what_is_stuff(tmp_path):
    with pytest.raises(ValueError, match='category 200: "isthing" is null; expected 0 or 1'):
        changed(trees.panoptic_tree(tmp_path), lambda c: c["categories"][0].update(isthing=None), "panoptic_val2017")


@pytest.mark.parametrize("layout", ["instances_train2017", "panoptic_val2017"])
def test_images_that_share_an_id_or_a_file_are_named(tmp_path, layout):
    tree = trees.instance_tree if layout.startswith("instances") else trees.panoptic_tree
    root = tree(tmp_path)
    path = root / f"annotations/{layout}.json"
    first, second = json.loads(path.read_text())["images"]
    dataset = changed(root, lambda c: c["images"][1].update(id=first["id"]), layout)
    assert len(dataset) == 0, "nobody can tell whose masks the annotations draw"
    lines = faults_of(dataset, full=False)
    names = f"{first['file_name']}, {second['file_name']}"
    assert f"{path}: 2 images have the id {first['id']}: {names}" in lines
    edit(path, lambda c: c["images"][1].update(id=second["id"], file_name=f"./{first['file_name']}"))
    lines = faults_of(changed(root, lambda c: None, layout), full=False)
    assert lines == [f"{path}: 2 images are of the file {first['file_name']}: {first['id']}, {second['id']}"]


def test_two_panoptic_annotations_of_one_image_are_named(tmp_path):
    dataset = changed(
        trees.panoptic_tree(tmp_path), lambda c: c["annotations"].append(c["annotations"][1]), "panoptic_val2017"
    )
    (line,) = faults_of(dataset)
    assert line.endswith('image 139 ("000000000139.jpg") has 2 annotations; expected one')
    assert [sample.name for sample in dataset] == ["000000000140"]


@pytest.mark.parametrize("segmentation", [OUTSIDE, SUB_PIXEL, {"size": [20, 30], "counts": [600]}])
def test_an_annotation_without_a_pixel_is_no_target(tmp_path, segmentation):
    root = trees.instance_tree(tmp_path)
    whole = open_dataset(root, "train")[0]
    dataset = changed(root, lambda c: c["annotations"][1].update(segmentation=segmentation))
    sample, kept = dataset[0], [0, 2, 3]
    for name in ("labels", "masks", "crowd", "areas"):
        assert torch.equal(getattr(sample, name), getattr(whole, name)[kept]), name
    assert faults_of(dataset) == []
    (note,) = check_dataset(dataset)
    assert note == "split 'train': every class has pixels; annotations that draw no pixel and are left out: 1"


@pytest.mark.parametrize("task", ["panoptic", "semantic", "instance"])
def test_a_panoptic_segment_without_a_pixel_is_no_target(tmp_path, task):
    root = trees.panoptic_tree(tmp_path)
    whole = open_dataset(root, "val", task=task)[0]
    path = root / "annotations/panoptic_val2017.json"
    edit(path, lambda c: c["annotations"][1]["segments_info"].append({"id": 301, "category_id": 1}))
    dataset = open_dataset(root, "val", task=task)
    for ours, theirs in zip(dataset[0], whole, strict=True):
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
    (note,) = check_dataset(dataset)
    assert "annotations that draw no pixel and are left out: 1" in note


def test_invalid_polygons_are_skipped_on_request_and_counted(tmp_path):
    def change(content):
        square = content["annotations"][0]
        content["annotations"][1]["segmentation"].append([1, 2, 3, 4])
        content["annotations"] += [
            {**square, "id": 5, "segmentation": [[1, 2, 3, 4], [1, 2, 3, 4, 5, "6"]]},
            {**square, "id": 6, "segmentation": []},
        ]

    root = trees.instance_tree(tmp_path)
    whole = open_dataset(root, "train")[0]
    assert len(faults_of(changed(root, change))) == 3
    with pytest.warns(UserWarning, match="that are skipped: 3; annotations that have no other and are left out: 2"):
        dataset = open_dataset(root, "train", skip_invalid=True)
    assert torch.equal(dataset[0].masks, whole.masks)
    assert faults_of(dataset) == []
    edit(root / "annotations/instances_train2017.json", lambda c: c["annotations"][0].update(segmentation=None))
    with pytest.warns(UserWarning, match="invalid"):
        (line,) = faults_of(open_dataset(root, "train", skip_invalid=True))
    assert "annotation 1 of 000000000009.jpg: no segmentation" in line, "only polygons are skipped"


def test_nothing_is_said_where_nothing_is_skipped(tmp_path):
    root = trees.instance_tree(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_dataset(root, "train", skip_invalid=True)
    with pytest.raises(ValueError, match="skip_invalid: the layout folder of .* has no polygons"):
        open_dataset(trees.folder_tree(tmp_path / "folder"), "train", skip_invalid=True)
    with pytest.raises(ValueError, match="skip_invalid: composed:scenes has no polygons"):
        open_dataset("composed:scenes", "train", skip_invalid=True)


@pytest.mark.parametrize("layout", ["instances_train2017", "panoptic_val2017"])
@pytest.mark.parametrize(
    ("files", "names"),
    [
        (("x/a.jpg", "y/a.jpg"), ["x/a", "y/a"]),
        (("a.jpg", "a.png"), ["a.jpg", "a.png"]),
        (("a.b.jpg", "./a.c.jpg"), ["a.b", "a.c"]),
    ],
)
def test_names_are_the_paths_of_the_images(tmp_path, layout, files, names):
    tree = trees.instance_tree if layout.startswith("instances") else trees.panoptic_tree
    root = tree(tmp_path)

    def change(content):
        for image, name in zip(content["images"], files, strict=True):
            path = root / layout.partition("_")[2] / name
            path.parent.mkdir(exist_ok=True)
            (path.parents[0 if "/" not in name.removeprefix("./") else 1] / image["file_name"]).rename(path)
            image["file_name"] = name

    dataset = changed(root, change, layout)
    assert [sample.name for sample in dataset] == names


@pytest.mark.parametrize("files", [("x/1.jpg", "y/1.jpg"), ("1.jpg", "1.png")])
def test_images_of_one_stem_all_count_in_ap(tmp_path, files):
    """Two of three squares are found, in two images. Known by the stem alone, these would be one image."""
    root = tmp_path
    square = {"category_id": 1, "iscrowd": 0, "area": 70, "segmentation": [[2, 3, 12, 3, 12, 10, 2, 10]]}
    for k, name in enumerate(files):
        trees.write_image(root / "train" / name, trees.SIZES[0], k)
    images = [{"id": k, "file_name": name, "height": 20, "width": 30} for k, name in enumerate(files)]
    annotations = [{**square, "id": 2 * k + j, "image_id": k} for k in range(2) for j in range(1 + k)]
    categories = [{"id": 1, "name": "square"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    trees.write_json(root / "annotations/instances_train.json", content)
    metrics = InstanceMetrics(1)
    for k, sample in enumerate(open_dataset(root, "train")):
        found = sample.masks[:1] if k else sample.masks
        scores, labels = torch.full((len(found),), 0.9), sample.labels[: len(found)]
        prediction = {"masks": found, "labels": labels, "scores": scores}
        metrics.update(sample.name, prediction, sample.masks, sample.labels)
    assert metrics.compute()["AP"] == pytest.approx(67 / 101)


@pytest.mark.parametrize("folder", ["annotations", "."])
@pytest.mark.parametrize("images", ["val", "images/val", "images", "images/val2017"])
def test_panoptic_files_without_a_year(tmp_path, folder, images):
    root = trees.panoptic_tree(tmp_path)
    for old, new in (("panoptic_val2017.json", "panoptic_val.json"), ("panoptic_val2017", "panoptic_val")):
        (root / "annotations" / old).rename(root / folder / new)
    (root / images).parent.mkdir(exist_ok=True)
    (root / "val2017").rename(root / images)
    dataset = open_dataset(root, "val")
    assert len(dataset) == 2
    check_dataset(dataset)


def test_what_was_looked_for_is_named(tmp_path):
    trees.write_json(tmp_path / "annotations/panoptic.json", {})
    with pytest.raises(ValueError, match=r"coco-panoptic \(panoptic_SPLIT2017.json or panoptic_SPLIT.json"):
        open_dataset(tmp_path, "val")
    with pytest.raises(FileNotFoundError) as caught:
        open_dataset(tmp_path, "val", kind="coco-panoptic")
    for name in ("annotations/panoptic_val2017.json", "annotations/panoptic_val.json"):
        assert str(tmp_path / name) in str(caught.value)
    trees.panoptic_tree(tmp_path)
    (tmp_path / "val2017").rename(tmp_path / "pictures")
    with pytest.raises(FileNotFoundError) as caught:
        open_dataset(tmp_path, "val")
    assert all(str(tmp_path / name) in str(caught.value) for name in ("val2017", "val", "images/val", "images"))
