"""The pages of ``predict`` and of evaluations: which images they show, in which order, and with which segments."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from fastmask import MaskFormer, MaskFormerConfig
from fastmask.data import DatasetInfo, Sample, SceneDataset
from fastmask.models import make_model
from fastmask.prediction import EvaluationPage, predict
from fastmask.training import evaluate
from fastmask.training.distributed import cleanup, setup
from tests.helpers.browser import dom, drawn_segments, needs_browser, titles
from tests.helpers.shared_batches import fork_together

NAMES = ("cat", "dog", "sky")
INFO = DatasetInfo(NAMES, stuff_classes=(2,))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return MaskFormer(MaskFormerConfig.preset("tiny", 3, class_names=NAMES, stuff_classes=(2,)))


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for name in ("a", "b & <c>", "d"):
        pixels = rng.integers(0, 256, (40, 50, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{name}.png")
    return tmp_path / "photos"


def read(path):
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("task", ["semantic", "panoptic", "instance"])
@pytest.mark.parametrize("overlays", [True, False])
def test_a_page_of_predictions(model, photos, tmp_path, task, overlays):
    out, path = tmp_path / "out", tmp_path / "pages" / "index.html"
    limit = {"semantic": {}, "panoptic": {"threshold": 0.05, "overlap_threshold": 0.0}, "instance": {"threshold": 0.05}}
    found = predict(model, photos, out, task=task, html=path, overlays=overlays, workers=2, **limit[task])
    assert path in found.paths
    text = read(path)
    assert titles(text) == ["a.png", "b & <c>.png", "d.png"]
    assert f"{task.capitalize()} segmentation of 3 images" in text and "shown" not in text
    drawings = drawn_segments(text)
    assert len(drawings) == 3 and all(segments for _, segments in drawings)
    for name, (ids, segments) in zip(found.written, drawings, strict=True):
        assert ids.shape == (40, 50)
        assert {segment[0] for segment in segments} <= set(NAMES)
        assert all((score is None) == (task == "semantic") for _, _, score in segments)
        if task != "instance":
            labels = np.asarray(Image.open(out / "labels" / f"{name}.png"))
            table = np.array([*(NAMES.index(segment[0]) for segment in segments), 255])
            assert (table[ids] == labels).all()


def test_the_page_shows_the_first_images_and_names_broken_ones(model, photos, tmp_path):
    (photos / "broken.png").write_bytes(b"no picture")
    predict(model, photos, tmp_path / "out", html=tmp_path / "page.html", html_images=2)
    text = read(tmp_path / "page.html")
    assert titles(text) == ["a.png", "b & <c>.png"]
    assert "of 3 images, the first 2 of them shown" in text
    assert "broken.png" in text and "could not be read" in text


def test_an_existing_page_is_not_overwritten_unless_asked(model, photos, tmp_path):
    path = tmp_path / "page.html"
    path.write_text("mine")
    with pytest.raises(FileExistsError, match=r"page\.html exists"):
        predict(model, photos, tmp_path / "out", html=path)
    assert read(path) == "mine" and not (tmp_path / "out").exists()
    predict(model, photos, tmp_path / "out", html=path, overwrite=True)
    assert len(titles(read(path))) == 3
    with pytest.raises(ValueError, match="html_images must be at least 1"):
        predict(model, photos, tmp_path / "out", html=path, html_images=0)


def sample(name):
    segments = torch.zeros(30, 40, dtype=torch.int16)
    segments[:, 20:] = 1
    return Sample(torch.full((3, 30, 40), 90, dtype=torch.uint8), torch.tensor([2, 0]), segments, name=name)


def write(page, path, **numbers):
    page.write(path, "<My> model", numbers, {"IoU": [0.5, float("nan"), 0.25]}, ["dog"])
    return read(path)


def test_the_worst_images_come_first(tmp_path):
    page = EvaluationPage(INFO, images=3)
    labels = torch.full((30, 40), 2)
    for name, score in (("good", 0.9), ("bad", 0.1), ("empty", float("nan")), ("fair", 0.5), ("worst", 0.0)):
        page.add(sample(name), {"semantic": labels}, {"mIoU": score, "pixel_accuracy": 0.0})
    text = write(page, tmp_path / "page.html", mIoU=0.3, fwIoU=0.123)
    assert titles(text) == ["worst", "bad", "fair"]
    assert "Sorted by mIoU of each image alone, the 3 worst of 5." in text
    assert "mIoU 10.0 %" in text and "12.3 %" in text and "&lt;My&gt; model" in text
    assert "Not in the truth: dog." in text
    truth, found = drawn_segments(text)[:2]
    assert [segment[0] for segment in truth[1]] == ["sky", "cat"] and (truth[0][:, 20:] == 1).all()
    assert [segment[0] for segment in found[1]] == ["sky"] and (found[0] == 0).all()


def test_an_image_without_a_score_comes_last(tmp_path):
    page = EvaluationPage(INFO)
    for name, score in (("empty", float("nan")), ("perfect", 1.0)):
        page.add(sample(name), {"panoptic": (torch.zeros(30, 40, dtype=torch.int32), [])}, {"mIoU": 0.0, "PQ": score})
    text = write(page, tmp_path / "page.html", PQ=1.0)
    assert titles(text) == ["perfect", "empty"]
    assert "Sorted by PQ of each image alone, the worst first." in text
    with pytest.raises(ValueError, match="images must be at least 1"):
        EvaluationPage(INFO, 0)


def test_instances_lie_over_each_other(tmp_path):
    """Small ones over large ones in the truth, sure ones over others in the prediction, and unsure ones nowhere."""
    masks = torch.zeros(2, 30, 40, dtype=torch.bool)
    masks[0, :10, :10] = True
    masks[1] = True
    truth = sample("both")._replace(segments=None, masks=masks, labels=torch.tensor([1, 0]))
    found = {"scores": torch.tensor([0.6, 0.9, 0.4]), "labels": torch.tensor([0, 1, 2]), "masks": masks[[1, 0, 1]]}
    page = EvaluationPage(INFO)
    page.add(truth, {"instance": found}, {"AP": 0.5})
    for ids, segments in drawn_segments(write(page, tmp_path / "page.html", AP=0.5)):
        assert [segment[0] for segment in segments] == ["cat", "dog"]
        assert (ids[:10, :10] == 1).all() and (ids[10:] == 0).all()
    assert [segment[2] for segment in segments] == pytest.approx([0.6, 0.9])


def evaluated(path):
    torch.manual_seed(0)
    data = SceneDataset("val", length=5, size=(32, 32))
    processes = setup("cpu")
    page = EvaluationPage(data.info, images=3)
    network = make_model("tiny", 13, stuff_classes=data.info.stuff_classes)
    result = evaluate(network, data, batch_size=1, each=page.add, boundary_share=None)
    page.write(path, f"process {processes.rank}", result.numbers, result.per_class, result.absent_classes)
    cleanup()


def test_two_processes_write_the_worst_images_of_both(tmp_path):
    evaluated(tmp_path / "alone.html")
    fork_together(evaluated, tmp_path / "together.html")
    alone, together = read(tmp_path / "alone.html"), read(tmp_path / "together.html")
    assert titles(alone) == titles(together) and len(titles(alone)) == 3
    assert "<title>process 0</title>" in together and "3 worst of 5" in together


@needs_browser
def test_a_browser_shows_the_page_of_an_evaluation(tmp_path):
    evaluated(tmp_path / "page.html")
    seen = dom(tmp_path / "page.html")
    # What its script adds: the picture behind each drawing, and a place for the name under the pointer.
    assert seen.count("background-image: url") == seen.count("<output></output>") == 3 * 3
    assert re.search(r"<h1>process 0</h1>", seen)
