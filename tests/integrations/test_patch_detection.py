"""Patched models of transformers' DETR family compute what they computed before, with one assignment for all layers."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
from torch import nn
from torch.nn.functional import grid_sample
from transformers.loss import loss_for_object_detection, loss_rf_detr, loss_rt_detr
from transformers.loss.loss_utils import LOSS_MAPPING

import fastmask
from fastmask.integrations.transformers import detr
from fastmask.integrations.transformers.rf_detr import nearest_pixels
from tests.helpers.detection_models import MODELS, NUM_CLASSES, NUM_QUERIES, SIZE, random_labels, tiny_detector
from tests.helpers.foreign_models import train_step
from tests.integrations.test_patch_points import assert_same_step

BATCHES = {
    "usual": (4, 2),
    "an image without targets": (3, 0),
    "no targets": (0, 0),
    "more targets than queries": (NUM_QUERIES + 3, 1),
}
SEGMENTING = [name for name in MODELS if name.endswith("Segmentation")]
RF_DETR = "RfDetrForInstanceSegmentation"


def assert_same_losses(actual, expected):
    assert list(actual.loss_dict) == list(expected.loss_dict)
    for key, loss in expected.loss_dict.items():
        torch.testing.assert_close(actual.loss_dict[key], loss, rtol=1e-5, atol=1e-6)


# Without any targets transformers' loss of RF-DETR is empty; see test_rf_detr_without_targets.
CASES = [(name, batch) for name in MODELS for batch in BATCHES if (name, batch) != (RF_DETR, "no targets")]


@pytest.mark.parametrize(("name", "batch"), CASES)
def test_losses_and_gradients_stay(name, batch):
    model, arguments = tiny_detector(name), random_labels(1, BATCHES[batch], text="Grounding" in name)
    expected = train_step(model, arguments)
    after = torch.rand(1)
    actual = train_step(fastmask.patch(model), arguments)
    assert torch.rand(1) == after
    assert_same_step(actual, expected)
    assert_same_losses(actual[0], expected[0])


@pytest.mark.parametrize("name", MODELS)
def test_one_assignment_on_the_device(name, monkeypatch):
    """No layer, group or image is handed to SciPy."""
    shapes, assign = [], detr.assign

    def counting(cost, counts):
        shapes.append(cost.shape)
        return assign(cost, counts)

    monkeypatch.setattr(detr, "assign", counting)
    for module in (loss_for_object_detection, loss_rt_detr, loss_rf_detr):
        monkeypatch.delattr(module, "linear_sum_assignment")
    model = fastmask.patch(tiny_detector(name))
    model(**random_labels(1, text="Grounding" in name))
    num_groups = getattr(model.config, "group_detr", 1)
    num_layers = shapes[0][0]
    assert len(shapes) == (2 if "Grounding" in name else 1)  # Grounding DINO's encoder has a call of its own
    assert num_layers >= (1 if "Yolos" in name else 2)  # YOLOS has no auxiliary losses
    assert shapes[0][1:] == (2, num_groups, NUM_QUERIES, 4)


@pytest.mark.parametrize("name", MODELS)
def test_evaluation(name):
    """Without groups and denoising, and with all outputs that can be asked for."""
    model, arguments = tiny_detector(name).eval(), random_labels(2, text="Grounding" in name)
    options = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        torch.manual_seed(0)
        expected = model(**arguments, **options)
        fastmask.patch(model)
        torch.manual_seed(0)
        actual = model(**arguments, **options)
    assert list(actual) == list(expected)
    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["DetrForSegmentation", RF_DETR])
def test_patching_changes_classes_only(name, caplog):
    model, arguments = tiny_detector(name), random_labels(3)
    before = {key: (type(module), dict(vars(module))) for key, module in model.named_modules()}
    function = model.loss_function
    expected = train_step(model, arguments)
    with caplog.at_level(logging.INFO, "fastmask"):
        fastmask.patch(fastmask.patch(model))
        train_step(model, arguments)
    # The model, the detector in it and two deformable attentions, and nothing in a step.
    assert len(caplog.records) == (4 if name == RF_DETR else 2)
    assert LOSS_MAPPING[model.loss_type] is function
    assert_same_step(train_step(copy.deepcopy(model), arguments), expected)
    fastmask.unpatch(model)
    assert model.loss_function is function
    for key, module in model.named_modules():
        assert type(module) is before[key][0]
        assert vars(module).keys() == before[key][1].keys()


def test_pickled_models():
    """Before their first step: transformers then hangs hooks into them that cannot be pickled."""
    model, arguments = fastmask.patch(tiny_detector("DetrForSegmentation")), random_labels(3)
    twin = pickle.loads(pickle.dumps(model))
    assert type(twin) is type(model)
    assert_same_step(train_step(fastmask.unpatch(twin), arguments), train_step(model, arguments))


def test_loss_functions_of_the_users_own():
    """One of transformers' is patched, another stays."""
    model, arguments = tiny_detector("DetrForObjectDetection"), random_labels(4)
    expected = train_step(model, arguments)
    fastmask.patch(model)
    model.loss_function = LOSS_MAPPING["DetrForObjectDetection"[4:]]
    assert model.loss_function is not LOSS_MAPPING["ForObjectDetection"]
    assert_same_step(train_step(model, arguments), expected)
    own = lambda logits, *_, **__: (logits.sum(), {}, None)  # noqa: E731
    model.loss_function = own
    assert model.loss_function is own
    fresh = tiny_detector("DetrForObjectDetection")
    fresh.loss_function = own
    with pytest.raises(TypeError, match="knows nothing inside DetrForObjectDetection"):
        fastmask.patch(fresh)


def test_a_criterion_by_itself():
    config = tiny_detector("RTDetrForObjectDetection").config
    config.use_focal_loss = False
    generator = torch.Generator().manual_seed(0)
    outputs = {
        "logits": torch.randn(2, NUM_QUERIES, NUM_CLASSES, generator=generator),
        "pred_boxes": torch.rand(2, NUM_QUERIES, 4, generator=generator),
    }
    labels, criterion = random_labels(5)["labels"], loss_rt_detr.RTDetrLoss(config)
    expected, pairs = criterion(outputs, labels), criterion.matcher(outputs, labels)
    fastmask.patch(criterion)
    for key, loss in criterion(outputs, labels).items():
        torch.testing.assert_close(loss, expected[key])
    for ours, theirs in zip(criterion.matcher(outputs, labels), pairs, strict=True):
        assert all(x.equal(y) for x, y in zip(ours, theirs, strict=True))
    assert not vars(criterion.matcher).keys() & {"matched"}


class OddMatcher(loss_for_object_detection.HungarianMatcher):
    def forward(self, outputs, targets):
        return [(torch.arange(len(t["boxes"])), torch.arange(len(t["boxes"]))) for t in targets]


def test_matchers_of_the_users_own():
    """A subclass that overrides forward stays; a class that fastmask does not know is refused."""
    generator = torch.Generator().manual_seed(1)
    outputs = {
        "logits": torch.randn(2, NUM_QUERIES, NUM_CLASSES + 1, generator=generator),
        "pred_boxes": torch.rand(2, NUM_QUERIES, 4, generator=generator),
        "pred_masks": torch.randn(2, NUM_QUERIES, 8, 8, generator=generator),
    }
    arguments = (NUM_CLASSES, 0.1, ["labels", "boxes", "masks"])
    criterion, labels = loss_for_object_detection.ImageLoss(OddMatcher(), *arguments), random_labels(6)["labels"]
    expected = criterion(outputs, labels)
    for key, loss in fastmask.patch(criterion)(outputs, labels).items():
        torch.testing.assert_close(loss, expected[key])
    with pytest.raises(TypeError, match="the matcher of ImageLoss is a Identity, whose costs fastmask does not know"):
        fastmask.patch(loss_for_object_detection.ImageLoss(nn.Identity(), *arguments))


@pytest.mark.parametrize("name", ["DetrForSegmentation", RF_DETR])
def test_bad_labels(name):
    model = fastmask.patch(tiny_detector(name))
    batch = random_labels(7)
    batch["labels"][0]["class_labels"][1] = NUM_CLASSES + 2
    with pytest.raises(ValueError, match=r'labels\[0\]\["class_labels"\] holds 7; expected 0..'):
        model(**batch)
    batch = random_labels(7)
    batch["labels"][1]["masks"][0, 0, 0] = 0.5
    with pytest.raises(ValueError, match=r'labels\[1\]\["masks"\] holds 0.5'):
        model(**batch)
    batch = random_labels(7)
    batch["labels"][1]["boxes"][0, 2] = -1
    with pytest.raises(ValueError, match="boxes holds a size that is negative or NaN"):
        model(**batch)


def test_masks_of_several_sizes():
    """DETR pads them, and RF-DETR refuses them in transformers too."""
    batch = random_labels(8)
    batch["labels"][1]["masks"] = batch["labels"][1]["masks"][:, :40]
    model = tiny_detector("DetrForSegmentation")
    expected = train_step(model, batch)
    assert_same_step(train_step(fastmask.patch(model), batch), expected)
    with pytest.raises(ValueError, match="the masks of labels are of different sizes"):
        fastmask.patch(tiny_detector(RF_DETR))(**batch)


def test_rf_detr_without_targets():
    """transformers' losses are empty, and backward fails; with the fix they are zero."""
    model, batch = tiny_detector(RF_DETR), random_labels(9, (0, 0))
    expected = model(**batch)
    assert expected.loss.numel() == 0
    assert_same_losses(fastmask.patch(model)(**batch), expected)
    outputs, gradients = train_step(fastmask.patch(model, fix=True), batch)
    assert outputs.loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("name", SEGMENTING)
def test_half_precision(name):
    model, batch = tiny_detector(name), random_labels(10)
    with torch.autocast("cpu", torch.bfloat16):
        expected = train_step(model, batch)
        outputs, gradients = train_step(fastmask.patch(model), batch)
    torch.testing.assert_close(outputs.loss, expected[0].loss, rtol=2e-2, atol=0)
    assert gradients.keys() == expected[1].keys()


def test_nan_masks_are_matched_last():
    matcher = fastmask.patch(loss_rf_detr.RfDetrHungarianMatcher())
    generator, labels = torch.Generator().manual_seed(2), random_labels(11, (3, 1))["labels"]
    outputs = {
        "logits": torch.randn(2, NUM_QUERIES, NUM_CLASSES, generator=generator),
        "pred_boxes": torch.rand(2, NUM_QUERIES, 4, generator=generator),
        "pred_masks": torch.randn(2, NUM_QUERIES, 16, 16, generator=generator),
    }
    queries = matcher(outputs, labels, 1)[0][0]
    outputs["pred_masks"][0, queries[0]] = torch.nan
    assert queries[0] not in matcher(outputs, labels, 1)[0][0]


def test_the_pixels_are_those_of_grid_sample():
    """On borders between pixels too, where the rule for halves decides."""
    height, width = 4, 8
    planes = torch.arange(1.0, height * width + 1).view(1, 1, height, width)
    points = torch.cat([torch.rand(500, 2), torch.cartesian_prod(torch.arange(17) / 16, torch.arange(9) / 8)])
    expected = grid_sample(planes, 2 * points[None, :, None] - 1, mode="nearest", align_corners=False).flatten()
    index, inside = nearest_pixels(points, (height, width))
    assert (planes.flatten()[index] * inside).equal(expected)
    assert not inside.all()


def test_a_subclass_of_rf_detrs_criterion():
    """It compares masks in its own way; the rest is replaced."""

    class OtherMasks(loss_rf_detr.RfDetrImageLoss):
        def loss_masks(self, outputs, targets, indices, num_boxes):
            return {name: 2 * loss for name, loss in super().loss_masks(outputs, targets, indices, num_boxes).items()}

    config = tiny_detector(RF_DETR).config
    matcher = loss_rf_detr.RfDetrHungarianMatcher(2, 5, 2, 16, 5.0, 5.0)
    arguments = (config.num_labels, 0.25, ["labels", "boxes", "masks"], 1, 16)
    criterion, generator = OtherMasks(matcher, *arguments), torch.Generator().manual_seed(3)
    outputs = {
        "logits": torch.randn(2, NUM_QUERIES, NUM_CLASSES, generator=generator),
        "pred_boxes": 0.3 + 0.2 * torch.rand(2, NUM_QUERIES, 4, generator=generator),
        "pred_masks": torch.randn(2, NUM_QUERIES, SIZE // 4, SIZE // 4, generator=generator),
    }
    labels, results = random_labels(12)["labels"], []
    for change in (fastmask.unpatch, fastmask.patch):
        change(criterion)
        torch.manual_seed(0)
        results.append(criterion(outputs | {"auxiliary_outputs": [dict(outputs)]}, labels))
    assert list(results[0]) == list(results[1])
    for key, loss in results[0].items():
        torch.testing.assert_close(results[1][key], loss, rtol=1e-5, atol=1e-6)
