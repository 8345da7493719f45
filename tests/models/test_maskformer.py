import copy

import pytest
import torch
from torch import nn

from fastmask.mask_term import MaskTerm
from fastmask.models import MaskFormer, MaskFormerConfig
from fastmask.targets import Targets
from tests.helpers.tiny_models import CLASSES, Convolutions, mask_targets

QUERIES, LAYERS = 6, 3


def tiny(**options):
    return MaskFormer(MaskFormerConfig.preset("tiny", CLASSES, **{"num_queries": QUERIES, **options}))


@pytest.mark.parametrize("options", [{}, {"encoder_layers": 1}, {"mask_dim": 32, "hidden_dim": 128}])
def test_shapes(options):
    outputs = tiny(**options)(torch.rand(2, 3, 90, 64))
    assert outputs["pred_logits"].shape == (2, QUERIES, CLASSES + 1)
    assert outputs["pred_masks"].shape == (2, QUERIES, 24, 16)
    assert len(outputs["aux_outputs"]) == LAYERS - 1
    assert outputs["class_logits"].shape == (LAYERS, 2, QUERIES, CLASSES + 1)
    assert outputs["mask_logits"].shape == (LAYERS, 2, QUERIES, 24, 16)


def test_every_layer_is_a_view_of_the_stacked_logits():
    outputs = tiny()(torch.rand(2, 3, 64, 64))
    layers = [*outputs["aux_outputs"], outputs]
    for i, layer in enumerate(layers):
        for name, stacked in (("pred_logits", "class_logits"), ("pred_masks", "mask_logits")):
            assert layer[name].data_ptr() == outputs[stacked][i].data_ptr()
            assert torch.equal(layer[name], outputs[stacked][i])


def test_without_deep_supervision_there_is_one_layer():
    model, other = tiny().eval(), tiny(deep_supervision=False).eval()
    other.load_state_dict(model.state_dict())
    images = torch.rand(2, 3, 64, 64)
    outputs, expected = other(images), model(images)
    assert outputs["aux_outputs"] == [] and outputs["mask_logits"].shape[0] == 1
    torch.testing.assert_close(outputs["pred_masks"], expected["pred_masks"])
    losses = other(images, mask_targets([(64, 64)] * 2, [1, 2]))
    assert set(losses) == {"loss_ce", "loss_mask", "loss_dice"}


def test_a_list_of_images_of_one_size_is_a_batch():
    model = tiny().eval()
    images = torch.rand(3, 3, 64, 96)
    one, other = model(images), model(list(images))
    assert torch.equal(one["mask_logits"], other["mask_logits"])
    assert torch.equal(one["class_logits"], other["class_logits"])


def test_an_image_is_padded_at_the_bottom_and_right_after_normalization():
    model = tiny().eval()
    image = torch.rand(1, 3, 50, 90)
    mean = torch.tensor(model.config.pixel_mean)[:, None, None]
    filled = mean.expand(1, 3, 64, 96).clone()
    filled[..., :50, :90] = image
    torch.testing.assert_close(model(image)["mask_logits"], model(filled)["mask_logits"])


def test_images_in_a_padded_batch_do_not_see_each_other():
    """What the smaller image gives depends on the padded size and its own pixels only. It does differ from the image
    alone: convolutions and group norm see the padding, as in the original; only attention is masked, which
    test_model_modules checks to be exact.
    """
    model = tiny(encoder_layers=1).double().eval()
    small, large = torch.rand(3, 40, 64).double(), torch.rand(3, 128, 96).double()
    together = model([small, large])["mask_logits"]
    assert together.isfinite().all()
    torch.testing.assert_close(
        model([small, torch.rand(3, 128, 96).double()])["mask_logits"][:, :1], together[:, :1], rtol=1e-9, atol=1e-9
    )
    torch.testing.assert_close(model([large])["mask_logits"], together[:, 1:], rtol=1e-9, atol=1e-9)


def test_padding_is_not_attended_to():
    """With a backbone whose coarsest map can be chosen freely, what stands in its padding changes no class logits."""

    class Noise(nn.Module):
        channels = (8, 8, 8, 8)

        def forward(self, pixels):
            maps = [torch.ones(1, 8, *(side // stride for side in pixels.shape[-2:])) for stride in (4, 8, 16, 32)]
            maps = [m.expand(len(pixels), -1, -1, -1).clone() for m in maps]
            maps[-1][0, :, 2:] = torch.randn(())
            maps[-1][0, :, :, 1:] = torch.randn(())
            return maps

    model = MaskFormer(MaskFormerConfig.preset("tiny", CLASSES), backbone=Noise()).eval()
    nn.init.normal_(model.predictor.input_proj.weight)
    images = [torch.rand(3, 64, 30), torch.rand(3, 128, 96)]
    first, second = model(images)["class_logits"], model(images)["class_logits"]
    torch.testing.assert_close(first[:, 0], second[:, 0])
    padded = torch.zeros(2, 3, 128, 96)
    assert not torch.allclose(model(padded)["class_logits"][:, 0], model(padded)["class_logits"][:, 0])


@pytest.mark.parametrize("output", [list, tuple])
def test_any_module_can_be_the_backbone(output):
    config = MaskFormerConfig.preset("tiny", CLASSES)
    silent = Convolutions(output)
    del silent.channels
    with pytest.raises(ValueError, match="Convolutions.*pass backbone_channels"):
        MaskFormer(config, backbone=silent)
    model = MaskFormer(config, backbone=silent, backbone_channels=(8, 8, 16, 16))
    assert model(torch.rand(1, 3, 64, 64))["pred_masks"].shape == (1, 25, 16, 16)
    model = MaskFormer(num_classes=CLASSES, backbone=silent, backbone_channels=[8, 8, 16, 16], num_queries=3)
    assert model.config.backbone == "custom"
    assert model(torch.rand(1, 3, 64, 64))["pred_masks"].shape == (1, 3, 16, 16)


def test_fields_as_keywords_make_the_configuration():
    with torch.device("meta"):
        model = MaskFormer(num_classes=150, backbone="swin-tiny", num_queries=10)
    assert model.config == MaskFormerConfig(150, backbone="swin-tiny", num_queries=10)
    with torch.device("meta"):
        assert MaskFormer(num_classes=3).config == MaskFormerConfig(3)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((10,), {}, TypeError, "config must be a MaskFormerConfig, got int"),
        ((MaskFormerConfig(3),), {"num_queries": 5}, TypeError, "a config and its fields num_queries"),
        ((MaskFormerConfig(3),), {"backbone": "resnet50"}, TypeError, "a config and its fields backbone"),
        ((), {"num_classes": 3, "backbone": 5}, TypeError, "backbone must be a name or a module, got int"),
        ((), {"num_classes": 3, "queries": 5}, TypeError, "queries"),
        ((), {}, TypeError, "num_classes"),
        ((), {"num_classes": 3, "backbone": "resnet51"}, ValueError, "unknown backbone 'resnet51'; known are tiny"),
        ((MaskFormerConfig(3, backbone="custom"),), {}, ValueError, "pass the module as backbone="),
        (
            (MaskFormerConfig(3),),
            {"backbone": Convolutions(), "backbone_channels": [8, 8, 16, 16], "pretrained_backbone": "x"},
            TypeError,
            "pretrained_backbone goes with a backbone by name",
        ),
    ],
)
def test_wrong_constructions_are_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        MaskFormer(*arguments, **options)


def test_the_patch_size_divides_the_padded_size():
    options = {"num_hidden_layers": 4, "hidden_size": 48, "num_attention_heads": 4}
    config = MaskFormerConfig.preset("tiny", CLASSES, backbone="dinov2", backbone_options=options)
    with pytest.raises(ValueError, match="size_divisibility is 32; expected a multiple of the patch size 14"):
        MaskFormer(config)
    model = MaskFormer(config.replace(size_divisibility=28)).eval()
    assert model(torch.rand(1, 3, 50, 40))["pred_masks"].shape[-2:] == (14, 14)


def test_losses_are_the_weighted_criterion():
    weights = {"class_weight": 2.0, "mask_weight": 5.0, "dice_weight": 3.0}
    model = tiny(**weights).eval()
    images, targets = torch.rand(2, 3, 64, 64), mask_targets([(64, 64)] * 2, [3, 0])
    losses = model(images, targets)
    names = {name + suffix for name in ("loss_ce", "loss_mask", "loss_dice") for suffix in ("", "_0", "_1")}
    assert set(losses) == names
    unweighted = model.criterion(model(images), targets)
    for kind, weight in zip(("loss_ce", "loss_mask", "loss_dice"), weights.values(), strict=True):
        for suffix in ("", "_0", "_1"):
            torch.testing.assert_close(losses[kind + suffix], weight * unweighted[kind + suffix])


def test_the_criterion_follows_the_configuration():
    options = {"no_object_weight": 0.3, "class_cost": 2.0, "mask_cost": 3.0, "dice_cost": 4.0}
    criterion = tiny(**options, focal_alpha=0.4, focal_gamma=1.5).criterion
    assert criterion.empty_weight.tolist() == pytest.approx([1.0] * CLASSES + [0.3])
    matcher = criterion.matcher
    assert (matcher.cost_class, matcher.cost_mask, matcher.cost_dice) == (2, 3, 4)
    assert matcher.term == criterion.term == MaskTerm(alpha=0.4, gamma=1.5)
    assert set(tiny(deep_supervision=False).criterion.weight_dict) == {"loss_ce", "loss_mask", "loss_dice"}


def test_losses_of_a_list_equal_those_of_its_container():
    model = tiny().eval()
    sizes = [(50, 64), (64, 40)]
    images, targets = [torch.rand(3, *size) for size in sizes], mask_targets(sizes, [3, 1])
    one, other = model(images, targets), model(images, Targets.from_list(targets))
    for name in one:
        torch.testing.assert_close(one[name], other[name])


def test_images_without_objects_are_trained_on():
    model = tiny()
    losses = model(torch.rand(2, 3, 64, 64), mask_targets([(64, 64)] * 2, [0, 0]))
    assert all(loss.isfinite() for loss in losses.values())
    assert losses["loss_mask"] == 0 and losses["loss_dice"] == 0 and losses["loss_ce"] > 0
    sum(losses.values()).backward()


def test_wrong_targets_fail_before_any_work():
    model = tiny()
    model.backbone.forward = lambda pixels: pytest.fail("the backbone ran")
    images = torch.rand(2, 3, 64, 64)
    for targets in ([], mask_targets([(64, 64)], [1]), mask_targets([(64, 64), (64, 32)], [1, 1])):
        with pytest.raises(ValueError, match="targets"):
            model(images, targets)


def test_copies_are_independent_and_equal():
    model = tiny().eval()
    copied = copy.deepcopy(model)
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(copied(images)["mask_logits"], model(images)["mask_logits"])
    with torch.no_grad():
        copied.predictor.class_embed.weight.zero_()
    assert model.predictor.class_embed.weight.abs().max() > 0


def test_state_dict_has_stable_names():
    names = {name for name in tiny(encoder_layers=1).state_dict() if not name.startswith("backbone.")}
    attention = {f"{part}_{kind}" for part in ("in_proj", "out_proj") for kind in ("weight", "bias")}
    attention = {name.replace("out_proj_", "out_proj.") for name in attention}

    def layer(prefix, attentions, norms):
        plain = {f"{part}.{kind}" for part in ("linear1", "linear2", *norms) for kind in ("weight", "bias")}
        return {f"{prefix}.{name}" for name in plain | {f"{a}.{name}" for a in attentions for name in attention}}

    expected = {"criterion.empty_weight", "predictor.query_embed.weight"}
    for module in ("input_proj", "mask_features"):
        expected |= {f"pixel_decoder.{module}.{kind}" for kind in ("weight", "bias")}
    for level in [f"adapters.{i}" for i in range(2)] + [f"layers.{i}" for i in range(3)]:
        expected |= {f"pixel_decoder.{level}.{name}" for name in ("conv.weight", "norm.weight", "norm.bias")}
    expected |= layer("pixel_decoder.encoder.layers.0", ["self_attn"], ["norm1", "norm2"])
    for i in range(LAYERS):
        norms = ["norm1", "norm2", "norm3"]
        expected |= layer(f"predictor.decoder.layers.{i}", ["self_attn", "multihead_attn"], norms)
    heads = ["input_proj", "decoder.norm", "class_embed", *(f"mask_embed.layers.{i}" for i in range(3))]
    expected |= {f"predictor.{module}.{kind}" for module in heads for kind in ("weight", "bias")}
    assert names == expected
