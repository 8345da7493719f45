"""The command ``fastmask``."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from fastmask import MaskFormer, PerPixelBaseline, PerPixelBaselineConfig, Segmenter, SegmenterConfig
from fastmask.cli.main import app

RUNNER = CliRunner()
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "layer_type": "basic"}


def save_model(folder):
    torch.manual_seed(0)
    model = MaskFormer(
        num_classes=3, backbone="resnet", backbone_options=RESNET, num_queries=4, hidden_dim=32, mask_dim=16,
        pixel_decoder_dim=32, decoder_layers=1, class_names=("wall", "sky", "cat"),
    )  # fmt: skip
    model.save_pretrained(folder)
    return model


def test_info():
    result = RUNNER.invoke(app, ["info"])
    assert result.exit_code == 0 and "mask_cost" in result.output


@pytest.mark.parametrize("to", ["huggingface", "original"])
def test_convert_there_and_back(to, tmp_path):
    model = save_model(tmp_path / "model")
    between = tmp_path / ("weights.pth" if to == "original" else "between")
    for arguments in (
        [str(tmp_path / "model"), str(between), "--to", to],
        [str(between), str(tmp_path / "again")],
    ):
        result = RUNNER.invoke(app, ["convert", *arguments])
        assert result.exit_code == 0, result.output
        assert "3 classes" in result.output
    again = MaskFormer.from_pretrained(tmp_path / "again")
    for name, value in model.weights().items():
        if "num_batches_tracked" not in name:
            assert torch.equal(again.weights()[name], value), name
    if to == "huggingface":
        assert again.config.class_names == ("wall", "sky", "cat")
        assert json.loads((between / "config.json").read_text())["model_type"] == "maskformer"


def test_convert_a_segmenter_there_and_back(tmp_path):
    config = SegmenterConfig.preset("seg-tiny-mask-16", 3, encoder_layers=1, image_size=(32, 32))
    model = Segmenter(config)
    model.save_pretrained(tmp_path / "model")
    for arguments in (
        [str(tmp_path / "model"), str(tmp_path / "between"), "--to", "original"],
        [str(tmp_path / "between"), str(tmp_path / "again")],
        [str(tmp_path / "between" / "checkpoint.pth"), str(tmp_path / "once more")],
    ):
        result = RUNNER.invoke(app, ["convert", *arguments])
        assert result.exit_code == 0, result.output
        assert "Segmenter with" in result.output and "3 classes" in result.output
    for folder in ("again", "once more"):
        again = Segmenter.from_pretrained(tmp_path / folder)
        assert again.config == config
        for name, value in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], value), name
    arguments = ["convert", str(tmp_path / "between"), str(tmp_path / "new"), "--num-classes", "5"]
    assert isinstance(RUNNER.invoke(app, arguments).exception, ValueError)
    with pytest.warns(UserWarning, match="started at random"):
        assert RUNNER.invoke(app, [*arguments, "--ignore-mismatched-sizes"]).exit_code == 0
    assert Segmenter.from_pretrained(tmp_path / "new").config.num_classes == 5
    for options, message in {
        ("--to", "huggingface"): "the format huggingface has no Segmenter",
        ("--num-queries", "5"): "num_queries cannot change",
    }.items():
        result = RUNNER.invoke(app, ["convert", str(tmp_path / "between"), str(tmp_path / "out"), *options])
        assert message in str(result.exception)


def test_formats_without_a_model_say_so(tmp_path):
    config = PerPixelBaselineConfig.preset("tiny", 3)
    PerPixelBaseline(config).save_pretrained(tmp_path / "model")
    assert RUNNER.invoke(app, ["convert", str(tmp_path / "model"), str(tmp_path / "copy")]).exit_code == 0
    assert PerPixelBaseline.from_pretrained(tmp_path / "copy").config == config
    result = RUNNER.invoke(app, ["convert", str(tmp_path / "model"), str(tmp_path / "out"), "--to", "original"])
    assert "the format original has no PerPixelBaseline" in str(result.exception)


def test_convert_to_other_numbers(tmp_path):
    save_model(tmp_path / "model")
    RUNNER.invoke(app, ["convert", str(tmp_path / "model"), str(tmp_path / "w.pth"), "--to", "original"])
    arguments = ["convert", str(tmp_path / "w.pth"), str(tmp_path / "new"), "--num-queries", "6", "--num-classes", "9"]
    assert isinstance(RUNNER.invoke(app, arguments).exception, ValueError)
    with pytest.warns(UserWarning, match="started at random"):
        assert RUNNER.invoke(app, [*arguments, "--ignore-mismatched-sizes"]).exit_code == 0
    config = MaskFormer.from_pretrained(tmp_path / "new").config
    assert (config.num_queries, config.num_classes) == (6, 9)


def test_errors_are_one_line(tmp_path):
    save_model(tmp_path / "model")
    (tmp_path / "empty").mkdir()
    cases = {
        ("absent", "out"): "no folder or file",
        ("model", "model"): "exists already",
        ("empty", "out"): "holds nothing; expected config.json and model.safetensors",
        ("model", "out", "--to", "onnx"): "to must be one of",
    }
    for (source, destination, *options), message in cases.items():
        arguments = ["convert", str(tmp_path / source), str(tmp_path / destination), *options]
        assert message in str(RUNNER.invoke(app, arguments).exception)
    command = [sys.executable, "-m", "fastmask.cli.main", "convert", str(tmp_path / "absent"), str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1 and result.stderr.splitlines() == [
        f"fastmask: no folder or file {tmp_path / 'absent'}"
    ]
