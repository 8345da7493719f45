"""Panoptic quality, against a loop over pairs of segments and against the COCO panoptic API."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from fastmask.metrics import PanopticMetrics

K, STUFF = 6, (4, 5)


def case(rng, size=(48, 60)):
    """A truth with void, crowd and several segments of a class, and a prediction that is partly right."""
    height, width = size
    truth = np.full(size, -1)
    labels, crowd = [], []
    for _ in range(rng.integers(0, 7)):
        top, left = rng.integers(0, height - 8), rng.integers(0, width - 8)
        truth[top : top + rng.integers(6, 25), left : left + rng.integers(6, 25)] = len(labels)
        label = int(rng.integers(0, K))
        # The COCO panoptic API knows one crowd region of a class in an image.
        is_free = not any(c and k == label for k, c in zip(labels, crowd, strict=True))
        crowd.append(bool(label not in STUFF and is_free and rng.random() < 0.25))
        labels.append(label)
    kept = np.unique(truth[truth >= 0])
    lookup = np.append(np.full(len(labels), -1), -1)
    lookup[kept] = np.arange(len(kept))
    truth = lookup[truth]
    labels, crowd = np.array(labels, int)[kept], np.array(crowd, bool)[kept]
    ids = np.roll(np.where(truth >= 0, 3 * truth + 2, 0), rng.integers(-3, 4), axis=rng.integers(2))
    noise = rng.integers(0, height - 12)
    ids[noise : noise + 9, 5:20] = 500
    infos = []
    for i in np.unique(ids[ids > 0]):
        known = i < 500 and rng.random() < 0.85
        infos.append({"id": int(i), "category_id": int(labels[(i - 2) // 3] if known else rng.integers(0, K))})
    return (ids, infos), truth, labels, crowd


def cases(seed, count=20):
    rng = np.random.default_rng(seed)
    return [case(rng) for _ in range(count)]


def metrics_of(several):
    metrics = PanopticMetrics(K, STUFF)
    for (ids, infos), truth, labels, crowd in several:
        tensors = torch.from_numpy(truth), torch.from_numpy(labels), torch.from_numpy(crowd)
        metrics.update((torch.from_numpy(ids), infos), *tensors)
    return metrics


def by_pairs(several):
    """(IoU sum, TP, FP, FN) of each class, segment by segment."""
    counts = np.zeros((K, 4))
    for (ids, infos), truth, labels, crowd in several:
        void = truth < 0
        matched = set()
        for m, label in enumerate(labels):
            found = None
            for info in infos:
                mask = ids == info["id"]
                union = ((mask & ~void) | (truth == m)).sum()
                iou = (mask & (truth == m)).sum() / union
                if info["category_id"] == label and not crowd[m] and iou > 0.5:
                    found = iou
                    matched.add(info["id"])
            if found is not None:
                counts[label] += (found, 1, 0, 0)
            elif not crowd[m]:
                counts[label, 3] += 1
        for info in infos:
            mask, label = ids == info["id"], info["category_id"]
            excused = void | np.isin(truth, (crowd & (labels == label)).nonzero()[0])
            if info["id"] not in matched and not (mask & excused).sum() > mask.sum() / 2:
                counts[label, 2] += 1
    return counts


@pytest.mark.parametrize("seed", range(4))
def test_equals_a_loop_over_pairs(seed):
    several = cases(seed)
    iou, hits, wrong, missed = by_pairs(several).T
    assert hits.sum() > 5
    assert wrong.sum() > 5
    assert missed.sum() > 5
    whole = hits + wrong / 2 + missed / 2
    metrics = metrics_of(several)
    numbers, per_class = metrics.compute(), metrics.per_class()
    for suffix, classes in (("", range(K)), ("_things", range(4)), ("_stuff", STUFF)):
        chosen = [k for k in classes if whole[k] > 0]
        quality = {
            "PQ": [iou[k] / whole[k] for k in chosen],
            "SQ": [iou[k] / hits[k] if hits[k] else 0.0 for k in chosen],
            "RQ": [hits[k] / whole[k] for k in chosen],
        }
        for name, values in quality.items():
            assert [per_class[name][k] for k in chosen] == pytest.approx(values, rel=1e-12)
            assert numbers[name + suffix] == pytest.approx(np.mean(values), rel=1e-12)


def test_equals_the_coco_panoptic_api(tmp_path):
    evaluation = pytest.importorskip("panopticapi.evaluation")
    several = cases(11)
    categories = {k: {"id": k, "isthing": int(k not in STUFF)} for k in range(K)}
    pairs = []
    for i, ((ids, infos), truth, labels, crowd) in enumerate(several):
        segments = [
            {"id": m + 1, "category_id": int(label), "iscrowd": int(crowd[m]), "area": int((truth == m).sum())}
            for m, label in enumerate(labels)
        ]
        sides = []
        for side, values, listed in (("truth", truth + 1, segments), ("found", ids, infos)):
            colors = np.stack([values % 256, values // 256, np.zeros_like(values)], -1).astype(np.uint8)
            Image.fromarray(colors).save(tmp_path / f"{side}{i}.png")
            listed = json.loads(json.dumps(listed))
            sides.append({"image_id": i, "file_name": f"{side}{i}.png", "segments_info": listed})
        pairs.append(tuple(sides))
    result = evaluation.pq_compute_single_core(0, pairs, str(tmp_path), str(tmp_path), categories)
    numbers = metrics_of(several).compute()
    for suffix, is_thing in (("", None), ("_things", True), ("_stuff", False)):
        expected, _ = result.pq_average(categories, is_thing)
        for name in ("PQ", "SQ", "RQ"):
            assert numbers[name + suffix] == pytest.approx(float(expected[name.lower()]), rel=1e-12)


def test_merged_parts_give_the_same_numbers():
    several = cases(5)
    parts = metrics_of(several[:3]).merge(metrics_of(several[3:])).merge(PanopticMetrics(K, STUFF))
    assert parts.compute() == pytest.approx(metrics_of(several).compute(), rel=1e-12)
    assert all(np.isnan(value) for value in PanopticMetrics(K, STUFF).compute().values())


def test_padding_labels_and_empty_images_count_for_nothing():
    metrics = PanopticMetrics(K, STUFF)
    nothing = torch.zeros(8, 8, dtype=torch.int64)
    metrics.update((nothing, []), nothing - 1, torch.tensor([], dtype=torch.int64))
    metrics.update((nothing + 1, [{"id": 1, "category_id": 2}]), nothing, torch.tensor([2, -1, -1]))
    assert metrics.compute()["PQ"] == 1
    metrics.update((nothing + 1, [{"id": 1, "category_id": 3}]), nothing - 1, torch.tensor([-1]))
    assert metrics.compute()["PQ"] == 1  # wholly in void


def test_wrong_arguments_are_named():
    plane = torch.zeros(4, 4, dtype=torch.int64)
    metrics = PanopticMetrics(3)
    with pytest.raises(ValueError, match="stuff_classes holds"):
        PanopticMetrics(3, [3])
    with pytest.raises(ValueError, match="labels holds class 3; expected 0..2"):
        metrics.update((plane, []), plane, torch.tensor([3]))
    with pytest.raises(ValueError, match="prediction holds class 5; expected 0..2"):
        metrics.update((plane, [{"id": 0, "category_id": 5}]), plane, torch.tensor([1]))
    with pytest.raises(ValueError, match="lists an id twice"):
        metrics.update((plane, [{"id": 4, "category_id": 1}] * 2), plane, torch.tensor([1]))
    with pytest.raises(ValueError, match="prediction has shape"):
        metrics.update((plane[:2], []), plane, torch.tensor([1]))
