import pytest
import torch
from torch import nn

from fastmask.functional import instance_inference, panoptic_inference, semantic_inference
from fastmask.models import MaskFormer, MaskFormerConfig
from fastmask.models._inference import check_sizes

CLASSES = 4


@pytest.fixture
def model():
    """A model whose every query predicts some class, with masks of both signs, so that every task finds something."""
    torch.manual_seed(0)
    model = MaskFormer(MaskFormerConfig.preset("tiny", CLASSES, num_queries=6, stuff_classes=[2, 3]))
    nn.init.normal_(model.predictor.class_embed.weight)
    nn.init.constant_(model.predictor.class_embed.bias[-1:], -50)
    nn.init.normal_(model.pixel_decoder.mask_features.weight)
    return model.train()


def logits(model, images):
    training = model.training
    with torch.inference_mode():
        outputs = model.eval()(images)
    model.train(training)
    return outputs["pred_logits"], outputs["pred_masks"]


def assert_panoptic_equal(one, other):
    assert torch.equal(one[0], other[0]) and one[1] == other[1]


def assert_instances_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name])


def test_semantic_results_have_the_images_own_sizes(model):
    images = [torch.rand(3, 40, 70), torch.rand(3, 64, 50)]
    results = model.predict(images)
    assert [tuple(result.shape) for result in results] == [(40, 70), (64, 50)]
    assert all(result.max() < CLASSES for result in results)


@pytest.mark.parametrize("size", [None, (64, 64), (100, 90)])
def test_a_batch_of_one_size_goes_through_padded_and_valid_size(model, size):
    """The padded input is 64 x 96, of which the image is the top left 60 x 80."""
    images = torch.rand(2, 3, 60, 80)
    steps = {"padded_size": (64, 96), "valid_size": (60, 80)}
    classes, masks = logits(model, images)
    final = size or (60, 80)

    expected = semantic_inference(classes, masks, final, **steps)
    assert torch.equal(torch.stack(model.predict(images, sizes=size)), expected)

    expected = panoptic_inference(classes, masks, final, threshold=0.1, stuff_classes=(2, 3), **steps)
    results = model.predict(images, "panoptic", sizes=size, threshold=0.1)
    assert any(infos for _, infos in results)
    for result, image_expected in zip(results, expected, strict=True):
        assert_panoptic_equal(result, image_expected)

    expected = instance_inference(classes, masks, final, top_k=5, stuff_classes=(2, 3), **steps)
    for result, image_expected in zip(model.predict(images, "instance", sizes=size, top_k=5), expected, strict=True):
        assert result["masks"].shape[1:] == final
        assert_instances_equal(result, image_expected)


def test_images_of_different_sizes_are_cropped_one_by_one(model):
    images = [torch.rand(3, 40, 70), torch.rand(3, 64, 50)]
    sizes = [(20, 35), (128, 100)]
    classes, masks = logits(model, images)
    results = model.predict(images, "semantic", sizes=sizes, output="scores")
    for b, (image, size) in enumerate(zip(images, sizes, strict=True)):
        expected = semantic_inference(
            classes[b : b + 1],
            masks[b : b + 1],
            size,
            output="scores",
            padded_size=(64, 96),
            valid_size=tuple(image.shape[1:]),
        )
        torch.testing.assert_close(results[b], expected[0])


def test_an_image_that_fills_the_batch_needs_one_resize_only(model):
    images = torch.rand(2, 3, 64, 96)
    classes, masks = logits(model, images)
    assert torch.equal(torch.stack(model.predict(images)), semantic_inference(classes, masks, (64, 96)))


def test_stuff_classes_can_be_overridden(model):
    images = torch.rand(1, 3, 64, 64)
    for stuff in ((), (0, 1, 2, 3)):
        _, infos = model.predict(images, "panoptic", threshold=0.0, overlap_threshold=0.0, stuff_classes=stuff)[0]
        assert infos and all(info["isthing"] == (info["category_id"] not in stuff) for info in infos)


def test_prediction_leaves_the_modes_as_they_were(model):
    model.backbone.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    result = model.predict(torch.rand(1, 3, 64, 64), "instance")[0]
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert not result["scores"].requires_grad
    model.predictor.forward = lambda *arguments, **options: (_ for _ in ()).throw(RuntimeError("stop"))
    with pytest.raises(RuntimeError, match="stop"):
        model.predict(torch.rand(1, 3, 64, 64))
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_prediction_does_not_change_running_statistics(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.predict(torch.rand(2, 3, 64, 64))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_masks_are_computed_after_the_last_layer_only(model):
    seen = []
    model.predictor.mask_embed.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[0]))
    model.predict(torch.rand(1, 3, 64, 64))
    model(torch.rand(1, 3, 64, 64))
    assert seen == [1, 3]


def test_unknown_tasks_and_options_are_named(model):
    with pytest.raises(ValueError, match="unknown task 'depth'; expected one of semantic, general, panoptic, instance"):
        model.predict(torch.rand(1, 3, 64, 64), "depth")
    with pytest.raises(TypeError, match="top_k"):
        model.predict(torch.rand(1, 3, 64, 64), "semantic", top_k=3)


def test_sizes_stand_for_all_images_or_for_each():
    images = [(4, 5), (6, 7)]
    assert check_sizes(None, images) == ((4, 5), (6, 7))
    assert check_sizes((8, 9), images) == ((8, 9), (8, 9))
    assert check_sizes([(8, 9), (1, 2)], images) == ((8, 9), (1, 2))
    assert check_sizes(torch.tensor([[8, 9], [1, 2]]), images) == ((8, 9), (1, 2))
    assert check_sizes([torch.Size((8, 9)), [1, 2]], images) == ((8, 9), (1, 2))
    assert check_sizes([(8, 9)], images[:1]) == ((8, 9),)


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ([(8, 9)], ValueError, "sizes has 1 entries; the model got 2 images"),
        ([(8, 9)] * 3, ValueError, "sizes has 3 entries"),
        ((8, 0), ValueError, r"sizes holds \(8, 0\)"),
        ([(8, 9), (-1, 4)], ValueError, r"sizes holds \(-1, 4\)"),
        (8, TypeError, "got 8"),
        ((8, 9, 10), TypeError, r"got \(8, 9, 10\)"),
        ((8.0, 9.0), TypeError, r"got \(8.0, 9.0\)"),
        ([], ValueError, "sizes has 0 entries; the model got 2 images"),
    ],
)
def test_wrong_sizes_are_named(sizes, error, message):
    with pytest.raises(error, match=message):
        check_sizes(sizes, [(4, 5), (6, 7)])
