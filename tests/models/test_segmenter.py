import copy

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy, interpolate

from fastmask.models import Segmenter, SegmenterConfig
from fastmask.targets import Targets
from tests.helpers.tiny_models import CLASSES, class_maps


def tiny(**options):
    """A model whose weights have been shaken, so that patches differ in their logits."""
    model = Segmenter(SegmenterConfig.preset("tiny", CLASSES, **{"encoder_layers": 2, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("decoder", ["mask", "linear"])
@pytest.mark.parametrize(
    ("size", "grid"),
    [((64, 64), (8, 8)), ((50, 90), (7, 12)), ((1, 1), (1, 1)), ((9, 200), (2, 25)), ((32, 128), (4, 16))],
)
def test_any_size_of_image(decoder, size, grid):
    model = tiny(decoder=decoder)
    images = torch.rand(2, 3, *size)
    logits = model(images)["logits"]
    assert logits.shape == (2, CLASSES, *grid) and logits.isfinite().all()
    for window in (0, None):
        labels, scores = model.predict(images, window=window), model.predict(images, window=window, output="scores")
        for image_labels, image_scores in zip(labels, scores, strict=True):
            assert image_labels.shape == size and image_labels.dtype == torch.uint8
            assert torch.equal(image_labels.long(), image_scores.argmax(0))
            torch.testing.assert_close(image_scores.sum(0), torch.ones(size))


@pytest.mark.parametrize("decoder", ["mask", "linear"])
@pytest.mark.parametrize("distilled", [False, True])
def test_an_image_gives_the_same_in_a_list_as_alone(decoder, distilled):
    model = tiny(decoder=decoder, distilled=distilled).double().eval()
    sizes = [(50, 70), (64, 41), (8, 72)]
    images = [torch.rand(3, *size).double() for size in sizes]
    targets = class_maps(sizes)
    together = model(images)["logits"]
    for i, image in enumerate(images):
        alone = model(image[None])["logits"][0]
        _, rows, columns = alone.shape
        torch.testing.assert_close(together[i, :, :rows, :columns], alone)
        assert torch.equal(
            together[i, :, :, columns:], together[i, :, :, columns - 1 : columns].expand(-1, -1, 9 - columns)
        )
        torch.testing.assert_close(
            model.predict(images, window=0, output="scores")[i],
            model.predict(image[None], window=0, output="scores")[0],
        )
    alone = [model(image[None], target[None])["loss_ce"] for image, target in zip(images, targets, strict=True)]
    counts = torch.tensor([(target != 255).sum() for target in targets])
    torch.testing.assert_close(model(images, targets)["loss_ce"], (torch.stack(alone) * counts).sum() / counts.sum())


def test_images_have_the_channels_of_their_statistics():
    model = tiny(pixel_mean=(0.5,), pixel_std=(0.25,)).eval()
    image = torch.rand(1, 1, 64, 40)
    pixels = (image - 0.5) / 0.25
    torch.testing.assert_close(
        model(image)["logits"], model.decoder(model.encoder(pixels, [(8, 5)])).mT.unflatten(2, (8, 5))
    )
    with pytest.raises(ValueError, match=r"expected \(B, 1, H, W\)"):
        model(torch.rand(1, 3, 64, 40))


def test_a_list_of_images_of_one_size_is_a_batch():
    model = tiny().eval()
    images = torch.rand(3, 3, 40, 56)
    assert torch.equal(model(images)["logits"], model(list(images))["logits"])
    assert all(torch.equal(*pair) for pair in zip(model.predict(images), model.predict(list(images)), strict=True))


def test_the_loss_is_the_cross_entropy_of_upsampled_logits():
    model = tiny().eval()
    images, targets = torch.rand(2, 3, 50, 70), torch.stack(class_maps([(50, 70)] * 2))
    logits = interpolate(model(images)["logits"], size=(56, 72), mode="bilinear")[..., :50, :70]
    torch.testing.assert_close(model(images, targets)["loss_ce"], cross_entropy(logits, targets, ignore_index=255))


def test_the_loss_of_targets_is_that_of_their_class_map():
    model = tiny().eval()
    images, classes = torch.rand(2, 3, 50, 70), torch.stack(class_maps([(50, 70)] * 2))
    targets = Targets.from_segmentation(classes, CLASSES)
    expected = model(images, classes)
    assert torch.equal(model(images, targets)["loss_ce"], expected["loss_ce"])
    assert torch.equal(model(images, targets.to_list())["loss_ce"], expected["loss_ce"])
    for other in (list(classes), classes.to(torch.uint8), classes.to(torch.int32)):
        assert torch.equal(model(images, other)["loss_ce"], expected["loss_ce"])


@pytest.mark.parametrize("ignore_index", [255, -1, -100, CLASSES])
def test_ignored_pixels_do_not_count(ignore_index):
    model = tiny(ignore_index=ignore_index).eval()
    images = torch.rand(2, 3, 64, 64)
    targets = torch.randint(0, CLASSES, (2, 64, 64))
    targets[:, 30:] = ignore_index
    logits = interpolate(model(images)["logits"], size=(64, 64), mode="bilinear")[..., :30, :]
    torch.testing.assert_close(model(images, targets)["loss_ce"], cross_entropy(logits, targets[:, :30]))
    loss = model(images, torch.full_like(targets, ignore_index))["loss_ce"]
    loss.backward()
    assert loss == 0 and not any(parameter.grad.any() for parameter in model.parameters())


def test_dropout_and_stochastic_depth_act_in_training_only():
    options = {"drop_path": 0.5, "dropout": 0.1, "decoder_dropout": 0.1, "decoder_drop_path": 0.2}
    model = tiny(**options, encoder_layers=3, decoder_layers=2)
    assert [block.drop_path.rate for block in model.encoder.blocks] == [0.0, 0.25, 0.5]
    assert [block.drop_path.rate for block in model.decoder.blocks] == [0.0, 0.2]
    images = torch.rand(2, 3, 64, 64)
    assert not torch.equal(model(images)["logits"], model(images)["logits"])
    model.eval()
    assert torch.equal(model(images)["logits"], model(images)["logits"])


def test_stochastic_depth_keeps_the_mean():
    drop = tiny(drop_path=0.25, encoder_layers=2).encoder.blocks[1].drop_path.train()
    dropped = drop(torch.ones(10000, 2, 3))
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert torch.equal(dropped, dropped[:, :1, :1].expand(-1, 2, 3))
    assert dropped.mean() == pytest.approx(1, abs=0.02)


def test_prediction_leaves_modes_and_weights_as_they_were():
    model = tiny().train()
    model.encoder.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    before = copy.deepcopy(model.state_dict())
    result = model.predict(torch.rand(1, 3, 64, 64), output="scores")[0]
    assert not result.requires_grad
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_predictions_in_other_dtypes(dtype):
    model = tiny().eval()
    images = [torch.rand(3, 64, 64), torch.rand(3, 40, 64)]
    scores = model.predict(images, output="scores")
    model.to(dtype)
    tolerance = {torch.bfloat16: 0.3, torch.float16: 0.05, torch.float64: 1e-3}[dtype]
    for one, other in zip(model.predict(images, output="scores"), scores, strict=True):
        torch.testing.assert_close(one.float(), other, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", ["ViT", "DeiT"])
@pytest.mark.parametrize("image_size", [(24, 24), (32, 16)])
def test_the_encoder_starts_from_a_model_of_transformers(tmp_path, kind, image_size):
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=24,
        patch_size=8,
        layer_norm_eps=1e-5,
    )
    theirs = getattr(transformers, f"{kind}ForImageClassification")(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    shape = {"hidden_dim": 32, "encoder_layers": 2, "num_heads": 2, "feedforward_dim": 48, "decoder_heads": 2}
    ours = SegmenterConfig(3, image_size=image_size, patch_size=8, distilled=kind == "DeiT", **shape)
    model = Segmenter(ours, pretrained_backbone=str(tmp_path)).eval()
    if image_size == (24, 24):
        images = torch.rand(2, 3, 24, 24)
        expected = getattr(theirs, kind.lower())((images - 0.5) / 0.5).last_hidden_state
        patches = model.encoder((images - 0.5) / 0.5, [(3, 3)] * 2)
        torch.testing.assert_close(patches, expected[:, 1 + ours.distilled :], rtol=1e-5, atol=1e-5)
    with pytest.raises(
        ValueError, match=r"expected vit or deit|has .* of shape .*; the configuration asks for|missing"
    ):
        Segmenter(ours.replace(encoder_layers=3), pretrained_backbone=str(tmp_path))
    with pytest.raises(ValueError, match="the configuration asks for"):
        Segmenter(ours.replace(feedforward_dim=64), pretrained_backbone=str(tmp_path))


def test_wrong_backbones_are_named(tmp_path):
    transformers.ResNetConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is of model type 'resnet'; expected vit or deit"):
        Segmenter(SegmenterConfig.preset("tiny", 3), pretrained_backbone=str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((10,), {}, TypeError, "config must be a SegmenterConfig, got int"),
        ((SegmenterConfig(3),), {"patch_size": 8}, TypeError, "Segmenter got a config and its fields patch_size"),
        ((), {"num_classes": 3, "queries": 5}, TypeError, "queries"),
        ((), {}, TypeError, "num_classes"),
    ],
)
def test_wrong_constructions_are_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        Segmenter(*arguments, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"output": "masks"}, ValueError, "output must be one of labels, scores, got 'masks'"),
        ({"window": -1}, ValueError, "window_size is -1"),
        ({"window": (32, 33)}, ValueError, r"window_stride is 33; expected in 1..32"),
        ({"window": (32, 0)}, ValueError, "window_stride is 0"),
        ({"window": "64"}, TypeError, "window must be a size or"),
        ({"window": (1, 2, 3)}, TypeError, "window must be a size or"),
        ({"window": 2.5}, TypeError, "window must be a size or"),
        ({"window_batch": 0}, ValueError, "window_batch must be at least 1, got 0"),
        ({"sizes": [(4, 4)]}, ValueError, "sizes has 1 entries; the model got 2 images"),
    ],
)
def test_wrong_predictions_are_named(options, error, message):
    model = tiny()
    model.encoder.forward = lambda *arguments: pytest.fail("the encoder ran")
    with pytest.raises(error, match=message):
        model.predict(torch.rand(2, 3, 64, 64), **options)


def test_wrong_targets_fail_before_any_work():
    model = tiny()
    model.encoder.forward = lambda *arguments: pytest.fail("the encoder ran")
    for targets in (torch.zeros(2, 64, 32, dtype=torch.int64), torch.full((2, 64, 64), CLASSES), [torch.zeros(64, 64)]):
        with pytest.raises((ValueError, TypeError), match="targets"):
            model(torch.rand(2, 3, 64, 64), targets)
