"""The demo's pictures: what they show where, and odd inputs."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastmask.cli._pictures import CAPTION_HEIGHT, GUTTER, UNLABELLED, contact_sheet, plot_losses, side_by_side
from fastmask.data import CLASS_NAMES, PALETTE, ComposedScenes


def row_of(scene, semantic, panoptic, **options):
    return side_by_side(*scene, semantic, panoptic, CLASS_NAMES, PALETTE, **options)


def test_row_shows_each_class_in_its_colour():
    image = torch.full((3, 40, 60), 0.5)
    segments = torch.zeros(40, 60, dtype=torch.uint8)
    segments[:, 30:] = 1
    segments[:5] = 255
    labels = torch.tensor([1, 11])
    semantic = torch.where(segments == 1, 11, 1)
    panoptic = (torch.where(segments == 1, 7, 0), [{"id": 7, "category_id": 11}])
    row = np.asarray(row_of((image, segments, labels), semantic, panoptic, magnification=2, captions=False))
    assert row.shape == (80, 4 * 120 + 3 * GUTTER, 3)

    def colour(panel, y, x):
        return row[2 * y, panel * (120 + GUTTER) + 2 * x].astype(float)

    def same_hue(seen, expected):
        seen, expected = (np.array(c, float) / np.linalg.norm(c) for c in (seen, expected))
        return np.abs(seen - expected).max() < 0.02

    assert same_hue(colour(0, 20, 10), (1, 1, 1))
    assert same_hue(colour(1, 38, 3), PALETTE[1])
    assert same_hue(colour(1, 38, 57), PALETTE[11])
    assert same_hue(colour(1, 2, 10), UNLABELLED)
    assert same_hue(colour(2, 2, 10), PALETTE[1])
    assert same_hue(colour(2, 38, 57), PALETTE[11])
    assert same_hue(colour(3, 38, 3), UNLABELLED)
    assert same_hue(colour(3, 38, 57), PALETTE[11])
    assert (colour(1, 38, 30) == 255).all()


def test_instances_of_a_class_differ():
    segments = torch.zeros(40, 40, dtype=torch.uint8)
    segments[:, 20:] = 1
    scene = (torch.rand(3, 40, 40), segments, torch.tensor([4, 4]))
    row = np.asarray(row_of(scene, torch.full((40, 40), 4), (segments, []), captions=False), float)
    left, right = (row[2:8, 120 + GUTTER + x : 120 + GUTTER + x + 20].mean((0, 1)) for x in (5, 90))
    assert np.abs(left - right).max() > 15


@pytest.mark.parametrize("index", range(3))
def test_real_scenes_and_a_sheet(index):
    scene = ComposedScenes("val")[index]
    semantic = torch.from_numpy(np.append(scene.labels.numpy(), [0] * 256)[scene.segments.numpy()])
    infos = [{"id": m + 1, "category_id": int(label)} for m, label in enumerate(scene.labels)]
    row = row_of(scene, semantic, (scene.segments.int() + 1, infos))
    assert row.size == (4 * 384 + 3 * GUTTER, 384 + CAPTION_HEIGHT)
    sheet = contact_sheet([row, row], CLASS_NAMES, PALETTE, title="scenes")
    assert sheet.width > row.width
    assert sheet.height > 2 * row.height
    assert contact_sheet([row]).height < row.height + 100


def test_nothing_found_is_a_picture():
    scene = ComposedScenes("val", size=(32, 32))[0]
    row = row_of(scene, torch.full((32, 32), 255), (torch.zeros(32, 32, dtype=torch.int32), []))
    assert row.mode == "RGB"
    with pytest.raises(ValueError, match="rows is empty"):
        contact_sheet([])


@pytest.mark.parametrize("num_steps", [1, 2, 300])
def test_loss_curve(tmp_path, num_steps):
    history = [{"loss": 3.0 / step, "loss_ce": 1.0 / step, "loss_mask": 2.0 / step} for step in range(1, num_steps + 1)]
    plot_losses(history, tmp_path / "loss.png")
    with Image.open(tmp_path / "loss.png") as picture:
        assert picture.width > 1000
        assert len(np.unique(np.asarray(picture.convert("L")))) > 20


def test_loss_curve_needs_a_total(tmp_path):
    for history in ([], [{"loss_ce": 1.0}]):
        with pytest.raises(ValueError, match="history"):
            plot_losses(history, tmp_path / "loss.png")
    plot_losses([{"sum": 1.0}], tmp_path / "sum.png", total="sum")
    assert (tmp_path / "sum.png").exists()
