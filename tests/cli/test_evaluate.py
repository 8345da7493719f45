"""``fastmask evaluate``."""

from __future__ import annotations

import json
from contextlib import redirect_stdout

import pytest
import torch
from typer.testing import CliRunner

from fastmask.cli._tables import aligned, percent
from fastmask.cli.main import app
from fastmask.data import open_dataset
from fastmask.models import make_model
from fastmask.training import evaluate
from tests.data.test_check import edit
from tests.helpers.browser import titles
from tests.helpers.dataset_trees import folder_tree, instance_tree, panoptic_tree
from tests.helpers.shared_batches import fork_together

RUNNER = CliRunner()


def invoke(*arguments):
    result = RUNNER.invoke(app, ["evaluate", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data set, and a run of training on it whose best model is not its last."""
    root = tmp_path_factory.mktemp("evaluate")
    folder_tree(root / "data")
    for name, seed in (("model", 0), ("best", 1)):
        torch.manual_seed(seed)
        make_model("tiny", class_names=["sky", "road", "car"]).save_pretrained(root / "run" / name)
    (root / "run" / "config.json").write_text('{"recipe": {}}')
    return root


def test_prints_and_writes_what_evaluate_finds(folder, tmp_path):
    output = invoke(
        folder / "run",
        "--data",
        folder / "data",
        "--split",
        "train",
        "--per-class",
        "--json",
        tmp_path / "a" / "b.json",
    )
    torch.manual_seed(1)
    expected = evaluate(make_model("tiny", 3), open_dataset(folder / "data", "train"))
    content = json.loads((tmp_path / "a" / "b.json").read_text())
    assert content["model"].endswith("best") and content["num_samples"] == 2 and content["split"] == "train"
    assert {key: content[key] for key in expected.to_dict()} == expected.to_dict()
    lines = [line.split() for line in output.splitlines()]
    assert ["mIoU", "fwIoU", "pixel", "accuracy", "mean", "accuracy", "boundary", "IoU"] in lines
    numbers = ("mIoU", "fwIoU", "pixel_accuracy", "mean_accuracy", "boundary_IoU")
    assert ["semantic", *(f"{100 * expected.numbers[name]:.2f}" for name in numbers)] in lines
    rows = zip(*(expected.per_class[name] for name in ("IoU", "accuracy", "boundary_IoU")), strict=True)
    for name, row in zip(("sky", "road", "car"), rows, strict=True):
        assert [name, *map(percent, row)] in lines
    assert "MaskFormer of" in output and "2 images" in output


def test_a_class_that_is_not_in_the_truth_stands_beside_the_numbers(folder, tmp_path):
    """A perfect score of masks stored as 0 and 255 says nothing about the foreground."""
    folder_tree(tmp_path / "data", values=([0, 11], [0]))
    output = invoke(folder / "run", "--data", tmp_path / "data", "--split", "train", "--json", tmp_path / "x.json")
    assert "not in the truth, 2 of 3 classes: road, car" in output
    assert json.loads((tmp_path / "x.json").read_text())["absent_classes"] == ["road", "car"]
    assert "not in the truth" not in invoke(folder / "run", "--data", folder / "data", "--split", "train")


def test_invalid_polygons_are_skipped_on_request(tmp_path):
    pytest.importorskip("pycocotools")
    root = instance_tree(tmp_path / "coco")
    edit(
        root / "annotations/instances_train2017.json",
        lambda c: c["annotations"][0].update(segmentation=[[1, 2, 3, 4]]),
    )
    torch.manual_seed(0)
    make_model("tiny", class_names=("person", "car")).save_pretrained(tmp_path / "model")
    arguments = [tmp_path / "model", "--data", root, "--split", "train"]
    with pytest.raises(ValueError, match="at least three points"):
        invoke(*arguments)
    with pytest.warns(UserWarning, match="invalid polygons that are skipped: 1; .* left out: 1"):
        assert "AP50" in invoke(*arguments, "--skip-invalid")


def test_options_reach_the_evaluation(folder, tmp_path):
    options = ["--short-side", 40, "--max-side", 64, "--task", "general", "--no-boundary", "--batch-size", 1]
    where = [folder / "run" / "best", "--data", folder / "data", "--split", "train", "--json", tmp_path / "x.json"]
    invoke(*where, *options, "--precision", "bfloat16", "--device", "cpu")
    content = json.loads((tmp_path / "x.json").read_text())
    assert content["tasks"] == ["general"] and "general_boundary_IoU" not in content["numbers"]
    invoke(*where, "--window", 16, "--stride", 12, "--scales", "0.5,1", "--flip")
    views = {"window": (16, 12), "scales": (0.5, 1.0), "flip": True}
    torch.manual_seed(1)
    expected = evaluate(make_model("tiny", 3), open_dataset(folder / "data", "train"), **views)
    assert json.loads((tmp_path / "x.json").read_text())["numbers"] == expected.to_dict()["numbers"]


@pytest.mark.parametrize("name", ["tiny", "mask2former-tiny", "eomt-tiny"])
def test_panoptic_and_instances(name, tmp_path):
    pytest.importorskip("pycocotools")
    torch.manual_seed(0)
    panoptic_tree(tmp_path / "coco")
    coco = open_dataset(tmp_path / "coco", "val")
    make_model(name, class_names=coco.info.class_names, stuff_classes=coco.info.stuff_classes).save_pretrained(
        tmp_path / "model"
    )
    where = ["--data", tmp_path / "coco", "--json", tmp_path / "x.json"]
    output = invoke(tmp_path / "model", *where, "--threshold", 0.05, "--overlap-threshold", 0.5)
    content = json.loads((tmp_path / "x.json").read_text())
    assert content["tasks"] == ["semantic", "panoptic"]
    lines = [line.split() for line in output.splitlines()]
    assert ["panoptic", "PQ", "SQ", "RQ"] in lines and any(line[:1] == ["things"] for line in lines)
    # Things alone are too few classes for this model, so that it is compared with the things of the panoptic truth.
    output = invoke(tmp_path / "model", *where, "--task", "instance")
    assert "AP50" in output and "AR 100" in output


def test_a_page_of_the_worst_images(folder, tmp_path):
    arguments = [folder / "run", "--data", folder / "data", "--split", "train", "--html", tmp_path / "page.html"]
    invoke(*arguments, "--html-images", 1)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert len(titles(text)) == 1 and "the 1 worst of 2" in text
    assert "Sorted by mIoU" in text and "boundary IoU" in text
    assert f"<h1>MaskFormer of {folder}/run/best on {folder}/data (train)</h1>" in text
    invoke(*arguments, "--task", "general")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert len(titles(text)) == 2 and "Sorted by general mIoU" in text


def test_a_run_is_evaluated_for_its_own_task(tmp_path):
    torch.manual_seed(0)
    panoptic_tree(tmp_path / "coco")
    names = open_dataset(tmp_path / "coco", "val").info.class_names
    make_model("tiny", class_names=names).save_pretrained(tmp_path / "run" / "model")
    (tmp_path / "run" / "config.json").write_text('{"task": "semantic"}')
    output = invoke(tmp_path / "run", "--data", tmp_path / "coco")
    assert "mIoU" in output and "PQ" not in output
    assert "PQ" in invoke(tmp_path / "run" / "model", "--data", tmp_path / "coco")


def test_instance_truth_of_its_own(tmp_path):
    pytest.importorskip("pycocotools")
    instance_tree(tmp_path / "coco")
    info = open_dataset(tmp_path / "coco", "train").info
    torch.manual_seed(0)
    make_model("tiny", class_names=info.class_names).save_pretrained(tmp_path / "model")
    assert "AP50" in invoke(tmp_path / "model", "--data", tmp_path / "coco", "--split", "train")


def test_errors_are_one_line(folder):
    cases = {
        (folder / "absent", "--data", folder / "data"): "no folder",
        (folder / "run", "--data", folder / "nothing"): "is not a folder",
        (folder / "run", "--data", folder / "data"): "split",
        (folder / "run", "--data", "composed:scenes"): "the model has 3 classes, the data set 13",
        (folder / "run", "--data", folder / "data", "--split", "train", "--task", "panoptic"): "panoptic",
        (folder / "run", "--data", folder / "data", "--split", "train", "--stride", 3): "--stride goes with --window",
        (folder / "run", "--data", folder / "data", "--split", "train", "--scales", "a"): "--scales is 'a'",
    }
    for arguments, message in cases.items():
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            invoke(*arguments)


def command(arguments, path):
    """What the command prints is added to a file."""
    with path.open("a") as file, redirect_stdout(file):
        app(arguments, standalone_mode=False)


def test_two_processes_print_once(folder, tmp_path):
    arguments = ["evaluate", folder / "run", "--data", folder / "data", "--split", "train", "--device", "cpu"]
    fork_together(command, [*map(str, arguments), "--json", str(tmp_path / "x.json")], tmp_path / "said")
    assert (tmp_path / "said").read_text().count("MaskFormer of") == 1
    torch.manual_seed(1)
    expected = evaluate(make_model("tiny", 3), open_dataset(folder / "data", "train"))
    assert json.loads((tmp_path / "x.json").read_text())["numbers"] == pytest.approx(expected.numbers)


def test_columns_are_aligned():
    assert aligned([["", "b"], ["name", "12.5"], ["x", ""]]) == "         b\nname  12.5\nx"
    assert percent(0.12345) == "12.35" and percent(float("nan")) == "-"
