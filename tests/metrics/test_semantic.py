"""Semantic metrics, against loops over classes and pixels and against the scripts of Cityscapes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from fastmask.metrics import SemanticMetrics

K, VOID = 5, 255


def pictures(seed, count=4, sizes=((37, 52), (64, 33))):
    """Truth and prediction in blobs, with void in the truth and pixels of no class in the prediction."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        size = sizes[i % len(sizes)]
        truth, found = (ndimage.zoom(rng.integers(0, K - 1, (5, 6)), (10, 12), order=0) for _ in range(2))
        truth, found = truth[: size[0], : size[1]], found[: size[0], : size[1]]
        found = np.where(rng.random(truth.shape) < 0.6, truth, found)
        yield (
            np.where(rng.random(truth.shape) < 0.1, VOID, truth).astype(np.uint8),
            np.where(rng.random(truth.shape) < 0.05, K, found).astype(np.int64),
        )


def metrics_of(pairs, **options):
    metrics = SemanticMetrics(K, **options)
    for truth, found in pairs:
        metrics.update(torch.from_numpy(found), torch.from_numpy(truth))
    return metrics


@pytest.mark.parametrize("seed", range(3))
def test_iou_and_accuracy_equal_a_count_class_by_class(seed):
    pairs = list(pictures(seed))
    truth = np.concatenate([t.ravel() for t, _ in pairs])
    found = np.concatenate([f.ravel() for _, f in pairs])[truth != VOID]
    truth = truth[truth != VOID]
    iou, accuracy, weights = [], [], []
    for k in range(K):
        union = ((truth == k) | (found == k)).sum()
        iou.append(((truth == k) & (found == k)).sum() / union if union else math.nan)
        accuracy.append((found[truth == k] == k).mean() if (truth == k).any() else math.nan)
        weights.append((truth == k).mean())
    metrics = metrics_of(pairs, boundary_share=None)
    assert metrics.per_class()["IoU"] == pytest.approx(iou, nan_ok=True, rel=1e-12)
    assert metrics.per_class()["accuracy"] == pytest.approx(accuracy, nan_ok=True, rel=1e-12)
    assert math.isnan(iou[K - 1])  # a class that does not occur
    expected = {
        "mIoU": np.nanmean(iou),
        "fwIoU": np.nansum(np.multiply(weights, iou)),
        "pixel_accuracy": (truth == found).mean(),
        "mean_accuracy": np.nanmean(accuracy),
    }
    assert metrics.compute() == pytest.approx(expected, rel=1e-12)


def near_boundary_by_erosion(mask, distance):
    """The definition of the paper's code: the mask less its erosion, with nothing beyond the border."""
    eroded = ndimage.binary_erosion(np.pad(mask, 1), np.ones((3, 3)), iterations=distance)[1:-1, 1:-1]
    return mask & ~eroded


@pytest.mark.parametrize("share", [0.001, 0.02, 0.1])
def test_boundary_iou_equals_erosion_class_by_class(share):
    pairs = list(pictures(7))
    both, either = np.zeros(K), np.zeros(K)
    for truth, found in pairs:
        distance = max(1, round(share * math.hypot(*truth.shape)))
        found = np.where(truth == VOID, VOID, found)
        for k in range(K):
            near = [near_boundary_by_erosion(classes == k, distance) for classes in (truth, found)]
            both[k] += (near[0] & near[1]).sum()
            either[k] += (near[0] | near[1]).sum()
    expected = np.divide(both, either, out=np.full(K, np.nan), where=either > 0)
    metrics = metrics_of(pairs, boundary_share=share)
    assert metrics.per_class()["boundary_IoU"] == pytest.approx(expected.tolist(), nan_ok=True, rel=1e-12)
    assert metrics.compute()["boundary_IoU"] == pytest.approx(np.nanmean(expected), rel=1e-12)


def test_a_shifted_boundary_costs_more_than_iou():
    truth = torch.zeros(100, 100, dtype=torch.int64)
    truth[20:80, 20:80] = 1
    metrics = SemanticMetrics(2)
    metrics.update(truth.roll(2, 0), truth)
    numbers = metrics.compute()
    assert numbers["boundary_IoU"] < numbers["mIoU"] - 0.1
    perfect = SemanticMetrics(2)
    perfect.update(truth, truth.masked_fill(torch.rand(100, 100) < 0.2, VOID))
    assert set(perfect.compute().values()) == {1.0}


def test_equals_the_scripts_of_cityscapes(tmp_path):
    scripts = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    from cityscapesscripts.helpers.labels import labels

    ids = np.array([label.id for label in sorted(labels, key=lambda label: label.trainId) if 0 <= label.trainId < 19])
    rng = np.random.default_rng(3)
    arguments = scripts.args
    arguments.evalInstLevelScore, arguments.quiet, arguments.JSONOutput = False, True, False
    metrics = SemanticMetrics(19, boundary_share=None)
    names = []
    for i in range(3):
        truth = rng.integers(0, 17, (40, 30))  # two classes do not occur in the truth, one of them is predicted
        found = np.where(rng.random(truth.shape) < 0.7, truth, rng.integers(0, 18, truth.shape))
        void = rng.random(truth.shape) < 0.1
        metrics.update(torch.from_numpy(found), torch.from_numpy(np.where(void, VOID, truth)))
        paths = [str(tmp_path / f"{side}{i}.png") for side in ("found", "truth")]
        Image.fromarray(ids[found].astype(np.uint8)).save(paths[0])
        Image.fromarray(np.where(void, 4, ids[truth]).astype(np.uint8)).save(paths[1])
        names.append(paths)
    result = scripts.evaluateImgLists([found for found, _ in names], [truth for _, truth in names], arguments)
    names_of_ids = {label.id: label.name for label in labels}
    expected = [float(result["classScores"][names_of_ids[i]]) for i in ids]
    assert metrics.per_class()["IoU"] == pytest.approx(expected, nan_ok=True, rel=1e-12)
    assert metrics.compute()["mIoU"] == pytest.approx(float(result["averageScoreClasses"]), rel=1e-12)


def test_batches_and_merged_parts_give_the_same_counts():
    pairs = list(pictures(5, count=5, sizes=((32, 40),)))
    whole = SemanticMetrics(K)
    truths, founds = (torch.from_numpy(np.stack(side).astype(np.int64)) for side in zip(*pairs, strict=True))
    whole.update(founds, truths)
    parts = metrics_of(pairs[:1]).merge(metrics_of(pairs[1:])).merge(SemanticMetrics(K))
    assert parts.compute() == whole.compute()
    assert parts.synced().compute() == whole.compute()
    assert (parts.confusion == whole.confusion).all()
    assert all(math.isnan(value) for value in SemanticMetrics(K).compute().values())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16])
def test_an_ignore_index_beyond_the_dtype_matches_no_class(dtype):
    metrics = SemanticMetrics(171, ignore_index=-100)
    target = torch.full((4, 4), 156).to(dtype)
    metrics.update(target, target)
    assert metrics.confusion[156, 156] == 16 and metrics.confusion.sum() == 16
    with pytest.raises(ValueError, match=r"target holds class 156; expected 0\.\.9 or -100"):
        SemanticMetrics(10, ignore_index=-100).update(target, target)
    with pytest.raises(TypeError, match="prediction must hold integers, got torch.uint64"):
        metrics.update(torch.zeros(4, 4, dtype=torch.uint64), target)


def test_wrong_arguments_are_named():
    classes = torch.zeros(4, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        SemanticMetrics(0)
    with pytest.raises(ValueError, match="ignore_index=3 is also one of the 5 classes"):
        SemanticMetrics(5, ignore_index=3)
    with pytest.raises(ValueError, match="boundary_share must lie between 0 and 1, got 2"):
        SemanticMetrics(5, boundary_share=2)
    with pytest.raises(TypeError, match="prediction must hold integers, got torch.float32"):
        SemanticMetrics(5).update(classes.float(), classes)
    with pytest.raises(ValueError, match="prediction has shape"):
        SemanticMetrics(5).update(classes[:2], classes)
    with pytest.raises(ValueError, match="target holds class 7; expected 0..4 or 255"):
        SemanticMetrics(5).update(classes, classes + 7)
    with pytest.raises(ValueError, match="cannot merge"):
        SemanticMetrics(5).merge(SemanticMetrics(6))
