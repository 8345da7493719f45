"""COCO's AP, against pycocotools on its own files and against an independent AP."""

from __future__ import annotations

import contextlib
import io
import json
import math
import sys

import numpy as np
import pytest
import torch

from fastmask.metrics import InstanceMetrics

pytest.importorskip("pycocotools")
K = 3
SIZE = (120, 150)


def images(seed, count=6, tied=False):
    rng = np.random.default_rng(seed)
    for i in range(count):
        masks, labels, crowd = [], [], []
        for _ in range(rng.integers(0, 5)):
            mask = np.zeros(SIZE, bool)
            top, left = rng.integers(0, 80), rng.integers(0, 100)
            mask[top : top + rng.integers(5, 100), left : left + rng.integers(5, 120)] = True
            masks.append(mask)
            labels.append(int(rng.integers(0, K)))
            crowd.append(rng.random() < 0.15)
        found = [
            (np.roll(mask, rng.integers(-4, 5, 2), (0, 1)), label, rng.random())
            for mask, label in zip([*masks, *masks[:1]], [*labels, *labels[:1]], strict=True)
        ]
        found.append((np.roll(np.eye(*SIZE, dtype=bool), 3), int(rng.integers(0, K)), rng.random()))
        if tied:
            found = [(mask, label, round(2 * score) / 2) for mask, label, score in found]
        prediction = {
            "masks": torch.from_numpy(np.stack([mask for mask, _, _ in found])),
            "labels": torch.tensor([label for _, label, _ in found]),
            "scores": torch.tensor([score for _, _, score in found]),
        }
        true = np.stack(masks) if masks else np.zeros((0, *SIZE), bool)
        yield f"image {i}", prediction, torch.from_numpy(true), torch.tensor(labels).long(), torch.tensor(crowd).bool()


def metrics_of(several):
    metrics = InstanceMetrics(K)
    for image in several:
        metrics.update(*image)
    return metrics


@pytest.mark.parametrize("stated", [False, True], ids=["own areas", "stated areas"])
@pytest.mark.parametrize("tied", [False, True], ids=["distinct scores", "tied scores"])
@pytest.mark.parametrize(("seed", "count"), [(2, 6), (5, 1), (7, 20)])
def test_equals_pycocotools_on_files(tmp_path, seed, count, tied, stated):
    from pycocotools import mask as coder
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def encoded(mask):
        rle = coder.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
        return {"size": rle["size"], "counts": rle["counts"].decode()}

    several = list(images(seed, count, tied))
    several.sort(key=lambda image: image[0])
    rng = np.random.default_rng(seed)
    limits = (0, 32**2, 32**2 + 0.5, 96**2, 1e5, 2e10)
    areas = [torch.from_numpy(rng.choice(limits, len(labels))) if stated else None for _, _, _, labels, _ in several]
    annotations, results = [], []
    for i, (_, prediction, masks, labels, crowd) in enumerate(several):
        sizes = masks.sum((1, 2)) if areas[i] is None else areas[i]
        for mask, label, is_crowd, area in zip(masks, labels.tolist(), crowd.tolist(), sizes.tolist(), strict=True):
            annotations.append({
                "id": len(annotations) + 1, "image_id": i, "category_id": label, "segmentation": encoded(mask),
                "iscrowd": int(is_crowd), "area": area,
            })  # fmt: skip
        for mask, label, score in zip(*(prediction[key] for key in ("masks", "labels", "scores")), strict=True):
            results.append({
                "image_id": i, "category_id": int(label), "segmentation": encoded(mask), "score": float(score),
            })  # fmt: skip
    content = {
        "info": {},
        "images": [{"id": i, "height": SIZE[0], "width": SIZE[1]} for i in range(len(several))],
        "categories": [{"id": k, "name": str(k)} for k in range(K)],
        "annotations": annotations,
    }
    (tmp_path / "truth.json").write_text(json.dumps(content))
    (tmp_path / "found.json").write_text(json.dumps(results))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(tmp_path / "truth.json"))
        evaluation = COCOeval(truth, truth.loadRes(str(tmp_path / "found.json")), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    numbers = metrics_of([(*image, own) for image, own in zip(several, areas, strict=True)]).compute()
    expected = [math.nan if value < 0 else value for value in evaluation.stats.tolist()]
    assert count == 1 or stated or 0.1 < numbers["AP"] < 0.95
    assert list(numbers.values()) == pytest.approx(expected, nan_ok=True, rel=1e-12)


def average_precision(several, label, threshold):
    """AP at one IoU without crowd: detections by falling score take the free truth of highest IoU."""
    found, total = [], 0
    for i, (_, prediction, masks, labels, _) in enumerate(several):
        total += int((labels == label).sum())
        chosen = prediction["labels"] == label
        for mask, score in zip(prediction["masks"][chosen], prediction["scores"][chosen], strict=True):
            ious = [
                float((mask & true).sum() / (mask | true).sum()) if k == label else 0.0
                for true, k in zip(masks, labels.tolist(), strict=True)
            ]
            found.append((float(score), i, ious))
    hits, taken = [], set()
    for _, i, ious in sorted(found, key=lambda entry: -entry[0]):
        free = [(iou, m) for m, iou in enumerate(ious) if iou >= threshold and (i, m) not in taken]
        hits.append(bool(free))
        if free:
            taken.add((i, max(free)[1]))
    recall = np.cumsum(hits) / total
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    return np.mean([max(precision[recall >= point], default=0.0) for point in np.linspace(0, 1, 101)])


def test_equals_an_average_precision_written_out():
    several = [(*image[:4], None) for image in images(3)]
    expected = [
        np.mean([average_precision(several, label, 0.5 + 0.05 * step) for step in range(10)]) for label in range(K)
    ]
    metrics = metrics_of(several)
    assert metrics.per_class()["AP"] == pytest.approx(expected, abs=1e-9)
    assert metrics.compute()["AP"] == pytest.approx(np.mean(expected), abs=1e-9)


def test_parts_add_up_and_an_image_counts_once():
    several = list(images(4))
    whole = metrics_of(several)
    parts = metrics_of(several[:4]).merge(metrics_of(several[2:]))
    assert parts.compute() == pytest.approx(whole.compute(), nan_ok=True)
    assert all(math.isnan(value) for value in InstanceMetrics(K).compute().values())


def test_two_images_of_one_name_are_no_repetition():
    first, second = (image for image in list(images(4))[:2])
    metrics = metrics_of([first])
    with pytest.raises(ValueError, match=f"{first[0]}: two images have this name"):
        metrics.update(first[0], *second[1:])
    with pytest.raises(ValueError, match=f"{first[0]}: two images have this name"):
        metrics_of([first]).merge(metrics_of([(first[0], *second[1:])]))
    assert metrics.compute() == pytest.approx(metrics_of([first]).compute(), nan_ok=True)


def test_classes_without_a_true_object_are_absent():
    metrics = InstanceMetrics(K)
    assert metrics.absent() == [0, 1, 2]
    masks = torch.ones(2, 4, 4, dtype=torch.bool)
    found = {"masks": masks, "labels": torch.tensor([2, 2]), "scores": torch.tensor([0.5, 0.4])}
    metrics.update("a", found, masks, torch.tensor([0, 1]), crowd=torch.tensor([False, True]))
    assert metrics.absent() == [1, 2], "a crowd alone is nothing to be found, and a prediction is no truth"


def test_stated_areas_decide_what_is_small():
    name, prediction, masks, labels, _ = next(image for image in images(5) if len(image[3]) > 0)
    metrics = InstanceMetrics(K)
    metrics.update(name, prediction, masks, labels, areas=torch.full(labels.shape, 9.0))
    numbers = metrics.compute()
    assert not math.isnan(numbers["AP_small"])
    assert math.isnan(numbers["AP_large"])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_masks_of_any_dtype_mean_the_same(dtype):
    several = list(images(3, count=3))
    foreground = {torch.uint8: 255, torch.int64: 256, torch.float32: 1.0}[dtype]
    converted = [
        (
            name,
            {**prediction, "masks": prediction["masks"] * torch.tensor(foreground, dtype=dtype)},
            masks * torch.tensor(foreground, dtype=dtype),
            *rest,
        )
        for name, prediction, masks, *rest in several
    ]
    expected = pytest.approx(metrics_of(several).compute(), rel=0, abs=0, nan_ok=True)
    assert metrics_of(converted).compute() == expected


@pytest.mark.parametrize("which", ["masks", "prediction"])
def test_masks_that_are_not_binary_are_named(which):
    name, prediction, masks, labels, _ = next(images(3))
    if which == "masks":
        masks = masks * 0.999
    else:
        prediction = {**prediction, "masks": prediction["masks"] * 0.999}
    with pytest.raises(ValueError, match=f"{name}: {which} holds 0.99"):
        InstanceMetrics(K).update(name, prediction, masks, labels)


def test_a_missing_hotcoco_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    with pytest.raises(ImportError, match=r"pip install 'fastmask-kernels\[coco\]'"):
        InstanceMetrics(K)


def test_wrong_arguments_are_named():
    _, prediction, masks, labels, _ = next(image for image in images(6) if len(image[3]) > 0)
    metrics = InstanceMetrics(K)
    with pytest.raises(ValueError, match="a: masks has labels outside 0..2"):
        metrics.update("a", prediction, masks, labels + K)
    with pytest.raises(ValueError, match="b: prediction is"):
        metrics.update("b", prediction, masks[:, :9], labels)
    with pytest.raises(ValueError, match="c: masks has"):
        metrics.update("c", prediction, masks, labels[1:])
