"""Hugging Face's Mask2Former: outputs, losses and gradients of a converted model, and checkpoints there and back."""

from __future__ import annotations

import copy
from functools import partial
from unittest import mock

import pytest
import torch
import transformers
from typer.testing import CliRunner

from fastmask import Mask2Former, PointSampling
from fastmask.cli.main import app
from fastmask.integrations.checkpoints import (
    from_hugging_face_mask2former,
    from_original_mask2former,
    to_hugging_face_mask2former,
    to_original_mask2former,
)
from fastmask.integrations.checkpoints.hugging_face_mask2former import rules_of
from fastmask.integrations.checkpoints.names import to_own
from tests.helpers.foreign_models import assert_same_weights
from tests.helpers.tiny_models import mask_targets

CLASSES, POINTS = 5, 60
STAGES = ["stage1", "stage2", "stage3", "stage4"]
FIELDS = {
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1], "layer_type": "basic"},
    "swin": {"embed_dim": 16, "depths": [2, 1, 1, 1], "num_heads": [2, 2, 2, 2], "window_size": 4},
}


def hugging_face(backbone, **options):
    """A seeded model whose parameters all differ from the values that they start with."""
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(backbone, **FIELDS[backbone])
    config.out_features = STAGES
    sizes = {"feature_size": 64, "mask_feature_size": 24, "encoder_feedforward_dim": 40, "dim_feedforward": 48}
    sizes |= {"num_attention_heads": 4, "encoder_layers": 2, "decoder_layers": 5, "num_queries": 7, "hidden_dim": 32}
    labels = {f"class {i}": i for i in range(CLASSES)}
    config = transformers.Mask2FormerConfig(
        backbone_config=config,
        train_num_points=POINTS,
        id2label={i: name for name, i in labels.items()},
        label2id=labels,
        **sizes | options,
    )
    model = transformers.Mask2FormerForUniversalSegmentation(config).eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *(b for b in model.model.buffers() if b.is_floating_point())):
            tensor.add_(0.1 * torch.rand_like(tensor))
    return model


def pixels_of(model, images):
    return (images - model.preprocessor.mean) / model.preprocessor.std


def assert_same_outputs(model, theirs):
    """All layers, in float64, in which no rounding decides where a query attends."""
    images = torch.rand(2, 3, 64, 96).double()
    model, theirs = (copy.deepcopy(network).eval().double() for network in (model, theirs))
    with torch.no_grad():
        outputs = model(images)
        expected = theirs(pixels_of(model, images), output_auxiliary_logits=True)
    layers = [*expected.auxiliary_logits, expected]
    assert len(layers) == len(outputs["class_logits"]) == model.config.decoder_layers + 1
    for i, layer in enumerate(layers):
        close = {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(outputs["class_logits"][i], layer["class_queries_logits"], **close)
        torch.testing.assert_close(outputs["mask_logits"][i], layer["masks_queries_logits"], **close)


@pytest.mark.parametrize("source", ["folder", "model"])
@pytest.mark.parametrize("backbone", FIELDS)
def test_hugging_face_computes_the_same(backbone, source, tmp_path):
    theirs = hugging_face(backbone)
    theirs.save_pretrained(tmp_path)
    model = from_hugging_face_mask2former(tmp_path if source == "folder" else theirs)
    assert_same_outputs(model, theirs)
    config = model.config
    assert config.class_names == tuple(f"class {i}" for i in range(CLASSES))
    assert (config.num_points, config.mask_cost, config.decoder_layers) == (POINTS, 5.0, 4)
    back = to_hugging_face_mask2former(model)
    assert_same_outputs(model, back)
    assert_same_weights(theirs, back)


class SamePoints(PointSampling):
    """The same points for every image and pair."""

    fixed = torch.rand(POINTS, 2, generator=torch.Generator().manual_seed(2))

    def shared(self, batch_size, device, generator=None):
        return self.fixed.expand(batch_size, -1, -1)

    def uncertain(self, mask_logits, assignment, **_):
        return self.fixed.expand(*assignment.shape, -1, -1)


def their_step(model, images, targets):
    """The loss and the gradients of transformers' model at those points."""
    points = SamePoints.fixed.to(images)
    labels = {
        "mask_labels": [target["masks"].to(images) for target in targets],
        "class_labels": [target["labels"] for target in targets],
    }
    sample = mock.patch.object(
        model.criterion, "sample_points_using_uncertainty", lambda logits, *_: points.expand(len(logits), -1, -1)
    )
    with sample, mock.patch.object(torch, "rand", return_value=points[None]):
        loss = model(images, **labels).loss
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return loss.detach(), {**model.state_dict(), **gradients}


@pytest.mark.parametrize("counts", [[3, 1], [2, 0], [9, 2]], ids=str)
@pytest.mark.parametrize("backbone", FIELDS)
def test_losses_and_gradients_are_the_same(backbone, counts):
    """In float64, by the reference."""
    torch.manual_seed(3)
    theirs = hugging_face(backbone).double()
    model = from_hugging_face_mask2former(theirs).eval().double()
    model.criterion.points = model.criterion.matcher.points = SamePoints(POINTS)
    model.criterion.backend = model.criterion.matcher.backend = "reference"
    images, targets = torch.rand(2, 3, 64, 96).double(), mask_targets([(64, 96)] * 2, counts)
    loss, gradients = their_step(theirs, pixels_of(model, images), targets)
    losses = model(images, targets)
    total = sum(losses.values())
    assert len(losses) == 3 * 5
    torch.testing.assert_close(total, loss, rtol=1e-5, atol=0, check_dtype=False)
    total.backward()
    expected = to_own(gradients, model.weights(), rules_of(model), ignored=".*")
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            scale = expected[name].abs().max().item()
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-5 * scale + 1e-9, msg=name)
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without <= {"backbone.swin.layernorm.weight", "backbone.swin.layernorm.bias"}


def test_losses_of_the_kernels_are_the_same():
    torch.manual_seed(4)
    theirs = hugging_face("swin")
    model = from_hugging_face_mask2former(theirs).eval()
    model.criterion.points = model.criterion.matcher.points = SamePoints(POINTS)
    images, targets = torch.rand(2, 3, 64, 96), mask_targets([(64, 96)] * 2, [3, 1])
    loss, _ = their_step(theirs, pixels_of(model, images), targets)
    torch.testing.assert_close(sum(model(images, targets).values()), loss, rtol=1e-5, atol=0)


def small_model(**options):
    sizes = {"hidden_dim": 32, "mask_dim": 16, "pixel_decoder_dim": 32, "decoder_layers": 3, "num_heads": 8}
    sizes |= {"encoder_layers": 1, "encoder_feedforward_dim": 32, "feedforward_dim": 32, "num_queries": 5}
    torch.manual_seed(0)
    return Mask2Former(
        num_classes=3, **{"backbone": "resnet", "backbone_options": FIELDS["resnet"], **sizes, **options}
    )


def test_commands_convert_there_and_back(tmp_path):
    model = small_model(backbone="swin", backbone_options=FIELDS["swin"])
    model.save_pretrained(tmp_path / "fastmask")
    source = tmp_path / "fastmask"
    for form, name in (("huggingface", "hf"), ("original", "model.pth"), ("huggingface", "again"), ("fastmask", "end")):
        run = partial(CliRunner().invoke, app, catch_exceptions=False)
        assert run(["convert", str(source), str(tmp_path / name), "--to", form]).exit_code == 0
        source = tmp_path / name
    loaded = Mask2Former.from_pretrained(source)
    for name, value in model.weights().items():
        assert torch.equal(loaded.weights()[name], value) or name.startswith("backbone.swin.layernorm"), name


def test_the_original_gets_every_weight():
    model = small_model()
    again = from_original_mask2former(to_original_mask2former(model))
    assert all(
        torch.equal(again.weights()[name], value)
        for name, value in model.weights().items()
        if "num_batches_tracked" not in name
    )


def test_what_hugging_face_cannot_hold():
    bottleneck = FIELDS["resnet"] | {"layer_type": "bottleneck"}
    for options, message in (
        ({"backbone": "tiny", "backbone_options": {}}, "the backbone has 3 maps and encoder_points is 4"),
        ({"encoder_points": 3}, "the backbone has 4 maps and encoder_points is 3"),
        ({"mask_cost": 4.0}, "mask_cost differ from the losses' weights"),
        (
            {"backbone": "resnet-c", "backbone_options": bottleneck},
            "backbone is 'resnet-c'; expected a ResNet or a Swin",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            to_hugging_face_mask2former(small_model(**options))


def test_what_fastmask_cannot_hold():
    with pytest.raises(ValueError, match="pre_norm is True; fastmask's Mask2Former has False"):
        from_hugging_face_mask2former(hugging_face("resnet", pre_norm=True))
    with pytest.raises(ValueError, match="enforce_input_projection is True"):
        from_hugging_face_mask2former(hugging_face("resnet", hidden_dim=64, enforce_input_projection=True))
    with pytest.raises(ValueError, match="num_queries=7; ignore_mismatched_sizes=True"):
        from_hugging_face_mask2former(hugging_face("resnet"), num_queries=9)
    with pytest.warns(UserWarning, match="started at random: predictor.query_feat.weight, predictor.query_embed"):
        model = from_hugging_face_mask2former(hugging_face("resnet"), num_queries=9, ignore_mismatched_sizes=True)
    assert (model.config.num_queries, model.config.num_classes) == (9, CLASSES)
