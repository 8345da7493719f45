from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from fastmask.cli._evaluation import evaluate
from fastmask.cli.demo import app
from fastmask.data import CLASS_NAMES, STUFF_LABELS, ComposedScenes, collate_scenes


@pytest.fixture(scope="module")
def targets():
    scenes = ComposedScenes("val", size=(64, 64))
    return collate_scenes([scenes[i] for i in range(6)])[1]


def perfect_results(targets):
    """What a model would return that knows the truth."""
    semantic, panoptic = [], []
    for segments, labels in zip(targets.segments.long(), targets.labels, strict=True):
        inside = segments < len(labels)
        index = torch.where(inside, segments, 0)
        semantic.append(torch.where(inside, labels[index], 0))
        infos = [{"id": m + 1, "category_id": int(label)} for m, label in enumerate(labels) if label >= 0]
        panoptic.append((torch.where(inside, segments + 1, 0), infos))
    return semantic, panoptic


class KnowsTheTruth:
    """A model that gives the results it was made with."""

    def __init__(self, semantic, panoptic):
        self.config = SimpleNamespace(num_classes=len(CLASS_NAMES), stuff_classes=STUFF_LABELS)
        self.results = {"semantic": semantic, "panoptic": panoptic}

    def predict(self, images, task="semantic", threshold=None):
        return self.results[task]


def scores(semantic, panoptic, targets):
    return evaluate(KnowsTheTruth(semantic, panoptic), [(None, targets)], threshold=0.5)


def test_perfect_results_score_one(targets):
    assert scores(*perfect_results(targets), targets) == pytest.approx({"mIoU": 1, "PQ": 1, "SQ": 1, "RQ": 1})


def test_finding_nothing_scores_zero(targets):
    semantic, panoptic = perfect_results(targets)
    assert scores(semantic, [(torch.zeros_like(ids), []) for ids, _ in panoptic], targets)["PQ"] == 0


def test_a_missed_segment_counts(targets):
    semantic, panoptic = perfect_results(targets)
    classes = targets.labels[targets.labels >= 0]
    missed = int(classes[0])
    share = 1 - 1 / int((classes == missed).sum())
    ids, infos = panoptic[0]
    panoptic[0] = (torch.where(ids == 1, 0, ids), infos[1:])
    recognition = share / (share + (1 - share) / 2)
    kinds = len(classes.unique())
    assert scores(semantic, panoptic, targets)["PQ"] == pytest.approx((kinds - 1 + recognition) / kinds)


def test_demo_writes_what_it_says(tmp_path):
    options = ["--minutes", "0.03", "--size", "64", "--val-scenes", "4", "--batch-size", "2", "--output", tmp_path]
    result = CliRunner().invoke(app, [str(option) for option in options])
    assert result.exit_code == 0, result.output
    assert {path.name for path in tmp_path.iterdir()} == {"scenes.png", "loss.png", "model"}
    for said in ("mIoU", "PQ", "PyTorch reference", "peak extra memory", "largest difference"):
        assert said in result.output
