from __future__ import annotations

import typer
from safetensors.torch import load_file
from typer.testing import CliRunner

from fastmask.cli import pretrain
from fastmask.cli.demo import app, make_model


def test_demo_writes_what_it_says(tmp_path):
    options = ["--steps", "3", "--size", "64", "--val-scenes", "4", "--batch-size", "2", "--output", tmp_path]
    result = CliRunner().invoke(app, [str(option) for option in options])
    assert result.exit_code == 0, result.output
    assert {path.name for path in tmp_path.iterdir()} == {"scenes.png", "loss.png", "model"}
    for said in ("mIoU", "PQ", "PyTorch reference", "peak extra memory", "largest difference"):
        assert said in result.output


def test_pretraining_writes_weights_of_the_demos_backbone(tmp_path):
    app = typer.Typer()
    app.command()(pretrain.main)
    path = tmp_path / "weights.safetensors"
    result = CliRunner().invoke(app, ["--steps", "3", "--batch-size", "4", "--output", str(path)])
    assert result.exit_code == 0, result.output
    weights, shipped = load_file(path), load_file(pretrain.WEIGHTS)
    assert {name: value.dtype for name, value in weights.items()} == {
        name: value.dtype for name, value in shipped.items()
    }
    make_model().backbone.load_state_dict(weights)
