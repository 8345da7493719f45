"""Networks by name, and folders of saved ones whose class is found out."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from fastmask.models import (
    EoMT,
    Mask2Former,
    MaskFormer,
    PerPixelBaseline,
    Segmenter,
    SoundEventDetector,
    load_model,
    make_model,
)
from fastmask.models._registry import (
    MODELS,
    config_from_dict,
    make_config,
    model_folder,
    model_from_dict,
    model_to_dict,
    preset_names,
    saved_type,
    task_of_run,
)

TINY = {
    "maskformer-tiny": MaskFormer,
    "mask2former-tiny": Mask2Former,
    "eomt-tiny": EoMT,
    "segmenter-tiny": Segmenter,
    "per-pixel-tiny": PerPixelBaseline,
    "sound-tiny": SoundEventDetector,
}


@pytest.mark.parametrize("name", preset_names())
def test_each_preset_has_a_configuration_that_comes_back(name):
    config = make_config(name, 5)
    assert config.num_classes == 5
    assert config_from_dict(json.loads(json.dumps(model_to_dict(config)))) == config
    family = TINY | {"seg-tiny": Segmenter}
    assert MODELS[config.model_type] is family.get(f"{name.partition('-')[0]}-tiny", PerPixelBaseline)


@pytest.mark.parametrize("name", TINY)
def test_each_family_is_saved_and_found_again(name, tmp_path):
    torch.manual_seed(0)
    model = make_model(name, class_names=["sky", "cat"], stuff_classes=[0])
    assert type(model) is TINY[name] and model.config.class_names == ("sky", "cat")
    if "former" in name:
        assert model.config.stuff_classes == (0,)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["type"] == TINY[name].__name__
    loaded = load_model(tmp_path)
    assert type(loaded) is type(model) and loaded.config == model.config
    for key, value in model.weights().items():
        assert torch.equal(loaded.weights()[key], value), key


@pytest.mark.parametrize("name", TINY)
def test_folders_without_a_type_are_told_by_their_fields(name, tmp_path):
    model = make_model(name, 2)
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    del values["type"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert saved_type(tmp_path) is TINY[name]
    assert load_model(tmp_path).config == model.config


def test_bare_tiny_is_maskformers():
    assert make_config("tiny", 3) == make_config("maskformer-tiny", 3)
    assert len(set(preset_names())) == len(preset_names())


def test_overrides_go_to_the_configuration_or_the_constructor():
    backbone = nn.Identity()
    backbone.channels = (8, 16, 24, 32)
    model = make_model("tiny", 3, num_queries=7, backbone=backbone)
    assert model.backbone is backbone
    assert (model.config.num_queries, model.config.backbone) == (7, "custom")
    assert make_config("tiny", 3, backbone="resnet18").backbone == "resnet18"
    assert make_model("per-pixel-tiny", 3, transformer_decoder=True).predictor.query_embed.weight.shape[0] == 3


def test_a_network_of_a_dict_has_its_configuration():
    model = make_model("segmenter-tiny", 3)
    assert model_from_dict(model_to_dict(model)).config == model.config


def test_wrong_names_and_fields_are_listed():
    with pytest.raises(ValueError, match="unknown model 'swin'; known are maskformer-tiny, .*sound-base"):
        make_model("swin", 3)
    with pytest.raises(ValueError, match="unknown model 'base'"):
        make_model("base", 3)
    with pytest.raises(TypeError, match="a Segmenter has no num_queries; its fields are class_names, .*window_size"):
        make_model("segmenter-tiny", 3, num_queries=4)
    with pytest.raises(TypeError, match="num_classes or class_names"):
        make_model("tiny")
    with pytest.raises(ValueError, match="class_names is 1 names; expected 2"):
        make_model("tiny", 2, class_names=["a"])
    with pytest.raises(ValueError, match="type is 'Yolo'; expected one of MaskFormer, Mask2Former"):
        config_from_dict({"type": "Yolo"})
    with pytest.raises(ValueError, match="type is 'Segmenter'; expected 'MaskFormer'"):
        MaskFormer.config_class.from_dict({"type": "Segmenter", "num_classes": 2})


def test_the_folder_of_a_run_holds_its_best_network_or_its_last(tmp_path):
    (tmp_path / "config.json").write_text('{"recipe": {}}')
    make_model("segmenter-tiny", 2).save_pretrained(tmp_path / "model")
    assert model_folder(tmp_path) == tmp_path / "model"
    make_model("tiny", 2).save_pretrained(tmp_path / "best")
    assert model_folder(str(tmp_path)) == tmp_path / "best"
    assert model_folder(tmp_path / "model") == tmp_path / "model"
    assert isinstance(load_model(tmp_path), MaskFormer)


def test_a_run_says_what_it_was_for(tmp_path):
    make_model("segmenter-tiny", 2).save_pretrained(tmp_path / "model")
    assert task_of_run(tmp_path) is None
    (tmp_path / "config.json").write_text('{"task": "semantic"}')
    assert task_of_run(str(tmp_path)) == "semantic" and task_of_run(tmp_path / "model") is None
    (tmp_path / "config.json").write_text('{"task": ""}')
    assert task_of_run(tmp_path) is None


def test_errors_name_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no folder {tmp_path}/absent"):
        load_model(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} has no model.safetensors, .* best or model in it"):
        load_model(tmp_path)
    make_model("tiny", 2).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    for text, message in {
        "{": "is not a JSON file",
        "[]": "holds a list",
        '{"num_classes": 3, "layers": 2}': "not the fields of a MaskFormer or",
        '{"type": "Yolo"}': "type is 'Yolo'; expected one of",
        '{"model_type": "maskformer"}': "of model type 'maskformer'; fastmask convert reads",
        '{"model_type": "vit"}': "of model type 'vit'; fastmask convert reads those of 'maskformer'",
        '{"type": "MaskFormer", "layers": 2}': "unknown keys layers; missing keys num_classes",
    }.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=f"{path}.*{message}"):
            load_model(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=str(path)):
        load_model(tmp_path)
