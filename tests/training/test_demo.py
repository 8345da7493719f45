from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from fastmask.cli._losses import plot_losses
from fastmask.cli.demo import app


def test_demo_writes_what_it_says(tmp_path):
    options = ["--minutes", "0.03", "--size", "64", "--val-scenes", "4", "--batch-size", "2", "--output", tmp_path]
    result = CliRunner().invoke(app, [str(option) for option in options])
    assert result.exit_code == 0, result.output
    assert {path.name for path in tmp_path.iterdir()} == {"scenes.png", "loss.png", "model"}
    for said in ("mIoU", "PQ", "PyTorch reference", "peak extra memory", "largest difference"):
        assert said in result.output


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
