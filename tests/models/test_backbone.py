import subprocess
import sys

import pytest
import torch
from torch import nn

from fastmask.models import build_backbone, known_backbones
from fastmask.models.backbones import BACKBONES, backbone_channels, describe_backbone, feature_maps


def shapes(name, options=None):
    """The maps of a 128 x 192 image on the meta device, where nothing is computed."""
    with torch.device("meta"):
        backbone = build_backbone(name, options).eval()
        maps = feature_maps(backbone, torch.empty(1, 3, 128, 192), backbone_channels(backbone))
    return [tuple(feature.shape[1:]) for feature in maps]


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("resnet50", (256, 512, 1024, 2048)),
        ("resnet101", (256, 512, 1024, 2048)),
        ("swin-tiny", (96, 192, 384, 768)),
        ("swin-small", (96, 192, 384, 768)),
        ("swin-base", (128, 256, 512, 1024)),
        ("swin-large", (192, 384, 768, 1536)),
        ("convnext", (96, 192, 384, 768)),
        ("pvt_v2", (32, 64, 160, 256)),
    ],
)
def test_backbones_by_name_give_maps_at_strides_4_to_32(name, channels):
    maps = shapes(name)
    assert [m[1:] for m in maps] == [(32, 48), (16, 24), (8, 12), (4, 6)]
    assert channels is None or tuple(m[0] for m in maps) == channels


def test_the_tiny_backbone_stops_at_stride_16():
    assert shapes("tiny") == [(32, 32, 48), (64, 16, 24), (128, 8, 12)]


def test_plain_vision_transformers_are_resized_to_the_four_strides():
    maps = shapes("dinov2", {"num_hidden_layers": 4, "hidden_size": 48, "num_attention_heads": 4})
    assert maps == [(48, 32, 48), (48, 16, 24), (48, 8, 12), (48, 4, 6)]


@pytest.mark.parametrize("size", [("small", 384), ("base", 768), ("large", 1024)], ids=lambda size: size[0])
@pytest.mark.parametrize(("family", "patch"), [("dinov2", 14), ("dinov3", 16)])
def test_dino_backbones_have_four_maps_of_their_last_blocks(family, patch, size):
    name, dim = size
    with torch.device("meta"):
        backbone = build_backbone(f"{family}-{name}").eval()
        sides = (4 * patch, 6 * patch)
        channels = backbone_channels(backbone)
        maps = feature_maps(backbone, torch.empty(1, 3, *sides), channels)
    assert channels == (dim,) * 4 and backbone.config.num_attention_heads == dim // 64
    last = 24 if name == "large" else 12
    assert backbone.config.out_features == [f"stage{i}" for i in range(last - 3, last + 1)]
    expected = [tuple(-(-side // stride) for side in sides) for stride in (4, 8, 16, 32)]
    assert [tuple(feature.shape[2:]) for feature in maps] == expected


def test_the_presets_differ_in_depth():
    parameters = {}
    for name in BACKBONES:
        with torch.device("meta"):
            parameters[name] = sum(p.numel() for p in build_backbone(name).parameters())
    assert parameters["resnet101"] > parameters["resnet50"] > parameters["tiny"]
    assert parameters["swin-large"] > parameters["swin-base"] > parameters["swin-small"] > parameters["swin-tiny"]


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match="unknown backbone 'resnet51'; known are .*resnet50.*swin-tiny.*convnext"):
        build_backbone("resnet51")
    assert {"tiny", "resnet50", "swin-large", "dinov2", "resnet"} <= set(known_backbones())
    assert "timm_backbone" not in known_backbones()


def test_unknown_options_are_named():
    with pytest.raises(ValueError, match="backbone_options has depth; ResNetConfig"):
        build_backbone("resnet50", {"depth": [1, 1, 1, 1]})


def test_a_backbone_may_have_fewer_stages():
    options = {"depths": [1, 1], "hidden_sizes": [8, 16], "layer_type": "basic"}
    assert [m[0] for m in shapes("resnet", options)] == [8, 16]


def test_pretrained_weights_bring_their_own_architecture(tmp_path):
    options = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "layer_type": "basic"}
    saved = build_backbone("resnet", options)
    saved.save_pretrained(tmp_path)
    loaded = build_backbone("resnet50", pretrained=str(tmp_path))
    assert loaded.state_dict().keys() == saved.state_dict().keys()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, saved.state_dict()[name]), name
    assert describe_backbone(loaded) == ("resnet", options)
    with pytest.raises(ValueError, match="is of model type 'resnet'; backbone 'swin-tiny' is 'swin'"):
        build_backbone("swin-tiny", pretrained=str(tmp_path))


class Returns(nn.Module):
    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, pixels):
        return self.output


def test_what_a_backbone_returns_is_checked():
    pixels = torch.zeros(1, 3, 64, 64)
    maps = [torch.zeros(1, 8, 16, 16), torch.zeros(1, 16, 8, 8)]
    assert feature_maps(Returns(tuple(maps)), pixels, (8, 16)) == maps
    with pytest.raises(TypeError, match="list or tuple of feature maps, got Tensor"):
        feature_maps(Returns(maps[0]), pixels, (8,))
    with pytest.raises(ValueError, match=r"expected the channels \[8\]"):
        feature_maps(Returns(maps), pixels, (8,))
    with pytest.raises(ValueError, match=r"expected the channels \[8, 32\]"):
        feature_maps(Returns(maps), pixels, (8, 32))


def test_channels_come_from_the_argument_or_the_module():
    module = nn.Identity()
    with pytest.raises(ValueError, match="Identity.*backbone_channels"):
        backbone_channels(module)
    module.channels = [1, 2]
    assert backbone_channels(module) == (1, 2)
    assert backbone_channels(module, (3, 4)) == (3, 4)


def test_importing_the_models_does_not_import_transformers():
    code = "import sys, fastmask.models; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
