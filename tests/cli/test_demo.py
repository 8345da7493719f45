from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from fastmask.cli import distorted_scenes, pretrain
from fastmask.cli.demo import app, race
from fastmask.cli.distorted_scenes import DistortedScenes
from fastmask.cli.pretrain import make_model
from fastmask.data import ComposedScenes, SceneDataset
from fastmask.data.composed.render import MIN_VISIBLE_PIXELS, VOID
from fastmask.models import MaskFormer
from fastmask.training import evaluate
from fastmask.training.benchmark import OWN, REFERENCE
from tests.helpers.browser import dom, needs_browser, screenshot


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory):
    """The folder and the output of a short demo."""
    folder = tmp_path_factory.mktemp("demo")
    options = ["--race-steps", "3", "--size", "64", "--val-scenes", "4", "--batch-size", "2", "--output", str(folder)]
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 0, result.output
    return folder, result.output


def test_the_demo_writes_what_it_says(shown):
    folder, output = shown
    assert {path.name for path in folder.iterdir()} == {"index.html", "scenes.png", "race.png"}
    for said in ("mIoU", "PQ", "4 held-out scenes", "3 training steps", OWN, REFERENCE, "index.html"):
        assert said in output


def test_the_page_needs_no_network(shown):
    text = (shown[0] / "index.html").read_text(encoding="utf-8")
    sources = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)|url\(([^)]*)\)|@import""", text)
    assert sources
    assert all((source or url).startswith(("data:", "${picture.src}")) for source, url in sources)


@needs_browser
@pytest.mark.slow
def test_a_browser_shows_the_page(shown, tmp_path):
    folder, _ = shown
    seen = dom(folder / "index.html")
    assert seen.count("<canvas") == 3 * 4  # truth, semantic and panoptic result of each scene
    assert "mIoU" in seen and REFERENCE in seen and "ankle boot" in seen
    screenshot(folder / "index.html", tmp_path / "page.png")
    pixels = np.asarray(Image.open(tmp_path / "page.png").convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 1000  # text alone has a few hundred colors at most


def test_both_sides_of_the_race_train_the_same_network():
    laps = race(ComposedScenes("train", 6, (64, 64)), 3, 2, seed=0)
    assert {len(run) for run in laps.values()} == {3}
    losses = {name: [lap.loss for lap in run] for name, run in laps.items()}
    # Later steps differ by more, since rounding may change a matching.
    assert losses[OWN][0] == pytest.approx(losses[REFERENCE][0], rel=1e-4)
    assert losses[OWN] == pytest.approx(losses[REFERENCE], rel=0.05)
    assert all(np.all(np.diff([lap.seconds for lap in run]) > 0) for run in laps.values())


def test_the_network_of_the_package_is_good_on_held_out_scenes():
    network = MaskFormer.from_pretrained(pretrain.MODEL)
    options = {"panoptic": {"threshold": pretrain.THRESHOLD}}
    numbers = evaluate(network, SceneDataset("val", 96), options=options, boundary_share=None).numbers
    assert numbers["mIoU"] > 0.62 and numbers["PQ"] > 0.64, numbers


def test_the_network_of_the_package_is_small_enough_to_ship():
    assert sum(path.stat().st_size for path in pretrain.MODEL.iterdir()) < 8e6


def test_distorted_scenes_keep_their_truth():
    scenes = ComposedScenes("train", 20)
    distorted = DistortedScenes(scenes, strength=1.0)
    torch.testing.assert_close(distorted.images[7] / 255, scenes[7].image, rtol=0, atol=0.5 / 255 + 1e-6)
    images, targets = distorted(3, 0, 40, 96)
    assert images.shape == (40, 3, 96, 96) and targets.segments.shape == (40, 96, 96)
    assert float(images.min()) >= 0 and float(images.max()) <= 1
    known = {label for i in range(20) for label in scenes[i].labels.tolist()}
    for segments, labels, count in zip(targets.segments, targets.labels, targets.counts.tolist(), strict=True):
        areas = segments.flatten().long().bincount(minlength=256)
        assert (areas[:count] >= MIN_VISIBLE_PIXELS).all()
        assert areas[count:VOID].sum() == 0
        assert set(labels[:count].tolist()) <= known


def test_a_scene_that_is_hardly_distorted_is_the_scene(monkeypatch):
    scenes = ComposedScenes("train", 1)
    monkeypatch.setattr(distorted_scenes, "ZOOMS", (0.0, 0.0))
    distorted = DistortedScenes(scenes, strength=0.0)
    images, targets = distorted(0, 0, 8, 128)
    scene = scenes[0]
    mirrored = 0
    for image, segments, count in zip(images, targets.segments, targets.counts.tolist(), strict=True):
        flip = bool((image[:, :, :8] - scene.image[:, :, :8]).abs().mean() > 0.01)
        mirrored += flip
        turned = scene.image.flip(-1) if flip else scene.image
        torch.testing.assert_close(image, turned, rtol=0, atol=0.01)
        assert torch.equal(segments, scene.segments.flip(-1) if flip else scene.segments)
        assert count == len(scene.labels)
    assert 0 < mirrored < 8


def test_batches_depend_on_their_number_alone():
    scenes = ComposedScenes("train", 5)
    images, _ = DistortedScenes(scenes, 1.0)(3, 5, 2, 64)
    again = DistortedScenes(scenes, 1.0)
    again(3, 4, 2, 64)
    torch.testing.assert_close(images, again(3, 5, 2, 64)[0], rtol=0, atol=0)
    other, _ = again(3, 6, 2, 64)
    assert not torch.equal(images, other)


def pretraining(tmp_path, name):
    """A short run of the training script, into a folder of its own."""
    command = typer.Typer()
    command.command()(pretrain.main)
    options = {"scenes": 8, "naming-steps": 2, "steps": 3, "naming-batch": 2, "batch-size": 2, "every": 1}
    options |= {"val-scenes": 2, "precision": "float32"}
    options |= {"output": tmp_path / name, "folder": tmp_path / f"{name}-checkpoints"}
    return CliRunner().invoke(command, [text for key, value in options.items() for text in (f"--{key}", str(value))])


@pytest.mark.slow
def test_pretraining_resumes_where_it_was_interrupted(tmp_path, monkeypatch):
    whole = pretraining(tmp_path, "whole")
    assert whole.exit_code == 0, whole.output
    measure = evaluate
    calls = []

    def interrupted(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*arguments, **options)

    monkeypatch.setattr(pretrain, "evaluate", interrupted)
    assert pretraining(tmp_path, "parts").exit_code != 0
    assert not (tmp_path / "parts").exists()
    resumed = pretraining(tmp_path, "parts")
    assert resumed.exit_code == 0, resumed.output
    assert len(calls) == 4  # the second step's is interrupted; then the third step's, and that of the saved network
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_pretraining_writes_a_network_of_the_packages_kind(tmp_path):
    assert pretraining(tmp_path, "model").exit_code == 0
    own, shipped = (load_file(folder / "model.safetensors") for folder in (tmp_path / "model", pretrain.MODEL))
    assert {name: (value.dtype, value.shape) for name, value in own.items()} == {
        name: (value.dtype, value.shape) for name, value in shipped.items()
    }
    assert MaskFormer.from_pretrained(pretrain.MODEL).config == make_model().config
