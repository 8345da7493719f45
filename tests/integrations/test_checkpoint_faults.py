"""Checkpoints of other models, of wrappers and without weights: errors say what was found and what is read."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from fastmask import MaskFormer, MaskFormerConfig, Segmenter, SegmenterConfig
from fastmask.cli.main import app, main
from fastmask.integrations.checkpoints import (
    convert_checkpoint,
    from_hugging_face_maskformer,
    from_original_maskformer,
    from_original_segmenter,
    save_original_segmenter,
    to_hugging_face_maskformer,
    to_original_maskformer,
)
from fastmask.models import load_model
from fastmask.models.weight_files import wrapping_prefix
from fastmask.training.distributed import load_model_state

PREFIXES = ["module.", "model.", "_orig_mod.", "model.module.net."]
FORMATS = ["fastmask", "huggingface", "original MaskFormer", "original Segmenter"]
BACKBONE = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "layer_type": "basic"}


def small_model() -> MaskFormer:
    torch.manual_seed(0)
    return MaskFormer(
        MaskFormerConfig(num_classes=3, backbone="resnet", backbone_options=BACKBONE, num_queries=4, hidden_dim=32,
                         mask_dim=16, pixel_decoder_dim=32, decoder_layers=1, feedforward_dim=32)
    )  # fmt: skip


def wrapped(weights, prefix):
    """As a wrapper's ``state_dict`` has them, beside a tensor of the wrapper's own."""
    return {**{prefix + name: value.contiguous() for name, value in weights.items()}, "epoch_loss": torch.zeros(1)}


def write(form, folder, prefix):
    """A model, and where it was written in a format under names with a prefix."""
    model = small_model()
    if form == "original MaskFormer":
        path = folder / "last.ckpt"
        torch.save({"state_dict": wrapped(to_original_maskformer(model), prefix), "epoch": 3}, path)
        return model, path
    if form == "original Segmenter":
        model = Segmenter(SegmenterConfig.preset("seg-tiny-mask-16", 3, encoder_layers=1, image_size=(32, 32)))
        save_original_segmenter(model, folder)
        path = folder / "checkpoint.pth"
        torch.save({"model": wrapped(torch.load(path)["model"], prefix)}, path)
        return model, folder
    (model if form == "fastmask" else to_hugging_face_maskformer(model)).save_pretrained(folder)
    path = folder / "model.safetensors"
    weights = wrapped(load_file(path), prefix)
    if form == "huggingface":
        path.unlink()
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file(weights, path)
    return model, folder


def read(form, source, **options):
    functions = {
        "fastmask": load_model,
        "huggingface": from_hugging_face_maskformer,
        "original MaskFormer": from_original_maskformer,
        "original Segmenter": from_original_segmenter,
    }
    return functions[form](source, **options)


def assert_same_weights(actual, expected):
    for name, value in expected.weights().items():
        if "num_batches_tracked" not in name:
            assert torch.equal(actual.weights()[name], value), name


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("form", FORMATS)
def test_a_prefix_of_names_is_named_and_stripped_on_request(form, prefix, tmp_path):
    model, source = write(form, tmp_path, prefix)
    with pytest.raises(
        ValueError, match=rf"its names begin with '{prefix}'.*prefix='{prefix}' strips it, and"
    ) as error:
        read(form, source)
    assert str(source if source.is_file() else tmp_path) in str(error.value) and len(str(error.value)) < 600
    assert_same_weights(read(form, source, prefix=prefix), model)
    with pytest.raises(ValueError, match=r"no name that begins with 'absent\.'; it has "):
        read(form, source, prefix="absent.")


@pytest.mark.parametrize("form", FORMATS)
def test_convert_strips_a_prefix(form, tmp_path):
    (tmp_path / "source").mkdir()
    model, source = write(form, tmp_path / "source", "module.")
    with pytest.raises(ValueError, match=r"prefix='module\.' strips it"):
        convert_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    arguments = ["convert", str(source), str(tmp_path / "out"), "--prefix", "module."]
    assert CliRunner().invoke(app, arguments, catch_exceptions=False).exit_code == 0
    assert_same_weights(load_model(tmp_path / "out"), model)


def test_weights_in_memory_may_have_a_prefix():
    model = small_model()
    weights = wrapped(to_original_maskformer(model), "module.")
    assert_same_weights(from_original_maskformer(weights, prefix="module."), model)


@pytest.mark.parametrize("load", [MaskFormer.load_state_dict, load_model_state])
def test_a_state_dict_of_a_wrapper_is_named(load):
    model = small_model()
    state = nn.DataParallel(model).state_dict()
    with pytest.raises(
        RuntimeError, match=r"names in state_dict begin with 'module\.'.*name\.removeprefix\('module\.'\)"
    ):
        load(model, state)
    load(model, {name.removeprefix("module."): value for name, value in state.items()})
    del state["module.pixel_decoder.mask_features.bias"]
    with pytest.raises(RuntimeError, match="Missing key"):
        load(model, {name.removeprefix("module."): value for name, value in state.items()})


def test_a_prefix_needs_most_of_the_names():
    expected = ["a.weight", "a.bias", "b.weight", "b.bias"]
    assert wrapping_prefix(expected, expected) == ""
    assert wrapping_prefix(expected, [f"m.{name}" for name in expected[1:]]) == "m."
    assert wrapping_prefix(expected, ["m.a.weight", "n.a.bias", "o.b.weight"]) == ""
    assert wrapping_prefix(expected, [*expected, "encoder.a.weight", "encoder.a.bias"]) == ""
    assert wrapping_prefix(expected, []) == wrapping_prefix([], expected) == ""


def hugging_face_folder(folder, **changes):
    to_hugging_face_maskformer(small_model()).save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


@pytest.mark.parametrize("source_format", [None, "huggingface"])
@pytest.mark.parametrize(
    ("model_type", "cls"), [("oneformer", "OneFormerForUniversalSegmentation"), ("vit", "ViTModel")]
)
def test_another_architecture_is_named_before_anything_is_read(model_type, cls, source_format, tmp_path, capfd):
    folder = hugging_face_folder(tmp_path / "other", model_type=model_type, architectures=[cls])
    (folder / "model.safetensors").write_bytes(b"no weights")
    capfd.readouterr()
    message = rf"{folder} is of model type '{model_type}' \({cls}\); .* fastmask reads 'maskformer'"
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(folder, tmp_path / "out", source_format=source_format)
    with pytest.raises(ValueError, match=f"model type '{model_type}'; fastmask convert reads those of 'maskformer'"):
        load_model(folder)
    assert capfd.readouterr().err == ""


def test_a_maskformer_without_its_heads_or_of_other_sizes_is_named(tmp_path, capfd):
    folder = hugging_face_folder(tmp_path / "sizes", mask_feature_size=24)
    with pytest.raises(
        ValueError, match=r"sizes does not fit the model; it has mask_embedder\.2\.0\.bias of shape \(16,\) for \(24,\)"
    ):
        convert_checkpoint(folder, tmp_path / "out")
    to_hugging_face_maskformer(small_model()).model.save_pretrained(tmp_path / "base")
    with pytest.raises(
        ValueError, match=r"base does not fit the model; missing keys: class_predictor\.bias, .* and 3 more"
    ):
        convert_checkpoint(tmp_path / "base", tmp_path / "out")
    assert "REPORT" not in capfd.readouterr().err


def test_a_command_ends_with_one_line(tmp_path, capfd, monkeypatch):
    folder = hugging_face_folder(tmp_path / "other", model_type="oneformer")
    capfd.readouterr()
    monkeypatch.setattr(sys, "argv", ["fastmask", "convert", str(folder), str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        main()
    said = capfd.readouterr().err
    assert said.startswith(f"fastmask: {folder} is of model type 'oneformer'") and said.count("\n") == 1


def test_a_folder_without_weights_says_what_it_holds(tmp_path):
    folder = hugging_face_folder(tmp_path / "hub")
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    message = (
        r"no weights; it holds config\.json, weights\.safetensors; expected model\.safetensors or pytorch_model\.bin"
    )
    with pytest.raises(FileNotFoundError, match=message):
        convert_checkpoint(folder, tmp_path / "out")
    small_model().save_pretrained(tmp_path / "ours")
    (tmp_path / "ours" / "model.safetensors").rename(tmp_path / "ours" / "model.bin")
    message = r"has no model\.safetensors.*it holds README\.md, config\.json, model\.bin"
    with pytest.raises(FileNotFoundError, match=message):
        convert_checkpoint(tmp_path / "ours", tmp_path / "out")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "epoch_9.pth").touch()
    with pytest.raises(
        ValueError, match=r"files holds epoch_9\.pth; expected config\.json.*file of an original MaskFormer"
    ):
        convert_checkpoint(tmp_path / "files", tmp_path / "out")
    (folder / "weights.safetensors").rename(folder / "model.safetensors")
    with pytest.raises(ValueError, match=rf"give their folder, {folder}"):
        convert_checkpoint(folder / "model.safetensors", tmp_path / "out")
    (folder / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(ValueError, match=f"{folder} could not be read"):
        convert_checkpoint(folder, tmp_path / "out")


def test_weights_of_another_network_say_what_they_are(tmp_path):
    weights = {
        f"sem_seg_head.predictor.transformer_cross_attention_layers.{i}.norm.bias": torch.zeros(1) for i in range(9)
    }
    torch.save({"model": {**weights, "backbone.stem.conv1.weight": torch.zeros(1)}}, tmp_path / "model.pth")
    message = r"expected the weights of the original Mask2Former; it has sem_seg_head\.predictor, backbone\.stem$"
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(tmp_path / "model.pth", tmp_path / "out")
