"""Pictures of segmentations: what they show where, and odd inputs."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastmask.data import CLASS_NAMES, PALETTE, ComposedScenes
from fastmask.data.palette import distinct_colors
from fastmask.prediction import SegmentMap, contact_sheet, draw_legend, draw_overlay, draw_segments, side_by_side
from fastmask.prediction.overlay import OPACITY, OUTLINE, PAPER
from fastmask.prediction.sheets import CAPTION_HEIGHT, GUTTER


def row_of(scene, semantic, panoptic, **options):
    return side_by_side(*scene, semantic, panoptic, CLASS_NAMES, PALETTE, **options)


def test_row_shows_each_class_in_its_color_over_the_picture():
    image = torch.full((3, 40, 60), 0.5)
    segments = torch.zeros(40, 60, dtype=torch.uint8)
    segments[:, 30:] = 1
    segments[:5] = 255
    labels = torch.tensor([1, 11])
    semantic = torch.where(segments == 1, 11, 1)
    panoptic = (torch.where(segments == 1, 7, 0), [{"id": 7, "category_id": 11}])
    row = np.asarray(row_of((image, segments, labels), semantic, panoptic, magnification=2, captions=False))
    assert row.shape == (80, 4 * 120 + 3 * GUTTER, 3)

    def color(panel, y, x):
        return row[2 * y, panel * (120 + GUTTER) + 2 * x].astype(float)

    def shows(panel, y, x, label=None):
        expected = 128 if label is None else (1 - OPACITY) * 128 + OPACITY * np.array(PALETTE[label])
        return np.abs(color(panel, y, x) - expected).max() < 1.5

    assert shows(0, 20, 10)
    assert shows(1, 38, 3, 1)
    assert shows(1, 38, 57, 11)
    assert shows(1, 2, 10)
    assert shows(2, 2, 10, 1)
    assert shows(2, 38, 57, 11)
    assert shows(3, 38, 3)
    assert shows(3, 38, 57, 11)
    assert (color(1, 38, 30) == OUTLINE).all()


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


def photograph(width, height, value=128):
    return Image.new("RGB", (width, height), (value, value, value))


@pytest.mark.parametrize(
    ("size", "drawn"),
    [
        ((128, 128), (896, 896)),
        ((800, 600), (800, 600)),
        ((1600, 900), (1600, 900)),
        ((4000, 3000), (1600, 1200)),
        ((1, 1), (800, 800)),
        ((1, 500), (2, 1000)),
        ((20_000, 1), (1600, 1)),
    ],
)
def test_overlays_are_of_a_size_for_the_eye(size, drawn):
    width, height = size
    labels = np.zeros((height, width), np.uint8)
    labels[:, width // 2 :] = 2
    picture = draw_overlay(photograph(*size), SegmentMap.of_labels(labels, 3), ["a", "b", "c"], PALETTE)
    assert picture.width == max(drawn[0], 400)
    assert drawn[1] < picture.height < drawn[1] + 100
    bare = draw_overlay(photograph(*size), SegmentMap(labels, {}), [], [])
    assert bare.size == drawn, "without a segment there is no legend"


def test_legend_lists_what_occurs_by_area():
    """The chips of the legend, from the left: the class with most pixels first, absent ones not at all."""
    labels = np.full((600, 800), 255, np.uint8)
    labels[:100] = 3
    labels[100:500] = 7
    names = [f"class {k}" for k in range(13)]
    picture = draw_overlay(photograph(800, 600), SegmentMap.of_labels(labels, 13), names, PALETTE)
    strip = np.asarray(picture)[600:].reshape(-1, 3)
    counts = {label: int((strip == PALETTE[label]).all(1).sum()) for label in range(13)}
    assert [label for label in range(13) if counts[label] > 50] == [3, 7]
    columns = [(np.asarray(picture)[600:] == PALETTE[label]).all(2).any(0).argmax() for label in (7, 3)]
    assert columns == sorted(columns)


def test_legend_wraps():
    names = [f"a rather long name {k}" for k in range(40)]
    legend = draw_legend(500, names, distinct_colors(40))
    assert legend.width == 500 and legend.height > 10 * 28
    assert draw_legend(50, names[:1], distinct_colors(1)).width > 100, "a name that is longer than a line stays whole"
    for color in distinct_colors(40):
        assert (np.asarray(legend) == color).all(2).sum() > 100


def test_names_stand_in_their_regions():
    """Large regions are named, each of a class's apart, and small ones are not."""
    labels = np.zeros((600, 800), np.uint8)
    labels[:, 390:410] = 1
    labels[:5, :5] = 2
    photo = photograph(800, 600)
    named = np.asarray(draw_segments(photo, SegmentMap.of_labels(labels, 3), ["left", "mid", "tiny"], PALETTE))
    bare = np.asarray(draw_segments(photo, SegmentMap.of_labels(labels, 3), ["", "", ""], PALETTE))
    assert named.shape == bare.shape == (600, 800, 3)
    written = (named != bare).any(2)
    assert written[:, :390].any() and written[:, 410:].any()
    assert not written[:50].any()


def test_sparse_and_unknown_ids():
    """Ids may be any integers; those that no segment has are unlabeled."""
    ids = np.array([[7, 7, 1_000_000, 1_000_000, -1, 0]] * 6, np.int64)
    segments = SegmentMap(ids, {1_000_000: 4, 7: 2})
    assert segments.indices()[0].tolist() == [1, 1, 0, 0, 2, 2]
    assert SegmentMap(ids, {}).indices().tolist() == np.zeros((6, 6)).tolist()
    assert segments.resized((3, 2)).ids.tolist() == [[7, 1_000_000, 0]] * 2


def test_an_empty_legend_and_long_names():
    labels = np.zeros((100, 100), np.uint8)
    name = "a name that is longer than the whole picture is wide, by far" * 3
    picture = draw_overlay(photograph(100, 100), SegmentMap.of_labels(labels, 1), [name], PALETTE)
    assert picture.width > 800 and picture.getpixel((picture.width - 1, 0)) == PAPER
