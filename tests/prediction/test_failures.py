"""``fastmask predict`` where something goes wrong: broken images, files in the way, interruptions; and the command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from fastmask import MaskFormer, MaskFormerConfig
from fastmask.cli.main import app, main
from fastmask.models import make_model
from fastmask.prediction import outputs, predict, predict_images
from tests.helpers.browser import titles

COMMAND = [sys.executable, "-m", "fastmask.cli.main", "predict"]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return MaskFormer(MaskFormerConfig.preset("tiny", 3, class_names=("cat", "dog", "sky"), stuff_classes=(2,)))


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model"
    model.save_pretrained(path)
    return path


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    for name in "abcde":
        write_photo(tmp_path / "photos" / f"{name}.jpg", rng)
    return tmp_path / "photos"


def write_photo(path, rng):
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (40, 50, 3)).astype(np.uint8)).save(path)


def exit_code(monkeypatch, *arguments):
    """Of ``fastmask predict``."""
    monkeypatch.setattr(sys, "argv", ["fastmask", "predict", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code


def files_below(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def assert_whole(out, names, task="panoptic"):
    """Every picture of these images, no other, each readable; and a list of them; nothing temporary."""
    folders = outputs.FOLDERS[task]
    expected = {f"{folder}/{name}.png" for folder in folders for name in names}
    assert files_below(out) == {*expected, *(outputs.FILES[task] if names else ())}
    for name in expected:
        with Image.open(out / name) as image:
            image.load()
    if task == "panoptic" and names:
        content = json.loads((out / "panoptic.json").read_text())
        assert [image["file_name"][0] for image in content["images"]] == list(names)
        assert [annotation["file_name"][0] for annotation in content["annotations"]] == list(names)


def test_the_command(folder, photos, tmp_path):
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["predict", str(folder), str(photos), "-o", str(out)])
    assert result.exit_code == 0, result.output
    assert result.output.startswith("panoptic: 5 images in ") and f"a second): {out}/panoptic, " in result.output
    assert_whole(out, "abcde")
    one = ["predict", str(folder), str(photos / "a.jpg"), "-o", str(tmp_path / "one"), "--task", "semantic"]
    views = ["--window", "32", "--stride", "16", "--scales", "1,1.5", "--flip", "--precision", "bfloat16"]
    page = ["--html", str(tmp_path / "one" / "index.html"), "--html-images", "1"]
    result = CliRunner().invoke(app, [*one, *views, *page, "--no-overlays", "--batch-size", "2", "--workers", "2"])
    assert result.exit_code == 0, result.output
    assert "1 image in" in result.output and "index.html" in result.output
    assert files_below(tmp_path / "one") == {"labels/a.png", "classes.json", "index.html"}
    for options in (["--stride", "3"], ["--scales", "1,x"]):
        result = CliRunner().invoke(app, [*one, "--overwrite", *options])
        assert isinstance(result.exception, ValueError) and options[0] in str(result.exception)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny", "mask2former-tiny", "eomt-tiny"])
def test_the_command_with_a_data_set(name, photos, tmp_path):
    """Category ids, names and colors are those of the data set."""
    torch.manual_seed(0)
    make_model(name, 13).save_pretrained(tmp_path / "model")
    command = ["predict", str(tmp_path / "model"), str(photos), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*command, "--data", "composed:scenes", "--task", "panoptic", "--threshold", "0"])
    assert result.exit_code == 0, result.output
    categories = json.loads((tmp_path / "out" / "panoptic.json").read_text())["categories"]
    assert categories[10] == {"id": 10, "name": "brick", "isthing": 0, "color": [161, 120, 104]}
    make_model(name, 10).save_pretrained(tmp_path / "things")
    command = ["predict", str(tmp_path / "things"), str(photos), "-o", str(tmp_path / "instances")]
    options = ["--data", "composed:scenes", "--split", "train", "--kind", "auto", "--task", "instance"]
    assert CliRunner().invoke(app, [*command, *options]).exit_code == 0
    categories = json.loads((tmp_path / "instances" / "images.json").read_text())["categories"]
    assert [category["name"] for category in categories[8:]] == ["bag", "ankle boot"]
    result = CliRunner().invoke(app, [*command, "--data", "composed:scenes", "--overwrite"])
    assert "info has 13 classes; the model has 10" in str(result.exception)


def test_the_folder_of_a_run(model, photos, tmp_path):
    """The better network of the run, and the task that it was trained for."""
    model.save_pretrained(tmp_path / "run" / "best")
    for said, task in (("semantic", "semantic"), ("", "panoptic")):
        (tmp_path / "run" / "config.json").write_text(json.dumps({"task": said}))
        assert predict(tmp_path / "run", photos / "a.jpg", tmp_path / task).task == task
    assert predict(tmp_path / "run", photos / "a.jpg", tmp_path / "general", task="general").task == "general"


def test_broken_images_among_good_ones(folder, photos, tmp_path, monkeypatch, capsys):
    (photos / "b.jpg").write_bytes((photos / "b.jpg").read_bytes()[:400])
    (photos / "d.jpg").write_text("no picture")
    (photos / "f.png").write_bytes(b"")
    out = tmp_path / "out"
    assert exit_code(monkeypatch, folder, photos, "-o", out) == 1
    said = capsys.readouterr()
    assert "panoptic: 3 images" in said.out
    summary, *lines = said.err.splitlines()
    assert summary == "fastmask: 3 of 6 could not be read:"
    for line, name in zip(lines, ("b.jpg", "d.jpg", "f.png"), strict=True):
        assert line.startswith(f"  {photos / name}: ")
        assert line.count(name) == 1
    assert_whole(out, "ace")


def test_only_broken_images(model, photos, tmp_path):
    for path in photos.iterdir():
        path.write_bytes(b"broken")
    result = predict(model, photos, tmp_path / "out")
    assert result.written == result.paths == () and len(result.failures) == 5
    assert_whole(tmp_path / "out", "")


def test_results_are_not_overwritten_unless_asked(model, photos, tmp_path):
    out = tmp_path / "out"
    predict(model, photos / "a.jpg", out, task="semantic")
    before = (out / "labels" / "a.png").stat().st_mtime_ns
    predict(model, photos / "b.jpg", out, task="semantic")
    with pytest.raises(FileExistsError, match=r"labels.a\.png and 3 more exist already"):
        predict(model, photos, out, task="semantic")
    assert (out / "labels" / "a.png").stat().st_mtime_ns == before
    assert_whole(out, "ab", "semantic")
    other = MaskFormer(MaskFormerConfig.preset("tiny", 3))
    with pytest.raises(FileExistsError, match=r"classes\.json exists already"):
        predict(other, photos / "c.jpg", out, task="semantic")
    predict(other, photos, out, overwrite=True)
    assert json.loads((out / "classes.json").read_text())["classes"] == ["class 0", "class 1", "class 2"]


def test_lists_of_other_images_are_not_overwritten(model, photos, tmp_path):
    for task, name in (("panoptic", "panoptic.json"), ("instance", "instances.json")):
        predict(model, photos / "a.jpg", tmp_path / task, task=task)
        with pytest.raises(FileExistsError, match=name):
            predict(model, photos / "b.jpg", tmp_path / task, task=task)


def test_nowhere_to_write(folder, photos, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("in the way")
    for output in (tmp_path / "file", tmp_path / "file" / "out", Path("/proc/out")):
        assert exit_code(monkeypatch, folder, photos / "a.jpg", "-o", output) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("fastmask: ") and str(output) in line


def test_a_full_disk(model, photos, tmp_path, monkeypatch):
    """The error names the reason; images before it are whole and listed, and nothing is left half-written."""
    save = outputs._save

    def save_some(path, make):
        if (tmp_path / "out" / "overlays" / "b.png").exists() and not (tmp_path / "out" / "labels" / "d.png").exists():
            path.write_bytes(b"half a pict")
            raise OSError(28, "No space left on device")
        save(path, make)

    monkeypatch.setattr(outputs, "_save", save_some)
    with pytest.raises(OSError, match="No space left"):
        predict(model, photos, tmp_path / "out")
    assert_whole(tmp_path / "out", "ab")


def test_an_interruption_keeps_what_is_done(model, photos, tmp_path, monkeypatch):
    original, calls = MaskFormer.predict, []

    def interrupted(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self, *arguments, **options)

    monkeypatch.setattr(MaskFormer, "predict", interrupted)
    with pytest.raises(KeyboardInterrupt):
        predict(model, photos, tmp_path / "out", workers=2, html=tmp_path / "page.html")
    assert_whole(tmp_path / "out", "abc")
    assert titles((tmp_path / "page.html").read_text(encoding="utf-8")) == ["a.jpg", "b.jpg", "c.jpg"]


@pytest.mark.slow
def test_a_killed_process_leaves_no_half_files(folder, tmp_path):
    rng = np.random.default_rng(0)
    for i in range(200):
        write_photo(tmp_path / "photos" / f"{i}.png", rng)
    out = tmp_path / "out"
    with subprocess.Popen(
        [*COMMAND, folder, tmp_path / "photos", "-o", out], cwd=ROOT, stderr=subprocess.PIPE
    ) as process:
        while len(list(out.glob("overlays/*.png"))) < 3 and process.poll() is None:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    pictures = [path for path in out.rglob("*") if path.is_file() and path.suffix != ".tmp"]
    assert len(pictures) >= 9
    for path in pictures:
        assert path.suffix == ".png"
        with Image.open(path) as image:
            image.load()


def test_a_few_images_are_in_memory(model, photos, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for i in range(10):
        write_photo(photos / f"more-{i}.jpg", rng)
    decode, images, alive = predict_images.decode_picture, [], []

    def counted(path, **options):
        image = decode(path, **options)
        images.append(weakref.ref(image))
        alive.append(sum(image() is not None for image in images))
        return image

    monkeypatch.setattr(predict_images, "decode_picture", counted)
    predict(model, photos, tmp_path / "out")
    assert len(alive) == 15 and max(alive) <= 4
