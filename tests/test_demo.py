from __future__ import annotations

from typer.testing import CliRunner

from fastmask.cli.demo import app


def test_demo_writes_what_it_says(tmp_path):
    options = ["--minutes", "0.03", "--size", "64", "--val-scenes", "4", "--batch-size", "2", "--output", tmp_path]
    result = CliRunner().invoke(app, [str(option) for option in options])
    assert result.exit_code == 0, result.output
    assert {path.name for path in tmp_path.iterdir()} == {"scenes.png", "loss.png", "model"}
    for said in ("mIoU", "PQ", "PyTorch reference", "peak extra memory", "largest difference"):
        assert said in result.output
