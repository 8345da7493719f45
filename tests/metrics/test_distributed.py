"""Metrics of two processes with uneven shares equal those of one with everything."""

from __future__ import annotations

import pickle

import pytest
import torch

from fastmask.data import open_dataset
from fastmask.metrics import InstanceMetrics, PanopticMetrics, SemanticMetrics, SoundEventMetrics
from fastmask.training.distributed import cleanup, setup
from tests.helpers.shared_batches import fork_together

pytest.importorskip("pycocotools")
NUM_IMAGES = 5


def metrics_of(indices):
    """All metrics over some scenes, with results that are partly wrong and depend on the scene alone."""
    scenes = open_dataset("composed:scenes", "val")
    garments = open_dataset("composed:scenes", "val", task="instance")
    every = [
        SemanticMetrics(scenes.info.num_classes),
        PanopticMetrics(scenes.info.num_classes, scenes.info.stuff_classes),
        SoundEventMetrics(3),
        InstanceMetrics(garments.info.num_classes),
    ]
    for i in indices:
        scene, garment = scenes[i], garments[i]
        moved = scene.segments.roll(4, 1)
        infos = [{"id": m + 1, "category_id": int(label)} for m, label in enumerate(scene.labels)]
        every[0].update(scene.class_map(0).roll(4, 1), scene.class_map())
        every[1].update((moved + 1, infos), scene.segments, scene.labels)
        every[2].update([{"label": i % 3, "onset": 0.1 * i, "offset": 1}], [{"label": i % 3, "onset": 0, "offset": 1}])
        scores = torch.linspace(0.9, 0.1, len(garment.labels))
        found = {"scores": scores, "labels": garment.labels, "masks": garment.masks.roll(2, 2)}
        every[3].update(garment.name, found, garment.masks, garment.labels)
    return every


def work(path):
    rank = setup("cpu").rank
    # One process has four images and the other one.
    metrics = metrics_of(range(1, NUM_IMAGES) if rank == 0 else [0])
    results = [one.synced().compute() for one in metrics]
    again = [one.synced().compute() for one in metrics]
    (path / f"{rank}.pickle").write_bytes(pickle.dumps((results, again)))
    cleanup()


def test_two_processes_equal_one(tmp_path):
    expected = [one.compute() for one in metrics_of(range(NUM_IMAGES))]
    fork_together(work, tmp_path)
    for rank in range(2):
        for results in pickle.loads((tmp_path / f"{rank}.pickle").read_bytes()):
            for numbers, alone in zip(results, expected, strict=True):
                assert numbers == pytest.approx(alone, nan_ok=True, rel=1e-12)
    assert 0 < expected[0]["mIoU"] < 1
    assert 0 < expected[3]["AP"] < 1
