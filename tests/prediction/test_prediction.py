"""``predict``: every output read back, by our own readers, by pycocotools, and as the format's description says."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from fastmask import (
    MaskFormer,
    PerPixelBaseline,
    Segmenter,
    SoundEventDetector,
)
from fastmask.data import DatasetInfo, check_dataset, open_dataset
from fastmask.data.pictures import decode_picture
from fastmask.prediction import predict

NAMES = ("cat", "dog", "tree", "sky", "grass")
STUFF = (3, 4)
SIZES = ((48, 64), (65, 33), (48, 64), (7, 90))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(5)
    model = MaskFormer(
        MaskFormer.config_class.preset("tiny", 5, class_names=NAMES, stuff_classes=STUFF, num_queries=12)
    )
    with torch.no_grad():  # so that queries differ, and are sure of what they say
        model.predictor.query_embed.weight.mul_(5)
        model.predictor.class_embed.weight.mul_(40)
        for parameter in model.predictor.mask_embed.parameters():
            parameter.mul_(4)
    return model


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i, (height, width) in enumerate(SIZES):
        coarse = rng.integers(0, 256, (4, 4, 3)).astype(np.uint8)
        path = folder / ("sub folder" if i % 2 else ".") / f"{i + 101}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(path)
    return folder


def truth(model, path, task, **options):
    return model.predict([decode_picture(path).float() / 255], task, **options)[0]


def read(path):
    with Image.open(path) as image:
        return image.mode, np.array(image)


def files_below(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def panoptic_faults(folder):
    """What in a folder differs from the description of COCO's panoptic format (cocodataset.org/#format-data and
    #format-results).
    """
    content = json.loads((folder / "panoptic.json").read_text())
    images = {image["id"]: image for image in content["images"]}
    categories = {category["id"]: category for category in content["categories"]}
    assert len(images) == len(content["images"]) == len(content["annotations"])
    assert len(categories) == len(content["categories"])
    for annotation in content["annotations"]:
        image = images.pop(annotation["image_id"])
        with Image.open(folder / "panoptic" / annotation["file_name"]) as picture:
            assert picture.mode == "RGB" and picture.size == (image["width"], image["height"])
            colors = np.array(picture).astype(np.int64)
        ids = colors[..., 0] + colors[..., 1] * 256 + colors[..., 2] * 256**2
        listed = {segment["id"]: segment for segment in annotation["segments_info"]}
        if len(listed) < len(annotation["segments_info"]):
            yield "an id is listed twice"
        if set(np.unique(ids)) - {0} != set(listed):
            yield f"{set(np.unique(ids))} in the picture, {set(listed)} in the list"
        seen_stuff = set()
        for i, segment in listed.items():
            rows, columns = (ids == i).nonzero()
            left, top = columns.min(), rows.min()
            box = [left, top, columns.max() + 1 - left, rows.max() + 1 - top]
            category = categories[segment["category_id"]]
            if segment["area"] != len(rows) or segment["bbox"] != box or segment["iscrowd"] != 0:
                yield f"{segment}: {len(rows)} pixels in {box}"
            if segment["isthing"] != category["isthing"] or category["isthing"] not in (0, 1):
                yield f"{segment} of {category}"
            if not category["isthing"] and segment["category_id"] in seen_stuff:
                yield f"stuff {category} twice"
            seen_stuff.add(segment["category_id"])


def test_panoptic(model, photos, tmp_path):
    result = predict(model, photos, tmp_path, threshold=0.0, overlap_threshold=0.2)
    assert (result.task, result.written, result.failures) == (
        "panoptic", ("101", "103", "sub folder/102", "sub folder/104"), ()
    )  # fmt: skip
    pictures = {f"{folder}/{name}.png" for folder in ("panoptic", "labels", "overlays") for name in result.written}
    assert files_below(tmp_path) == {*pictures, "panoptic.json", "classes.json"}
    assert list(panoptic_faults(tmp_path)) == []
    content = json.loads((tmp_path / "panoptic.json").read_text())
    assert [category["name"] for category in content["categories"]] == list(NAMES)
    assert [category["id"] for category in content["categories"] if not category["isthing"]] == list(STUFF)
    segments = 0
    for annotation, image in zip(content["annotations"], content["images"], strict=True):
        assert image["id"] == annotation["image_id"] == int(image["file_name"].rpartition("/")[2].removesuffix(".png"))
        ids, infos = truth(model, photos / image["file_name"], "panoptic", threshold=0.0, overlap_threshold=0.2)
        mode, colors = read(tmp_path / "panoptic" / annotation["file_name"])
        assert mode == "RGB" and np.array_equal(colors @ [1, 256, 65536], ids)
        listed = {segment["id"]: segment for segment in annotation["segments_info"]}
        assert {i: s["category_id"] for i, s in listed.items()} == {s["id"]: s["category_id"] for s in infos}
        mode, labels = read(tmp_path / "labels" / annotation["file_name"])
        classes = np.array([255, *(s["category_id"] for s in sorted(infos, key=lambda s: s["id"]))])
        assert mode == "L" and np.array_equal(labels, classes[ids])
        segments += len(infos)
    assert segments > 4


def test_panoptic_reads_back_as_a_data_set(model, photos, tmp_path):
    """What was written has the layout in which COCO is published."""
    predict(model, photos, tmp_path / "out", threshold=0.0, overlap_threshold=0.2)
    shutil.copytree(photos, tmp_path / "coco" / "val2017")
    shutil.copytree(tmp_path / "out" / "panoptic", tmp_path / "coco" / "panoptic_val2017")
    shutil.copy(tmp_path / "out" / "panoptic.json", tmp_path / "coco" / "panoptic_val2017.json")
    dataset = open_dataset(tmp_path / "coco", "val")
    assert dataset.info.class_names == NAMES and dataset.info.stuff_classes == STUFF and len(dataset) == len(SIZES)
    check_dataset(dataset)
    for i, entry in enumerate(dataset.entries):
        sample = dataset[i]
        ids, infos = truth(model, entry.image, "panoptic", threshold=0.0, overlap_threshold=0.2)
        classes = {info["id"]: info["category_id"] for info in infos} | {0: 255}
        assert np.array_equal(sample.class_map(), np.vectorize(classes.get)(ids))
        assert len(sample.labels) == len(infos)


def test_instance_as_pycocotools_reads_it(model, photos, tmp_path):
    coco = pytest.importorskip("pycocotools.coco")
    from pycocotools.cocoeval import COCOeval

    result = predict(model, photos, tmp_path, task="instance", threshold=0.0, top_k=30)
    assert files_below(tmp_path) == {
        *(f"overlays/{name}.png" for name in result.written), "instances.json", "images.json"
    }  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        images = coco.COCO(tmp_path / "images.json")
        found = images.loadRes(str(tmp_path / "instances.json"))
        evaluation = COCOeval(images, found, "segm")
        evaluation.evaluate()
    assert [images.cats[k]["name"] for k in range(5)] == list(NAMES)
    total = 0
    for i, image in images.imgs.items():
        expected = truth(model, photos / image["file_name"], "instance", top_k=30)
        kept = expected["masks"].any((1, 2)).nonzero().flatten().tolist()
        annotations = found.imgToAnns[i]
        assert [a["category_id"] for a in annotations] == expected["labels"][kept].tolist()
        assert [a["score"] for a in annotations] == pytest.approx(expected["scores"][kept].tolist(), abs=1e-5)
        for annotation, k in zip(annotations, kept, strict=True):
            mask = expected["masks"][k].numpy()
            assert np.array_equal(found.annToMask(annotation), mask)
            rows, columns = mask.nonzero()
            left, top = columns.min(), rows.min()
            assert annotation["bbox"] == [left, top, columns.max() + 1 - left, rows.max() + 1 - top]
            assert annotation["category_id"] not in STUFF
        total += len(annotations)
    assert total > 8


@pytest.mark.parametrize("task", ["semantic", "general"])
def test_label_maps(model, photos, tmp_path, task):
    result = predict(model, [photos / "101.png", photos / "103.png"], tmp_path, task=task, batch_size=2)
    assert files_below(tmp_path) == {
        "labels/101.png", "labels/103.png", "overlays/101.png", "overlays/103.png", "classes.json"
    }  # fmt: skip
    assert result.paths == (tmp_path / "labels", tmp_path / "overlays", tmp_path / "classes.json")
    for name in result.written:
        mode, labels = read(tmp_path / "labels" / f"{name}.png")
        assert mode == "L" and np.array_equal(labels, truth(model, photos / f"{name}.png", task))
    classes = json.loads((tmp_path / "classes.json").read_text())
    assert classes["classes"] == list(NAMES) and classes["void"] == 255 and classes["stuff"] == ["sky", "grass"]


def test_label_maps_are_a_data_set(model, photos, tmp_path):
    """Labels and ``classes.json`` are what the layout "folder" wants."""
    predict(model, photos, tmp_path, task="general")
    shutil.copytree(photos, tmp_path / "images" / "val")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "labels").rename(tmp_path / "annotations" / "val")
    dataset = open_dataset(tmp_path, "val", "folder")
    assert dataset.info.class_names == NAMES and dataset.info.stuff_classes == STUFF
    for i, entry in enumerate(dataset.entries):
        assert np.array_equal(dataset[i].class_map(), truth(model, entry.image, "general"))


@pytest.mark.parametrize("task", ["semantic", "general", "panoptic", "instance"])
def test_many_classes(photos, tmp_path, task):
    """Beyond 255 classes label maps have 16 bits, and void is 65535."""
    torch.manual_seed(0)
    model = MaskFormer(MaskFormer.config_class.preset("tiny", 700))
    with torch.no_grad():
        model.predictor.class_embed.bias[:600] -= 20
    options = {"threshold": 0.0} if task in ("panoptic", "instance") else {}
    predict(model, photos / "101.png", tmp_path, task=task, **options)
    if task == "instance":
        assert min(a["category_id"] for a in json.loads((tmp_path / "instances.json").read_text())) >= 600
        return
    mode, labels = read(tmp_path / "labels" / "101.png")
    assert mode == "I;16" and set(np.unique(labels)) <= {*range(600, 700), 65535}
    if task in ("semantic", "general"):
        expected = truth(model, photos / "101.png", task, **({"ignore_index": 65535} if task == "general" else {}))
        assert np.array_equal(labels, expected)
    classes = json.loads((tmp_path / "classes.json").read_text())
    assert classes["void"] == 65535 and classes["classes"][699] == "class 699"


@pytest.mark.parametrize("task", ["general", "panoptic", "instance"])
def test_no_segments_at_all(photos, tmp_path, task):
    """Nothing that is surer than "no object": void everywhere, lists without entries, and still a picture."""
    torch.manual_seed(0)
    model = MaskFormer(MaskFormer.config_class.preset("tiny", 3, stuff_classes=(2,)))
    with torch.no_grad():
        model.predictor.class_embed.bias[3] += 50
    predict(model, photos, tmp_path, task=task)
    assert read(tmp_path / "overlays" / "101.png")[1].shape == (13 * 48, 13 * 64, 3)
    if task != "instance":
        assert (read(tmp_path / "labels" / "101.png")[1] == 255).all()
    if task == "panoptic":
        assert (read(tmp_path / "panoptic" / "101.png")[1] == 0).all()
        annotations = json.loads((tmp_path / "panoptic.json").read_text())["annotations"]
        assert [annotation["segments_info"] for annotation in annotations] == [[]] * len(SIZES)


def test_narrow_images(model, tmp_path):
    for name, size in {"tall": (1, 70), "wide": (70, 1), "dot": (1, 1)}.items():
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.new("RGB", size, "orange").save(tmp_path / "images" / f"{name}.png")
    for task in ("semantic", "general", "panoptic", "instance"):
        out = tmp_path / task
        limits = {"threshold": 0.0} if task in ("panoptic", "instance") else {}
        assert len(predict(model, tmp_path / "images", out, task=task, **limits).written) == 3
        if task == "panoptic":
            assert list(panoptic_faults(out)) == []
        if task != "instance":
            assert read(out / "labels" / "tall.png")[1].shape == (70, 1)


def test_other_networks(photos, tmp_path):
    torch.manual_seed(0)
    image = decode_picture(photos / "101.png").float() / 255
    segmenter = Segmenter(Segmenter.config_class.preset("seg-tiny-mask-16", 4, encoder_layers=1, image_size=(32, 32)))
    baseline = PerPixelBaseline(PerPixelBaseline.config_class.preset("tiny", 4))
    for network, options in ((segmenter, {}), (segmenter, {"window": (32, 16)}), (baseline, {})):
        result = predict(network, photos, tmp_path, overwrite=True, **options)
        assert result.task == "semantic" and len(result.written) == len(SIZES)
        expected = network.predict([image], **options)[0]
        assert np.array_equal(read(tmp_path / "labels" / "101.png")[1], expected)
    with pytest.raises(ValueError, match="a Segmenter does semantic segmentation only"):
        predict(segmenter, photos, tmp_path, task="panoptic")
    with pytest.raises(ValueError, match="a Segmenter does not predict with flip, scales"):
        predict(segmenter, photos, tmp_path, flip=True, scales=(1, 2))
    with pytest.raises(ValueError, match="a PerPixelBaseline does not predict with window"):
        predict(baseline, photos, tmp_path, window=32)


def test_options_reach_the_model(model, photos, tmp_path):
    path = photos / "sub folder" / "102.png"
    views = {"window": (40, 20), "scales": (0.5, 1.5), "flip": True}
    predict(model, path, tmp_path / "a", task="semantic", **views)
    assert np.array_equal(read(tmp_path / "a/labels/102.png")[1], truth(model, path, "semantic", **views))
    predict(model, path, tmp_path / "b", task="semantic", window=40)
    expected = truth(model, path, "semantic", window=(40, 40))
    assert np.array_equal(read(tmp_path / "b/labels/102.png")[1], expected)
    predict(model, path, tmp_path / "c", task="semantic", short_side=20, max_side=35)
    with Image.open(path) as image:
        small = np.stack([np.array(band.resize((18, 35), Image.Resampling.BILINEAR)) for band in image.split()])
    expected = model.predict([torch.from_numpy(small).float() / 255], sizes=(65, 33))[0]
    assert np.array_equal(read(tmp_path / "c/labels/102.png")[1], expected)


def test_a_batch_gives_what_single_images_give(model, photos, tmp_path):
    """In float64: products of another size are summed in another order, and no pixel is so near to a tie."""
    model = copy.deepcopy(model).double()
    predict(model, photos, tmp_path / "single", threshold=0.0)
    predict(model, photos, tmp_path / "batch", threshold=0.0, batch_size=3, workers=2)
    for name in files_below(tmp_path / "single") - {"panoptic.json"}:
        assert (tmp_path / "single" / name).read_bytes() == (tmp_path / "batch" / name).read_bytes(), name
    contents = [json.loads((tmp_path / name / "panoptic.json").read_text()) for name in ("single", "batch")]
    single, batch = (
        [segment.pop("score") for annotation in content["annotations"] for segment in annotation["segments_info"]]
        for content in contents
    )
    assert single == pytest.approx(batch, abs=1e-9)
    assert contents[0] == contents[1]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_precision(model, photos, tmp_path, precision):
    path = photos / "101.png"
    predict(model, path, tmp_path, task="semantic", precision=precision)
    agree = read(tmp_path / "labels/101.png")[1] == truth(model, path, "semantic").numpy()
    assert agree.mean() > 0.9


def test_what_a_data_set_says(model, photos, tmp_path):
    """Names, colors, stuff and category ids of a data set replace those of the model."""
    palette = tuple((k, 50 * k, 7) for k in range(5))
    info = DatasetInfo(tuple("abcde"), "panoptic", (0, 1), palette, category_ids=(1, 2, 17, 40, 200))
    predict(model, photos, tmp_path, info=info, threshold=0.0)
    assert list(panoptic_faults(tmp_path)) == []
    content = json.loads((tmp_path / "panoptic.json").read_text())
    assert [(c["id"], c["name"], c["isthing"], tuple(c["color"])) for c in content["categories"]] == list(
        zip((1, 2, 17, 40, 200), "abcde", (0, 0, 1, 1, 1), palette, strict=True)
    )
    used = {s["category_id"] for a in content["annotations"] for s in a["segments_info"]}
    assert used and used <= {1, 2, 17, 40, 200}
    for a in content["annotations"]:
        labels = read(tmp_path / "labels" / a["file_name"])[1]
        assert {(1, 2, 17, 40, 200)[k] for k in np.unique(labels) if k != 255} == {
            s["category_id"] for s in a["segments_info"]
        }
    predict(model, photos, tmp_path, info=info, task="instance", overwrite=True, palette=[(0, 0, 0)] * 5)
    assert {a["category_id"] for a in json.loads((tmp_path / "instances.json").read_text())} <= {17, 40, 200}


def test_wrong_arguments(model, photos, tmp_path):
    wrong = {
        "task='fast' is unknown": {"task": "fast"},
        "precision='int8' is unknown": {"precision": "int8"},
        "batch_size must be at least 1": {"batch_size": 0},
        "max_side goes with short_side": {"max_side": 50},
        "short_side does not go with window": {"short_side": 50, "window": 20, "task": "semantic"},
        "threshold does not go with the task 'semantic'": {"threshold": 0.5, "task": "semantic"},
        "top_k does not go with the task 'panoptic'": {"top_k": 5},
        r"overlap_threshold must lie in 0..1, got 2": {"overlap_threshold": 2},
        "window, flip goes with the task 'semantic' only": {"window": 20, "flip": True},
        "info has 2 classes; the model has 5": {"info": DatasetInfo(("a", "b"))},
        "palette has 1 colors; the model has 5": {"palette": [(0, 0, 0)]},
        r"palette holds \(0, 300, 0\)": {"palette": np.full((5, 3), (0, 300, 0))},
    }
    for message, options in wrong.items():
        with pytest.raises(ValueError, match=message):
            predict(model, photos, tmp_path / "out", **options)
    with pytest.raises(FileNotFoundError, match="no folder"):
        predict(tmp_path / "absent", photos, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no image or folder"):
        predict(model, tmp_path / "absent.jpg", tmp_path / "out")
    gray = MaskFormer.config_class.preset(
        "tiny", 2, pixel_mean=(0.5,), pixel_std=(0.5,), backbone_options={"num_channels": 1}
    )
    gray = MaskFormer(gray)
    with pytest.raises(TypeError, match="the model takes images of 1 channels"):
        predict(gray, photos, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_network_for_sounds(photos, tmp_path):
    SoundEventDetector(SoundEventDetector.config_class.preset("tiny", 3)).save_pretrained(tmp_path / "sounds")
    with pytest.raises(TypeError, match="a SoundEventDetector does not segment images"):
        predict(tmp_path / "sounds", photos, tmp_path / "out")
