import dataclasses
import json

import pytest

from fastmask.models import (
    MaskFormerConfig,
    PerPixelBaselineConfig,
    SegmenterConfig,
    per_pixel,
    segmenter,
)
from fastmask.models.maskformer import PRESETS

OTHERS = [(PerPixelBaselineConfig, name) for name in per_pixel.PRESETS]
OTHERS += [(SegmenterConfig, name) for name in segmenter.PRESETS]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_survives_a_round_trip_through_json(preset, tmp_path):
    config = MaskFormerConfig.preset(preset, 7, stuff_classes=[5, 6], class_names=list("abcdefg"), mask_weight=5)
    assert MaskFormerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    config.save(tmp_path / "config.json")
    assert MaskFormerConfig.load(tmp_path / "config.json") == config
    assert config.thing_classes == (0, 1, 2, 3, 4)
    assert config.num_classes == 7 and config.mask_weight == 5.0


@pytest.mark.parametrize(("kind", "preset"), OTHERS)
def test_presets_of_the_other_models_survive_a_round_trip_through_json(kind, preset, tmp_path):
    config = kind.preset(preset, 3, class_names=list("abc"), ignore_index=-1)
    assert kind.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    config.save(tmp_path / "config.json")
    assert kind.load(tmp_path / "config.json") == config
    assert config.num_classes == 3 and config.replace(num_classes=3) == config
    with pytest.raises(ValueError, match=f"not a {kind.__name__}: unknown keys things"):
        kind.from_dict({**config.to_dict(), "things": 1})


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("seg-tiny-linear-16", (192, 12, 3, 768, (32, 32))),
        ("seg-small-mask-32", (384, 12, 6, 1536, (16, 16))),
        ("seg-base-linear-8", (768, 12, 12, 3072, (64, 64))),
        ("seg-large-mask-16", (1024, 24, 16, 4096, (40, 40))),
    ],
)
def test_segmenters_have_the_sizes_of_the_paper(name, shape):
    config = SegmenterConfig.preset(name, 150)
    found = (config.hidden_dim, config.encoder_layers, config.num_heads, config.feedforward_dim, config.grid_size)
    assert found == shape and config.decoder == name.split("-")[2]
    assert config.hidden_dim // config.decoder_heads == 64


def test_unknown_presets_of_the_other_models_list_the_known_ones():
    with pytest.raises(ValueError, match="unknown preset 'seg-huge'; known are tiny, seg-tiny-mask-16, "):
        SegmenterConfig.preset("seg-huge", 3)
    with pytest.raises(ValueError, match="unknown preset 'plus'; known are tiny, per-pixel-r50, per-pixel-plus-r50"):
        PerPixelBaselineConfig.preset("plus", 3)


def test_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown preset 'huge'; known are tiny, maskformer-r50"):
        MaskFormerConfig.preset("huge", 3)


def test_unknown_and_missing_keys_are_named(tmp_path):
    values = MaskFormerConfig(3).to_dict()
    values["queries"] = values.pop("num_queries")
    del values["num_classes"]
    with pytest.raises(ValueError, match="unknown keys queries; missing keys num_classes"):
        MaskFormerConfig.from_dict(values)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"{path}.*unknown keys queries"):
        MaskFormerConfig.load(path)


@pytest.mark.parametrize("text", ["{", "[1, 2]", ""])
def test_a_file_that_holds_no_configuration_is_named(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=str(path)):
        MaskFormerConfig.load(path)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (MaskFormerConfig, {"num_classes": 0}, "num_classes is 0"),
        (MaskFormerConfig, {"num_queries": 0}, "num_queries is 0"),
        (MaskFormerConfig, {"hidden_dim": 100}, "hidden_dim is 100; expected a multiple of 8"),
        (MaskFormerConfig, {"hidden_dim": 96, "num_heads": 5}, "hidden_dim is 96; expected a multiple of 20"),
        (MaskFormerConfig, {"pixel_decoder_dim": 48}, "pixel_decoder_dim is 48; expected a multiple of 32"),
        (MaskFormerConfig, {"pixel_decoder_dim": 96, "encoder_layers": 1, "num_heads": 64}, "pixel_decoder_dim is 96"),
        (MaskFormerConfig, {"dropout": 1.0}, r"dropout is 1.0; expected in \[0, 1\)"),
        (MaskFormerConfig, {"mask_weight": -1.0}, "mask_weight is -1.0"),
        (MaskFormerConfig, {"focal_gamma": float("nan")}, "focal_gamma is nan"),
        (MaskFormerConfig, {"stuff_classes": (2, 4)}, r"stuff_classes is \[4\]; expected in 0..3"),
        (MaskFormerConfig, {"class_names": ("a",)}, "class_names is 1 names; expected 4"),
        (MaskFormerConfig, {"pixel_std": (1.0, 0.0, 1.0)}, "pixel_std"),
        (MaskFormerConfig, {"pixel_mean": (0.5,)}, "pixel_std"),
        (SegmenterConfig, {"num_classes": 0}, "num_classes is 0"),
        (SegmenterConfig, {"decoder": "fpn"}, "decoder is 'fpn'; expected 'mask' or 'linear'"),
        (
            SegmenterConfig,
            {"image_size": (512, 500)},
            r"image_size is \(512, 500\); expected .*multiples of patch_size 16",
        ),
        (SegmenterConfig, {"image_size": (512,)}, "image_size is"),
        (SegmenterConfig, {"patch_size": 0}, "patch_size is 0"),
        (SegmenterConfig, {"num_heads": 5}, "hidden_dim is 384; expected a multiple of num_heads 5"),
        (SegmenterConfig, {"decoder_heads": 5}, "hidden_dim is 384; expected a multiple of decoder_heads 5"),
        (SegmenterConfig, {"drop_path": 1.0}, r"drop_path is 1.0; expected in \[0, 1\)"),
        (SegmenterConfig, {"decoder_dropout": -0.1}, "decoder_dropout is -0.1"),
        (SegmenterConfig, {"window_size": -1}, "window_size is -1"),
        (SegmenterConfig, {"window_stride": 513}, "window_stride is 513; expected in 1..512"),
        (SegmenterConfig, {"ignore_index": 3}, "ignore_index is 3; expected outside of the classes 0..3"),
        (SegmenterConfig, {"class_names": ("a",)}, "class_names is 1 names; expected 4"),
        (PerPixelBaselineConfig, {"ignore_index": 0}, "ignore_index is 0; expected outside of the classes 0..3"),
        (PerPixelBaselineConfig, {"hidden_dim": 100}, "hidden_dim is 100; expected a multiple of 8"),
        (PerPixelBaselineConfig, {"pixel_decoder_dim": 48}, "pixel_decoder_dim is 48"),
        (PerPixelBaselineConfig, {"decoder_layers": 0}, "decoder_layers is 0"),
    ],
)
def test_values_out_of_range_are_named(config, changes, message):
    with pytest.raises(ValueError, match=message):
        config(**{"num_classes": 4, **changes})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_classes", "4"),
        ("num_queries", 1.5),
        ("deep_supervision", 1),
        ("dropout", "0"),
        ("decoder_layers", True),
        ("backbone", None),
        ("backbone_options", [1]),
        ("backbone_options", {"depths": object()}),
        ("stuff_classes", 3),
        ("stuff_classes", [1.5]),
        ("class_names", [1, 2, 3, 4]),
    ],
)
def test_values_of_another_type_are_named(name, value):
    with pytest.raises(TypeError, match=name):
        MaskFormerConfig(**{"num_classes": 4, name: value})


def test_a_configuration_cannot_be_changed_but_replaced():
    config = MaskFormerConfig(4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_classes = 5
    assert config.replace(num_classes=5).num_classes == 5
