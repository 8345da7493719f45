"""The model card that ``save_pretrained`` writes."""

import pytest
import torch
import yaml

from fastmask.models import ModelCard, load_model, make_model
from fastmask.models.model_card import CARD_FILE, MARK


def parts(text):
    """The head, read as YAML, and the rest."""
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def rows(body, section):
    """The cells of a section's table, without its header."""
    text = body.partition(f"## {section}\n\n")[2].partition("\n## ")[0]
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in text.splitlines() if line.startswith("|")][2:]


@pytest.fixture
def model():
    return make_model("tiny", class_names=("cat", "a | b <i>", "sky"), stuff_classes=(2,))


def test_a_card_says_what_the_model_knows_and_claims_nothing_else(model, tmp_path):
    model.save_pretrained(tmp_path)
    head, body = parts((tmp_path / CARD_FILE).read_text(encoding="utf-8"))
    assert head["library_name"] == "fastmask" and head["pipeline_tag"] == "image-segmentation"
    tasks = [f"{task}-segmentation" for task in ("semantic", "panoptic", "instance")]
    assert head["tags"] == ["fastmask", "MaskFormer", *tasks]
    assert not {"license", "datasets", "model-index"} & set(head)
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in body
    assert "mean (0.485, 0.456, 0.406)" in body
    assert rows(body, "Classes") == [
        ["0", "cat", "thing"],
        ["1", "a &#124; b &lt;i&gt;", "thing"],
        ["2", "sky", "stuff"],
    ]
    assert body.count("Not stated.") == 4  # data, recipe, metrics, license


def test_a_card_says_what_it_is_told(model, tmp_path):
    card = ModelCard(
        data="street: 2 <cities>",
        recipe={"steps": 100, "crop": [512, 512]},
        metrics={"mIoU": 0.45678, "PQ": float("nan"), "fwIoU": 0.5},
        evaluated_on="streets, split val",
        license="cc-by-4.0",
    )
    model.save_pretrained(tmp_path, card)
    head, body = parts((tmp_path / CARD_FILE).read_text(encoding="utf-8"))
    assert head["license"] == "cc-by-4.0" and head["datasets"] == ["street: 2 <cities>"]
    (entry,) = head["model-index"]
    (result,) = entry["results"]
    assert result["task"] == {"type": "image-segmentation"}
    assert result["dataset"] == {"name": "streets, split val", "type": "street: 2 <cities>"}
    assert result["metrics"] == [{"type": "mean_iou", "name": "mIoU", "value": 0.4568}]
    assert rows(body, "Training") == [["steps", "100"], ["crop", "[512, 512]"]]
    assert rows(body, "Metrics") == [["mIoU", "45.68 %"], ["fwIoU", "50.00 %"]]
    assert "Data: street: 2 &lt;cities&gt;" in body and "Not stated." not in body


def test_the_hub_reads_the_head(model, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    model.save_pretrained(tmp_path, ModelCard("streets", {}, {"mIoU": 0.5}, "streets, split val", "mit"))
    data = hub.ModelCard.load(tmp_path / CARD_FILE).data
    assert (data.library_name, data.license, data.datasets) == ("fastmask", "mit", ["streets"])
    assert data.eval_results[0].metric_value == 0.5


def test_a_card_of_somebody_else_stays(model, tmp_path):
    path = tmp_path / CARD_FILE
    model.save_pretrained(tmp_path)
    path.write_text(path.read_text(encoding="utf-8").replace("cat", "dog"), encoding="utf-8")
    model.save_pretrained(tmp_path)
    assert "| cat |" in path.read_text(encoding="utf-8"), "fastmask's own card is rewritten"
    mine = path.read_text(encoding="utf-8").replace(MARK, "My text.").encode() + b"\xff"
    path.write_bytes(mine)
    model.save_pretrained(tmp_path, ModelCard(license="mit"))
    assert path.read_bytes() == mine


def test_the_snippet_runs_and_loading_needs_no_card(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path / "path/to/this/folder")
    monkeypatch.chdir(tmp_path)
    _, body = parts((tmp_path / "path/to/this/folder" / CARD_FILE).read_text(encoding="utf-8"))
    names = {"images": torch.rand(2, 3, 64, 64)}
    exec(body.partition("```python\n")[2].partition("```")[0], names)
    assert names["label_maps"][0].shape == (64, 64) and len(names["panoptic"]) == len(names["instances"]) == 2
    (tmp_path / "path/to/this/folder" / CARD_FILE).unlink()
    assert load_model(tmp_path / "path/to/this/folder").config == model.config


@pytest.mark.parametrize("name", ["segmenter-tiny", "per-pixel-tiny", "sound-tiny"])
def test_cards_of_other_networks(name, tmp_path, monkeypatch):
    model = make_model(name, 4)
    model.save_pretrained(tmp_path / "path/to/this/folder")
    monkeypatch.chdir(tmp_path)
    head, body = parts((tmp_path / "path/to/this/folder" / CARD_FILE).read_text(encoding="utf-8"))
    sound = name == "sound-tiny"
    assert head["pipeline_tag"] == ("audio-classification" if sound else "image-segmentation")
    assert len(rows(body, "Classes")) == 4
    names = {"images": torch.rand(1, 3, 64, 64), "waveforms": torch.rand(1, 16_000)}
    exec(body.partition("```python\n")[2].partition("```")[0], names)
    assert len(names["events" if sound else "label_maps"]) == 1
