import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, interpolate

from fastmask.models import MaskFormer, MaskFormerConfig, PerPixelBaseline, PerPixelBaselineConfig
from fastmask.targets import Targets

CLASSES, LAYERS = 4, 3
FORMS = pytest.mark.parametrize("transformer_decoder", [False, True])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tiny(transformer_decoder=True, **options):
    """A model whose weights have been shaken, so that pixels differ in their logits."""
    config = PerPixelBaselineConfig.preset("tiny", CLASSES, transformer_decoder=transformer_decoder, **options)
    model = PerPixelBaseline(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def class_maps(*sizes):
    maps = [torch.randint(0, CLASSES, size) for size in sizes]
    return [classes.masked_fill(torch.rand(classes.shape) < 0.2, 255) for classes in maps]


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
    images, targets = torch.rand(2, 3, 50, 70), torch.stack(class_maps((50, 70), (50, 70)))
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
    images, targets = torch.rand(2, 3, 64, 64), torch.stack(class_maps((64, 64), (64, 64)))
    assert other(images)["aux_outputs"] == []
    torch.testing.assert_close(other(images)["logits"], model(images)["logits"])
    assert other(images, targets).keys() == {"loss_ce"}


@FORMS
def test_targets_of_every_kind_give_the_same_losses(transformer_decoder):
    model = tiny(transformer_decoder).eval()
    sizes = [(50, 64), (64, 40)]
    images, maps = [torch.rand(3, *size) for size in sizes], class_maps(*sizes)
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


@FORMS
def test_gradients_reach_every_parameter(transformer_decoder):
    model = tiny(transformer_decoder, encoder_layers=1)
    losses = model([torch.rand(3, 64, 96), torch.rand(3, 50, 40)], class_maps((64, 96), (50, 40)))
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        # All queries start at zero, so the first self-attention mixes equal values, whatever its weights.
        if name != "predictor.decoder.layers.0.self_attn.in_proj_weight":
            assert parameter.grad.any(), name


@FORMS
def test_other_dtypes_and_autocast(transformer_decoder):
    model = tiny(transformer_decoder)
    images, maps = [torch.rand(3, 64, 64), torch.rand(3, 96, 64)], class_maps((64, 64), (96, 64))
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(images, maps)
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    sum(losses.values()).backward()
    model.eval()
    expected = model(images, maps)["loss_ce"]
    for dtype, tolerance in ((torch.float64, 1e-3), (torch.bfloat16, 0.3)):
        loss = model.to(dtype)(images, maps)["loss_ce"]
        torch.testing.assert_close(loss.float(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("transformer_decoder", "sizes"), [(True, [(64, 40), (50, 96)]), (False, [(64, 64)] * 2)])
def test_forward_and_losses_compile_to_one_graph(transformer_decoder, sizes):
    torch._dynamo.reset()
    model = tiny(transformer_decoder, decoder_layers=2).double().eval()
    images, maps = [torch.rand(3, *size).double() for size in sizes], class_maps(*sizes)
    if len(set(sizes)) == 1:
        images, maps = torch.stack(images), torch.stack(maps)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images)["logits"], model(images)["logits"])
    losses, expected = compiled(images, maps), model(images, maps)
    for name in expected:
        torch.testing.assert_close(losses[name], expected[name])


@FORMS
def test_a_saved_model_comes_back_exactly(tmp_path, transformer_decoder):
    model = tiny(transformer_decoder, class_names=list("abcd")).eval()
    model.save_pretrained(tmp_path)
    loaded = PerPixelBaseline.from_pretrained(tmp_path)
    assert loaded.config == model.config and loaded.training
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(loaded.eval()(images)["logits"], model(images)["logits"])


@pytest.mark.parametrize(
    ("transformer_decoder", "names"),
    [(False, "classifier.bias, classifier.weight"), (True, "predictor.query_embed.weight")],
)
def test_another_number_of_classes_is_refused_unless_asked_for(tmp_path, transformer_decoder, names):
    tiny(transformer_decoder).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"num_classes is 7, but {tmp_path} was saved with 4"):
        PerPixelBaseline.from_pretrained(tmp_path, num_classes=7)
    with pytest.warns(UserWarning, match=f"started at random: {names}$"):
        loaded = PerPixelBaseline.from_pretrained(tmp_path, num_classes=7, ignore_mismatched_sizes=True)
    assert loaded(torch.rand(1, 3, 64, 64))["logits"].shape == (1, 7, 16, 16)


class Pooling(nn.Module):
    """A backbone of one convolution and average pooling."""

    channels = (8, 8, 8, 8)

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)

    def forward(self, pixels):
        stem = self.stem(pixels)
        return [nn.functional.avg_pool2d(stem, factor) for factor in (1, 2, 4, 8)]


@FORMS
def test_any_module_can_be_the_backbone(tmp_path, transformer_decoder):
    config = PerPixelBaselineConfig.preset("tiny", CLASSES, transformer_decoder=transformer_decoder)
    model = PerPixelBaseline(config, backbone=Pooling()).eval()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pass the module as backbone="):
        PerPixelBaseline.from_pretrained(tmp_path)
    loaded = PerPixelBaseline.from_pretrained(tmp_path, backbone=Pooling()).eval()
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(loaded(images)["logits"], model(images)["logits"])


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
