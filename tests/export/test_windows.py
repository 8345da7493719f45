"""Programs of a Segmenter predict in windows as ``predict`` does, or say that they do not."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from typer.testing import CliRunner

from fastmask.cli.main import app
from fastmask.export import export_onnx, export_program, export_pt2
from tests.helpers.exporting import (
    SIZE,
    assert_same_labels,
    assert_same_scores,
    maskformer,
    per_pixel,
    predicted_scores,
    segmenter,
    session,
)

OWN = json.dumps([64, 48])  # of the tiny Segmenter


@pytest.mark.parametrize(
    ("size", "window"),
    [
        pytest.param(SIZE, None, marks=pytest.mark.slow),  # enlarged, as a side is smaller than a window
        # Overlaps of many kinds; windows that are no multiple of a patch.
        pytest.param((70, 150), (40, 30), marks=pytest.mark.slow),
        pytest.param((64, 128), 64, marks=pytest.mark.slow),  # side by side
        pytest.param((64, 64), (64, 10), marks=pytest.mark.slow),  # one window
        pytest.param((41, 70), (41, 9), marks=pytest.mark.slow),  # up to five on a pixel
        (SIZE, 0),
    ],
)
def test_labels_and_scores_are_those_of_predict(size, window):
    model = segmenter(image_size=(32, 32))
    images = torch.rand(2, 3, *size)
    any_number = None if window is None else 2
    labels = export_program(model, size=size, window=window, batch_size=any_number).module()(images)["labels"]
    assert_same_labels(labels, model, images, window=window)
    options = {"task": "scores", "batch_size": 2, "output_size": (33, 90)}
    scores = export_program(model, size=size, window=window, **options).module()(images)["scores"]
    assert_same_scores(scores, predicted_scores(model, images, (33, 90), window=window))


@pytest.mark.slow
def test_an_onnx_file_has_windows_for_any_number_of_images(tmp_path):
    onnx = pytest.importorskip("onnx")
    model = segmenter()
    path = export_onnx(model, tmp_path / "model.onnx", size=(70, 100))
    opened = session(path)
    for batch_size in (1, 3):
        images = torch.rand(batch_size, 3, 70, 100)
        (labels,) = opened.run(["labels"], {"images": images.numpy()})
        assert_same_labels(torch.from_numpy(labels), model, images)
        whole = torch.stack(model.predict(images, window=0))
        assert float((torch.from_numpy(labels) != whole).float().mean()) > 0.05  # the windows matter
    proto = onnx.load(str(path))
    assert {entry.key: entry.value for entry in proto.metadata_props}["window"] == OWN
    assert {node.domain for node in proto.graph.node} <= {""}


@pytest.mark.slow
def test_images_of_any_size_are_predicted_whole_which_is_said(tmp_path, monkeypatch):
    model = segmenter()
    images = torch.rand(1, 3, *SIZE)
    with pytest.warns(
        UserWarning, match=r"whole images, but predict uses windows of 64 pixels, so labels differ.*size="
    ) as said:
        path = export_pt2(model, tmp_path / "model.pt2")
    assert len(said) == 1
    program = torch.export.load(path, extra_files=(extra := {"fastmask.json": ""}))
    assert_same_labels(program.module()(images)["labels"], model, images, window=0)
    assert "window" not in json.loads(extra["fastmask.json"])
    for step in ("_trace", "_check_other_sizes"):  # what takes its time, and comes after the warning
        monkeypatch.setattr(f"fastmask.export.program.{step}", lambda *_: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        export_program(model, window=0)
        export_program(model, task="logits")
        export_program(segmenter(window_size=0), batch_size=1)


@pytest.mark.slow
def test_the_command_says_what_it_exports(tmp_path):
    segmenter().save_pretrained(tmp_path / "saved")
    maskformer(backbone="tiny").save_pretrained(tmp_path / "masks")

    def said(model, *options):
        arguments = ["export", str(tmp_path / model), str(tmp_path / "model.pt2"), "--overwrite", *options]
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert result.exit_code == 0
        extra = {"fastmask.json": ""}
        torch.export.load(tmp_path / "model.pt2", extra_files=extra)
        return result.output, json.loads(extra["fastmask.json"]).get("window")

    size = ["--size", "70", "100", "--batch", "1"]
    output, window = said("saved", *size)
    assert "predicts in windows of 64 pixels, every 48" in output and window == OWN
    output, window = said("saved", *size, "--window", "40", "--stride", "30")
    assert "predicts in windows of 40 pixels, every 30" in output and window == "[40, 30]"
    output, window = said("saved", *size, "--window", "0")
    assert "predicts images whole" in output and window is None
    with pytest.warns(UserWarning, match="labels differ"):
        output, window = said("saved", "--batch", "1")
    assert "predicts images whole" in output and window is None
    assert "predicts" not in said("masks", *size)[0]


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (segmenter, {"window": 64}, ValueError, "window=64 goes with a size of the images"),
        (segmenter, {"window": (64, 65), "size": SIZE}, ValueError, r"window_stride is 65; expected in 1\.\.64"),
        (segmenter, {"window": "64", "size": SIZE}, TypeError, "window must be a size or"),
        (segmenter, {"window": 64, "size": SIZE, "task": "logits"}, ValueError, "got 64 for 'logits' of a Segmenter"),
        (per_pixel, {"window": 64, "size": SIZE}, ValueError, "got 64 for 'semantic' of a PerPixelBaseline"),
        (
            maskformer,
            {"window": 0},
            ValueError,
            "labels and scores of a Segmenter; got 0 for 'semantic' of a MaskFormer",
        ),
    ],
)
def test_windows_that_do_not_fit_are_named(make, options, error, message):
    with pytest.raises(error, match=message):
        export_program(make(), **options)
