"""Checkpoints of the original repository and of Hugging Face: the same outputs, there and back, and nothing dropped."""

from __future__ import annotations

import collections
import copy
import pickle

import numpy as np
import pytest
import torch
import transformers

from fastmask import MaskFormer
from fastmask.integrations.checkpoints import (
    from_hugging_face_maskformer,
    from_original_mask2former,
    from_original_maskformer,
    original_mask2former,
    original_maskformer,
    to_hugging_face_maskformer,
    to_original_mask2former,
    to_original_maskformer,
)
from fastmask.integrations.checkpoints.state_files import read_weights
from tests.helpers.foreign_models import assert_same_weights
from tests.helpers.original_mask2former import OriginalMask2Former
from tests.helpers.original_maskformer import OriginalMaskFormer, ResNet, Swin

SIZES = {"classes": 5, "queries": 7, "dim": 32, "conv_dim": 64, "mask_dim": 24, "heads": 8, "hidden": 48, "layers": 2}
BACKBONES = {
    "resnet": lambda: ResNet([32, 64, 96, 128], [1, 2, 1, 1], 16, deep_stem=False),
    "resnet-c": lambda: ResNet([32, 64, 96, 128], [1, 1, 2, 3], 32, deep_stem=True),
    "swin": lambda: Swin(16, [2, 1, 2, 1], [1, 2, 2, 4], 4),
}


def randomize(model):
    """Every weight and statistic differs from the value that it starts with."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())):
            tensor.add_(0.1 * torch.rand_like(tensor))
    return model.eval()


def original(backbone, encoder_layers=0):
    torch.manual_seed(0)
    return randomize(OriginalMaskFormer(BACKBONES[backbone](), encoder_layers=encoder_layers, **SIZES))


def original_mask2former_of(backbone):
    torch.manual_seed(0)
    return randomize(OriginalMask2Former(BACKBONES[backbone](), encoder_layers=2, **SIZES | {"layers": 4}))


def pixels_of(model, images):
    return (images - model.preprocessor.mean) / model.preprocessor.std


@pytest.mark.parametrize("encoder_layers", [0, 2])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_original_computes_the_same(backbone, encoder_layers):
    theirs = original(backbone, encoder_layers)
    model = from_original_maskformer(theirs.state_dict()).eval()
    assert model.config.backbone == backbone and model.config.encoder_layers == encoder_layers
    assert_original_computes_the_same(model, theirs, to_original_maskformer(model))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_original_mask2former_computes_the_same(backbone):
    theirs = original_mask2former_of(backbone)
    model = from_original_mask2former(theirs.state_dict()).eval()
    config = model.config
    assert (config.backbone, config.encoder_layers, config.encoder_points) == (backbone, 2, 4)
    assert (config.encoder_feedforward_dim, config.feedforward_dim, config.decoder_layers) == (24, 48, 4)
    assert_original_computes_the_same(model, theirs, to_original_mask2former(model))


def assert_original_computes_the_same(model, theirs, back):
    """In float64, as the rounding of float32 grows through the layers."""
    images = torch.rand(2, 3, 96, 160).double()
    with torch.no_grad():
        outputs = copy.deepcopy(model).double()(images)
        class_logits, mask_logits = copy.deepcopy(theirs).double()(pixels_of(model, images))
    torch.testing.assert_close(outputs["pred_logits"], class_logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs["pred_masks"], mask_logits, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in back.items())
    left_out = set(theirs.state_dict()) - set(back)
    endings = ("num_batches_tracked", "relative_position_index", "empty_weight")
    assert all(name.endswith(endings) for name in left_out)


def hugging_face(backbone):
    torch.manual_seed(1)
    fields = {
        "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1], "layer_type": "basic"},
        "swin": {"embed_dim": 16, "depths": [2, 1, 1, 1], "num_heads": [2, 2, 2, 2], "window_size": 4},
    }
    decoder = transformers.DetrConfig(
        d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48, num_queries=7
    )
    backbone_config = transformers.AutoConfig.for_model(backbone, **fields[backbone])
    backbone_config.out_features = ["stage1", "stage2", "stage3", "stage4"]
    config = transformers.MaskFormerConfig(
        backbone_config=backbone_config,
        decoder_config=decoder.to_dict(),
        fpn_feature_size=64,
        mask_feature_size=24,
        id2label={i: f"class {i}" for i in range(5)},
        label2id={f"class {i}": i for i in range(5)},
    )
    return randomize(transformers.MaskFormerForInstanceSegmentation(config))


def assert_same_outputs(model, theirs, size=(64, 96)):
    images = torch.rand(2, 3, *size).double()
    with torch.no_grad():
        outputs = copy.deepcopy(model).eval().double()(images)
        expected = copy.deepcopy(theirs).eval().double()(pixels_of(model, images))
    torch.testing.assert_close(outputs["pred_logits"], expected.class_queries_logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs["pred_masks"], expected.masks_queries_logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("names", ["v5", "v4"])
@pytest.mark.parametrize("backbone", ["resnet", "swin"])
def test_hugging_face_computes_the_same(backbone, names, tmp_path):
    theirs = hugging_face(backbone)
    theirs.save_pretrained(tmp_path)
    if names == "v4":
        older = {
            name.replace(".o_proj.", ".out_proj.").replace(".mlp.fc", ".fc"): tensor
            for name, tensor in theirs.state_dict().items()
        }
        torch.save(older, tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    for source in (tmp_path, theirs):
        model = from_hugging_face_maskformer(source)
        assert_same_outputs(model, theirs)
        assert model.config.class_names == tuple(f"class {i}" for i in range(5))
        assert (model.config.mask_weight, model.config.dice_cost) == (theirs.config.mask_weight, 1.0)
    back = to_hugging_face_maskformer(model)
    assert_same_outputs(model, back)
    assert_same_weights(theirs, back)


def test_a_model_of_ours_goes_to_hugging_face_and_back(tmp_path):
    model = randomize(MaskFormer(num_classes=3, backbone="swin", backbone_options={
        "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [2, 2, 2, 2], "window_size": 4,
    }, num_queries=5, hidden_dim=32, mask_dim=16, pixel_decoder_dim=32, decoder_layers=1, num_heads=4))  # fmt: skip
    to_hugging_face_maskformer(model).save_pretrained(tmp_path)
    again = from_hugging_face_maskformer(tmp_path)
    unused = "backbone.swin.layernorm"
    for name, value in model.weights().items():
        assert torch.equal(again.weights()[name], value) or name.startswith(unused), name
    with pytest.raises(ValueError, match="encoder in the pixel decoder"):
        to_hugging_face_maskformer(MaskFormer(num_classes=3, backbone="tiny", encoder_layers=1))


@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".safetensors"])
def test_files(suffix, tmp_path):
    weights = original("resnet").state_dict()
    path = tmp_path / f"model{suffix}"
    if suffix == ".pth":
        torch.save({"model": weights, "iteration": 7}, path)
    elif suffix == ".pkl":
        arrays = collections.OrderedDict((name, tensor.numpy()) for name, tensor in weights.items())
        path.write_bytes(pickle.dumps({"model": arrays, "__author__": "somebody"}, protocol=2))
    else:
        from safetensors.torch import save_file

        save_file(weights, path)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in read_weights(path).items())
    assert from_original_maskformer(path).config == original_maskformer.MASKFORMER.infer_config(weights)


class Malicious:
    def __reduce__(self):
        return eval, ("1 + 1",)


def test_nothing_in_a_file_is_executed(tmp_path):
    for suffix in (".pkl", ".pth"):
        path = tmp_path / f"bad{suffix}"
        if suffix == ".pkl":
            path.write_bytes(pickle.dumps({"model": {"x": Malicious()}}))
        else:
            torch.save({"model": {"x": Malicious()}}, path)
        with pytest.raises(ValueError, match=f"{path} could not be read as weights"):
            read_weights(path)
    path.write_bytes(b"PK")
    with pytest.raises(ValueError, match="could not be read as weights"):
        read_weights(path)
    with pytest.raises(FileNotFoundError, match="no weights at"):
        read_weights(tmp_path / "absent.pth")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"no \.safetensors, \.pth"):
        read_weights(tmp_path / "notes.txt")
    torch.save({"model": {"x": [1, 2]}}, path)
    with pytest.raises(ValueError, match="holds x of type list"):
        read_weights(path)
    path.with_suffix(".pkl").write_bytes(pickle.dumps(np.zeros(3)))
    with pytest.raises(ValueError, match="expected weights by name"):
        read_weights(path.with_suffix(".pkl"))


def test_missing_and_unexpected_keys_are_listed():
    weights = original("resnet").state_dict()
    del weights["sem_seg_head.predictor.class_embed.bias"]
    weights["sem_seg_head.predictor.extra.weight"] = torch.zeros(1)
    expected = "missing keys: sem_seg_head.predictor.class_embed.bias; unexpected keys: sem_seg_head.predictor.extra"
    with pytest.raises(ValueError, match=expected):
        from_original_maskformer(weights)
    with pytest.raises(ValueError, match="has no sem_seg_head.predictor"):
        from_original_maskformer({"x": torch.zeros(1)})
    with pytest.raises(FileNotFoundError, match="no folder"):
        from_hugging_face_maskformer("/nowhere")


def test_the_first_format_of_the_repository():
    weights = original("resnet").state_dict()
    older = {name.replace("sem_seg_head.pixel_decoder.", "sem_seg_head."): value for name, value in weights.items()}
    ours, expected = from_original_maskformer(older).weights(), from_original_maskformer(weights).weights()
    assert all(torch.equal(ours[name], value) for name, value in expected.items())


def test_the_first_names_of_mask2former():
    weights = original_mask2former_of("resnet").state_dict()
    older = {
        name.replace("sem_seg_head.pixel_decoder.", "sem_seg_head.").replace("query_feat", "static_query"): value
        for name, value in weights.items()
    }
    ours, expected = (from_original_mask2former(names).weights() for names in (older, weights))
    assert all(torch.equal(ours[name], value) for name, value in expected.items())
    config = original_mask2former.MASK2FORMER.infer_config(older).replace(num_queries=9)
    with pytest.warns(
        UserWarning, match="started at random: predictor.query_feat.weight, predictor.query_embed.weight"
    ):
        from_original_mask2former(older, config, ignore_mismatched_sizes=True)


def test_other_numbers_of_queries_and_classes_on_request(tmp_path):
    theirs = original("resnet")
    config = original_maskformer.MASKFORMER.infer_config(theirs.state_dict()).replace(num_queries=9, num_classes=3)
    with pytest.raises(ValueError, match=r"query_embed.weight of shape \(7, 32\) for \(9, 32\)"):
        from_original_maskformer(theirs.state_dict(), config)
    with pytest.warns(UserWarning, match="started at random: predictor.query_embed.weight, predictor.class_embed"):
        model = from_original_maskformer(theirs.state_dict(), config, ignore_mismatched_sizes=True)
    assert model.predictor.class_embed.weight.shape == (4, 32)
    other = hugging_face("resnet")
    with pytest.raises(ValueError, match="num_queries=7"):
        from_hugging_face_maskformer(other, num_queries=9)
    with pytest.warns(UserWarning, match="started at random: predictor.query_embed.weight"):
        model = from_hugging_face_maskformer(other, num_queries=9, ignore_mismatched_sizes=True)
    assert model.config.num_queries == 9 and model.config.num_classes == 5
