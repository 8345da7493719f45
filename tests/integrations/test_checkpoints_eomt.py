"""Checkpoints of transformers' EoMT, with DINOv2 and DINOv3: the same outputs, losses and gradients, there and back."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
import transformers
from torch import Tensor

from fastmask import PointSampling
from fastmask.integrations.checkpoints import convert_checkpoint, from_hugging_face_eomt, to_hugging_face_eomt
from fastmask.models import EoMT, EoMTConfig, load_model
from tests.helpers.foreign_models import COMMON, EOMT, NUM_CLASSES, NUM_POINTS, SIZE, random_batch

KINDS = {
    "dinov2": {},
    "dinov2 with swiglu": {"use_swiglu_ffn": True},
    "dinov3": {"intermediate_size": 64, "pos_embed_rescale": 1.0},
}


def hugging_face(kind):
    """A tiny model with every weight at random. Eager attention: SDPA misreads the float32 masks of float64 models."""
    torch.manual_seed(0)
    names = {f"class {i}": i for i in range(NUM_CLASSES)}
    prefix = "EomtDinov3" if kind == "dinov3" else "Eomt"
    common = {name: value for name, value in COMMON.items() if name != "num_labels"}
    labels = {"label2id": names, "id2label": {i: name for name, i in names.items()}}
    config = getattr(transformers, f"{prefix}Config")(image_size=SIZE, **common, **EOMT, **labels, **KINDS[kind])
    model = getattr(transformers, f"{prefix}ForUniversalSegmentation")(config)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def normalized(model, images):
    return (images - model.preprocessor.mean) / model.preprocessor.std


def assert_same_outputs(model, theirs):
    model, theirs = copy.deepcopy(model).eval().double(), copy.deepcopy(theirs).eval().double()
    images = torch.rand(2, 3, SIZE, SIZE).double()
    # Not (1, 0): at inference, theirs then masks the second block by the first one's mask.
    for probabilities in ((1.0, 1.0), (0.0, 1.0), (0.0, 0.0)):
        theirs.attn_mask_probs.copy_(torch.tensor(probabilities))
        model.set_mask_probabilities(probabilities)
        with torch.no_grad():
            outputs, expected = model(images), theirs(normalized(model, images))
        torch.testing.assert_close(outputs["pred_logits"], expected.class_queries_logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(outputs["pred_masks"], expected.masks_queries_logits, rtol=1e-5, atol=1e-5)
        shares = (expected.masks_queries_logits > 0).double().mean((0, 2, 3))
        assert shares.min() > 0 and shares.max() < 1  # the masks mask


@pytest.mark.parametrize("kind", KINDS)
def test_hugging_face_computes_the_same(kind, tmp_path):
    theirs = hugging_face(kind)
    theirs.attn_mask_probs.copy_(torch.tensor((0.25, 1.0)))
    theirs.save_pretrained(tmp_path)
    for source in (tmp_path, theirs):
        model = from_hugging_face_eomt(source)
        assert model.config.class_names == tuple(f"class {i}" for i in range(NUM_CLASSES))
        assert model.config.mask_probabilities == (0.25, 1.0) and model.training
        back = to_hugging_face_eomt(model)
        weights = theirs.state_dict()
        assert back.state_dict().keys() == weights.keys()
        assert all(torch.equal(value, weights[name]) for name, value in back.state_dict().items())
        changed = {name for name, value in back.config.to_dict().items() if value != theirs.config.to_dict().get(name)}
        assert changed <= {"architectures", "dtype"}
    assert_same_outputs(model, theirs)


@dataclass(frozen=True)
class FixedPoints(PointSampling):
    """The same points for each image, for costs and for losses."""

    def shared(self, batch_size, device, generator=None) -> Tensor:
        return fixed_points().expand(batch_size, -1, -1)

    def uncertain(self, mask_logits, assignment, *, generator=None, backend="auto") -> Tensor:
        return fixed_points().expand(*assignment.shape, -1, -1)


def fixed_points():
    return torch.rand(NUM_POINTS, 2, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("counts", [(4, 2), (3, 0)])
def test_losses_and_gradients_at_the_same_points_are_the_same(kind, counts, monkeypatch):
    theirs = hugging_face(kind).train()
    model = from_hugging_face_eomt(theirs)
    model.criterion.points = model.criterion.matcher.points = FixedPoints(NUM_POINTS)
    batch = random_batch(1, counts)
    images = batch.pop("pixel_values").sigmoid()
    targets = [
        {"labels": labels, "masks": masks.bool()}
        for labels, masks in zip(batch["class_labels"], batch["mask_labels"], strict=True)
    ]
    losses = model(images, targets)
    total = sum(losses.values())
    total.backward()

    points = fixed_points()
    monkeypatch.setattr(
        theirs.criterion,
        "sample_points_using_uncertainty",
        lambda logits, *_: points.expand(len(logits), -1, -1),
    )
    draw = torch.rand

    def rand(*size, **options):
        return points[None] if size == (1, NUM_POINTS, 2) else draw(*size, **options)

    monkeypatch.setattr(torch, "rand", rand)
    expected = theirs(normalized(model, images), **batch).loss
    expected.backward()
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=0)
    gradients = {name: parameter.grad for name, parameter in to_hugging_face_eomt(model).named_parameters()}
    own = to_foreign_gradients(model)
    assert own.keys() == gradients.keys()
    largest = max(parameter.grad.abs().max().item() for parameter in theirs.parameters())
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(own[name], parameter.grad, rtol=1e-3, atol=1e-5 * largest, msg=name)


def to_foreign_gradients(model):
    """The gradients of the parameters under the names of transformers."""
    of_gradients = copy.deepcopy(model)
    for own, parameter in zip(of_gradients.parameters(), model.parameters(), strict=True):
        own.data = parameter.grad
    return dict(to_hugging_face_eomt(of_gradients).named_parameters())


@pytest.mark.parametrize("encoder", ["dinov2", "dinov3"])
def test_convert_goes_there_and_back(encoder, tmp_path):
    model = EoMT(EoMTConfig.preset("tiny", 3, encoder=encoder, class_names=list("abc"), mask_probabilities=(0.0, 0.0)))
    model.save_pretrained(tmp_path / "own")
    convert_checkpoint(tmp_path / "own", tmp_path / "theirs", "huggingface")
    convert_checkpoint(tmp_path / "theirs", tmp_path / "again")
    again = load_model(tmp_path / "again")
    assert again.config == model.config
    assert all(torch.equal(value, again.weights()[name]) for name, value in model.weights().items())
    with pytest.raises(ValueError, match="the format original has no EoMT"):
        convert_checkpoint(tmp_path / "own", tmp_path / "original", "original")


def test_other_numbers_of_queries_and_classes_on_request():
    theirs = hugging_face("dinov2")
    with pytest.raises(ValueError, match="has num_queries=9, num_classes=5; ignore_mismatched_sizes=True"):
        from_hugging_face_eomt(theirs, num_queries=4, num_classes=3)
    with pytest.warns(UserWarning, match="started at random: query_embed.weight, class_embed.weight, class_embed.bias"):
        model = from_hugging_face_eomt(theirs, num_queries=4, num_classes=3, ignore_mismatched_sizes=True)
    assert model.query_embed.weight.shape[0] == 4 and model.config.class_names == ()


def test_what_one_side_lacks_is_refused():
    theirs = hugging_face("dinov2")
    for name, value, message in (
        ("hidden_act", "relu", "hidden_act is 'relu'; fastmask's EoMT has 'gelu'"),
        ("attention_dropout", 0.1, "attention_dropout is 0.1"),
        ("image_size", [64, 32], r"image_size is \[64, 32\]; fastmask's EoMT has squares"),
    ):
        other = copy.deepcopy(theirs)
        setattr(other.config, name, value)
        with pytest.raises(ValueError, match=message):
            from_hugging_face_eomt(other)
    other = hugging_face("dinov3")
    other.config.rope_parameters["rope_theta"] = 50.0
    with pytest.raises(ValueError, match="rope_theta is 50.0; fastmask's EoMT has 100.0"):
        from_hugging_face_eomt(other)
    with pytest.raises(ValueError, match="of model type 'swin'; of transformers' models fastmask reads 'eomt'"):
        from_hugging_face_eomt(transformers.SwinModel(transformers.SwinConfig(embed_dim=8, depths=[1], num_heads=[1])))
    for changes, message in (
        ({"feedforward_dim": 100}, "feedforward_dim is 100; .* integer mlp_ratio times hidden_dim 64"),
        ({"mask_cost": 4.0}, "mask_cost differ from the losses' weights"),
        ({"encoder": "dinov3", "gated_mlp": True}, "gated_mlp is True"),
        ({"pixel_mean": (0.5,), "pixel_std": (0.5,)}, "the images have 1 channels"),
    ):
        with pytest.raises(ValueError, match=message):
            to_hugging_face_eomt(EoMT(EoMTConfig.preset("tiny", 3, **changes)))
