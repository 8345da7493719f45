import pytest
import torch
from torch.nn.functional import cross_entropy, interpolate

from fastmask.models import MaskFormer, MaskFormerConfig, PerPixelBaseline, PerPixelBaselineConfig
from fastmask.targets import Targets
from tests.helpers.tiny_models import CLASSES, class_maps

LAYERS = 3
FORMS = pytest.mark.parametrize("transformer_decoder", [False, True])


def tiny(transformer_decoder=True, **options):
    """A model whose weights have been shaken, so that pixels differ in their logits."""
    config = PerPixelBaselineConfig.preset("tiny", CLASSES, transformer_decoder=transformer_decoder, **options)
    model = PerPixelBaseline(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


@FORMS
@pytest.mark.parametrize("options", [{}, {"encoder_layers": 1}, {"mask_dim": 32, "hidden_dim": 128}])
def test_shapes(transformer_decoder, options):
    model = tiny(transformer_decoder, **options)
    outputs = model(torch.rand(2, 3, 90, 64))
    assert outputs["logits"].shape == (2, CLASSES, 24, 16)
    earlier = LAYERS - 1 if transformer_decoder else 0
    assert [layer["logits"].shape for layer in outputs["aux_outputs"]] == [(2, CLASSES, 24, 16)] * earlier
    assert [label.shape for label in model.predict(torch.rand(2, 3, 90, 61))] == [(90, 61)] * 2


def test_with_a_transformer_decoder_it_is_maskformer_whose_masks_are_classes():
    """The paper's PerPixelBaseline+ and MaskFormer differ in what they make of the same products only."""
    model = tiny(encoder_layers=1).eval()
    other = MaskFormer(MaskFormerConfig.preset("tiny", CLASSES, num_queries=CLASSES, encoder_layers=1)).eval()
    missing, unexpected = other.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected and all(name.startswith(("predictor.class_embed.", "criterion.")) for name in missing)
    images = [torch.rand(3, 64, 50), torch.rand(3, 90, 64)]
    outputs, expected = model(images), other(images)["mask_logits"]
    assert torch.equal(outputs["logits"], expected[-1])
    for layer, masks in zip(outputs["aux_outputs"], expected[:-1], strict=True):
        assert torch.equal(layer["logits"], masks)


def test_without_one_the_pixel_embeddings_are_classified_linearly():
    model = tiny(False).eval()
    images = torch.rand(2, 3, 64, 96)
    embeddings = []
    model.pixel_decoder.register_forward_hook(lambda module, inputs, output: embeddings.append(output[0]))
    logits = model(images)["logits"]
    weight, bias = model.classifier.weight[:, :, 0, 0], model.classifier.bias
    expected = torch.einsum("kc,bchw->bkhw", weight, embeddings[0]) + bias[:, None, None]
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert not any(name.startswith("predictor") for name, _ in model.named_parameters())


@FORMS
def test_losses_are_the_cross_entropy_of_every_layer(transformer_decoder):
    model = tiny(transformer_decoder).eval()
    images, targets = torch.rand(2, 3, 50, 70), torch.stack(class_maps([(50, 70)] * 2))
    outputs, losses = model(images), model(images, targets)
    layers = {"loss_ce": outputs["logits"]}
    layers |= {f"loss_ce_{i}": layer["logits"] for i, layer in enumerate(outputs["aux_outputs"])}
    assert losses.keys() == layers.keys()
    for name, logits in layers.items():
        logits = interpolate(logits, size=(64, 96), mode="bilinear")[..., :50, :70]
        torch.testing.assert_close(losses[name], cross_entropy(logits, targets, ignore_index=255))


def test_without_deep_supervision_there_is_one_layer():
    model, other = tiny().eval(), tiny(deep_supervision=False).eval()
    other.load_state_dict(model.state_dict())
    images, targets = torch.rand(2, 3, 64, 64), torch.stack(class_maps([(64, 64)] * 2))
    assert other(images)["aux_outputs"] == []
    torch.testing.assert_close(other(images)["logits"], model(images)["logits"])
    assert other(images, targets).keys() == {"loss_ce"}


@FORMS
def test_targets_of_every_kind_give_the_same_losses(transformer_decoder):
    model = tiny(transformer_decoder).eval()
    sizes = [(50, 64), (64, 40)]
    images, maps = [torch.rand(3, *size) for size in sizes], class_maps(sizes)
    expected = model(images, maps)
    dicts = [Targets.from_segmentation(classes[None], CLASSES).to_list()[0] for classes in maps]
    for targets in (dicts, Targets.from_list(dicts)):
        losses = model(images, targets)
        assert all(torch.equal(losses[name], expected[name]) for name in expected)
    ignored = [torch.full(size, 255) for size in sizes]
    assert not any(model(images, ignored).values())


@FORMS
def test_predictions_are_upsampled_cropped_and_resized(transformer_decoder):
    model = tiny(transformer_decoder).train()
    images, sizes = [torch.rand(3, 40, 70), torch.rand(3, 64, 50)], [(20, 35), (128, 100)]
    logits = model.eval()(images)["logits"]
    model.train()
    scores = model.predict(images, sizes, output="scores")
    labels = model.predict(images, sizes)
    for b, (image, size) in enumerate(zip(images, sizes, strict=True)):
        padded = interpolate(logits[b : b + 1], size=(64, 96), mode="bilinear")
        cropped = padded[..., : image.shape[1], : image.shape[2]]
        expected = interpolate(cropped, size=size, mode="bilinear")[0].softmax(0)
        torch.testing.assert_close(scores[b], expected)
        assert torch.equal(labels[b].long(), scores[b].argmax(0)) and labels[b].dtype == torch.uint8
    assert model.training and not scores[0].requires_grad


def test_prediction_computes_the_last_layer_only():
    model, seen = tiny(), []
    model.predictor.mask_embed.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[0]))
    model.predict(torch.rand(1, 3, 64, 64))
    model(torch.rand(1, 3, 64, 64))
    assert seen == [1, LAYERS]


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((MaskFormerConfig(3),), {}, TypeError, "config must be a PerPixelBaselineConfig, got MaskFormerConfig"),
        (
            (PerPixelBaselineConfig(3),),
            {"dropout": 0.0},
            TypeError,
            "PerPixelBaseline got a config and its fields dropout",
        ),
        ((), {"num_classes": 3, "backbone": "resnet51"}, ValueError, "unknown backbone 'resnet51'; known are tiny"),
        ((), {"num_classes": 3, "backbone": 5}, TypeError, "backbone must be a name or a module, got int"),
    ],
)
def test_wrong_constructions_are_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        PerPixelBaseline(*arguments, **options)


def test_wrong_arguments_fail_before_any_work():
    model = tiny()
    model.backbone.forward = lambda pixels: pytest.fail("the backbone ran")
    images = torch.rand(2, 3, 64, 64)
    for targets in ([], torch.zeros(2, 64, 32, dtype=torch.int64), torch.full((2, 64, 64), CLASSES)):
        with pytest.raises(ValueError, match="targets"):
            model(images, targets)
    with pytest.raises(ValueError, match="output must be one of labels, scores, got 'masks'"):
        model.predict(images, output="masks")
    with pytest.raises(ValueError, match="sizes has 3 entries"):
        model.predict(images, [(4, 4)] * 3)
