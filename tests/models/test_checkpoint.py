import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastmask.models import MaskFormer, MaskFormerConfig, weight_files


def tiny(num_classes=4, **options):
    options = {"decoder_layers": 2, "num_queries": 5, **options}
    return MaskFormer(MaskFormerConfig.preset("tiny", num_classes, **options)).eval()


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model = tiny(stuff_classes=[3], class_names=list("abcd"))
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


def outputs(model):
    with torch.no_grad():
        return model(torch.linspace(0, 1, 2 * 3 * 64 * 64).view(2, 3, 64, 64))["mask_logits"]


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def test_a_saved_model_comes_back_exactly(saved):
    model, folder = saved
    loaded = MaskFormer.from_pretrained(folder)
    assert loaded.config == model.config
    assert loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert torch.equal(outputs(loaded.eval()), outputs(model))
    assert sorted(os.listdir(folder)) == ["README.md", "config.json", "model.safetensors"]


def test_files_are_readable_by_others_as_usual(saved):
    _, folder = saved
    plain = folder / "plain"
    plain.touch()
    for name in ("config.json", "model.safetensors"):
        assert (folder / name).stat().st_mode == plain.stat().st_mode


def test_the_criterion_is_not_saved(saved):
    _, folder = saved
    assert not any(name.startswith("criterion") for name in load_file(folder / "model.safetensors"))


def test_channels_last_weights_are_saved(tmp_path):
    model = tiny().to(memory_format=torch.channels_last)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(outputs(MaskFormer.from_pretrained(tmp_path).eval()), outputs(model))


@pytest.mark.parametrize("failing", ["save_weights", "replace"])
def test_an_interrupted_save_leaves_the_earlier_one(saved, monkeypatch, failing):
    _, folder = saved
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(weight_files if failing == "save_weights" else os, failing, interrupt)
    with pytest.raises(KeyboardInterrupt):
        tiny().save_pretrained(folder)
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == before


def test_missing_folders_and_files_are_named(saved, tmp_path):
    _, folder = saved
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere"):
        MaskFormer.from_pretrained(tmp_path / "nowhere")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=str(folder / "model.safetensors")):
        MaskFormer.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=str(folder / "config.json")):
        MaskFormer.from_pretrained(folder)


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_a_truncated_file_is_named(saved, length):
    _, folder = saved
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=f"{path} is truncated or not a safetensors file"):
        MaskFormer.from_pretrained(folder)


def test_wrong_keys_are_listed(saved):
    _, folder = saved

    def change(weights):
        weights["predictor.queries.weight"] = weights.pop("predictor.query_embed.weight")
        weights["backbone.extra"] = torch.zeros(1)

    edit_weights(folder, change)
    message = "missing keys: predictor.query_embed.weight; unexpected keys: backbone.extra, predictor.queries.weight"
    with pytest.raises(ValueError, match=message):
        MaskFormer.from_pretrained(folder)
    with pytest.raises(ValueError, match=message):
        MaskFormer.from_pretrained(folder, num_classes=7, ignore_mismatched_sizes=True)


def test_wrong_shapes_are_named(saved):
    _, folder = saved
    edit_config(folder, num_queries=6)
    with pytest.raises(ValueError, match=r"query_embed.weight of shape \(5, 96\).*asks for \(6, 96\)"):
        MaskFormer.from_pretrained(folder)
    edit_config(folder, num_queries=5, num_classes=3, class_names=[], stuff_classes=[])
    with pytest.raises(ValueError, match=r"class_embed.weight of shape \(5, 96\).*asks for \(4, 96\)"):
        MaskFormer.from_pretrained(folder)


def test_a_configuration_of_something_else_is_named(saved):
    _, folder = saved
    (folder / "config.json").write_text('{"model_type": "maskformer"}')
    with pytest.raises(
        ValueError, match=f"{folder / 'config.json'}.*unknown keys model_type; missing keys num_classes"
    ):
        MaskFormer.from_pretrained(folder)


def test_another_number_of_classes_is_refused_unless_asked_for(saved):
    model, folder = saved
    with pytest.raises(ValueError, match=f"num_classes is 7, but {folder} was saved with 4"):
        MaskFormer.from_pretrained(folder, num_classes=7)
    with pytest.warns(UserWarning, match="predictor.class_embed.bias, predictor.class_embed.weight"):
        loaded = MaskFormer.from_pretrained(folder, num_classes=7, ignore_mismatched_sizes=True).eval()
    assert loaded.predictor.class_embed.out_features == 8
    assert loaded.criterion.empty_weight.shape == (8,)
    assert (loaded.config.num_classes, loaded.config.class_names, loaded.config.stuff_classes) == (7, (), ())
    assert torch.equal(outputs(loaded), outputs(model))
    assert MaskFormer.from_pretrained(folder, num_classes=4).config == model.config


def test_a_pretrained_backbone_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = MaskFormerConfig.preset("tiny", 4, backbone="resnet50")
    with pytest.raises(OSError, match="pretrained_backbone 'no-such' cannot be read as a hub id .there is no folder"):
        MaskFormer(config, pretrained_backbone="no-such")
    (tmp_path / "config.json").write_text("no JSON")
    with pytest.raises(OSError, match="pretrained_backbone '.*' cannot be read as a folder: "):
        MaskFormer(config, pretrained_backbone=str(tmp_path))


def test_a_pretrained_backbone_survives_saving(tmp_path):
    source = tiny().backbone
    source.save_pretrained(tmp_path / "backbone")
    config = MaskFormerConfig.preset("tiny", 4, decoder_layers=2, backbone="resnet50")
    model = MaskFormer(config, pretrained_backbone=str(tmp_path / "backbone")).eval()
    for name, value in source.state_dict().items():
        assert torch.equal(model.backbone.state_dict()[name], value), name
    model.save_pretrained(tmp_path / "model")
    loaded = MaskFormer.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(outputs(loaded), outputs(model))
