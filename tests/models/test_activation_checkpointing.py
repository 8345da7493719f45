"""Recomputed activations: the same losses, gradients and statistics from less memory."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from fastmask import MaskFormer, MaskFormerConfig, Segmenter, SoundEventDetector
from fastmask.measure import peak_memory
from fastmask.models import make_model
from fastmask.models._mask_classification import MaskClassificationModel
from fastmask.training.activation_checkpointing import checkpoint_activations
from fastmask.training.blocks import blocks

CLASSES, SIDE = 5, 112
SWIN = {"embed_dim": 24, "depths": [1, 1, 4, 1], "num_heads": [1, 2, 4, 8], "drop_path_rate": 0.3}
DINO = {"num_hidden_layers": 6, "hidden_size": 64, "num_attention_heads": 2, "image_size": 56, "drop_path_rate": 0.3}
VIT = {"hidden_dim": 64, "num_heads": 2, "encoder_layers": 6, "decoder_layers": 2, "feedforward_dim": 256}


def tiny(**options):
    return MaskFormer(MaskFormerConfig.preset("tiny", CLASSES, dropout=0.1, **options))


# What makes a model, the names of its blocks' classes and how many there are.
MODELS = {
    "resnet": (
        lambda: tiny(encoder_layers=2),
        {"ResNetStage", "TransformerEncoderLayer", "TransformerDecoderLayer"},
        8,
    ),
    "swin": (
        lambda: tiny(masked_attention=True, backbone="swin", backbone_options=SWIN),
        {"SwinLayer", "MaskedDecoderLayer"},
        10,
    ),
    "dinov2": (
        lambda: tiny(backbone="dinov2", backbone_options=DINO, size_divisibility=28),
        {"Dinov2Layer", "TransformerDecoderLayer"},
        9,
    ),
    "efficientnet": (
        lambda: tiny(backbone="efficientnet-lite0"),
        {"InvertedResidual", "TransformerDecoderLayer"},
        19,
    ),
    "mask2former": (
        lambda: make_model("mask2former-tiny", CLASSES, dropout=0.1),
        {"ResNetStage", "DeformableEncoderLayer", "MaskedDecoderLayer"},
        8,
    ),
    "eomt": (
        lambda: make_model("eomt-tiny", CLASSES, encoder_layers=6, drop_path=0.3, mask_probabilities=(0.5, 1)),
        {"ScaledBlock"},
        6,
    ),
    "segmenter": (
        lambda: Segmenter(num_classes=CLASSES, dropout=0.1, drop_path=0.3, decoder_heads=2, **VIT),
        {"Block"},
        8,
    ),
}


def one_step(model):
    """The loss of a batch, after its backward pass."""
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(2, 3, SIDE, SIDE, generator=generator)
    targets = torch.randint(CLASSES, (2, SIDE, SIDE), generator=generator)
    if isinstance(model, MaskClassificationModel):
        every = torch.arange(CLASSES)
        targets = [{"labels": every, "masks": one == every[:, None, None]} for one in targets]
    torch.manual_seed(2)
    loss = sum(model(images, targets).values())
    loss.backward()
    return loss


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in ("resnet", "swin", "segmenter") else pytest.mark.slow) for name in MODELS],
)
def test_same_training_from_less_memory(name):
    make, classes, count = MODELS[name]
    torch.manual_seed(0)
    model = make()
    recomputing = copy.deepcopy(model)
    assert checkpoint_activations(recomputing) is recomputing
    assert {type(block).__name__ for block in blocks(recomputing)} == classes
    assert len(list(blocks(recomputing))) == count
    assert list(recomputing.state_dict()) == list(model.state_dict())
    copies = [copy.deepcopy(recomputing)]
    if name == "segmenter":  # transformers' backbones cannot be pickled
        copies.append(pickle.loads(pickle.dumps(recomputing)))
    loss, usual = peak_memory(lambda: one_step(model), torch.device("cpu"))
    for other in (checkpoint_activations(recomputing), *copies):
        again, less = peak_memory(lambda other=other: one_step(other), torch.device("cpu"))
        assert again == loss
        for (key, parameter), expected in zip(other.named_parameters(), model.parameters(), strict=True):
            assert (parameter.grad is None) == (expected.grad is None), key
            assert parameter.grad is None or parameter.grad.equal(expected.grad), key
        for (key, buffer), expected in zip(other.named_buffers(), model.named_buffers(), strict=True):
            assert (key, True) == (expected[0], buffer.equal(expected[1]))
        assert less["allocator"] < 0.75 * usual["allocator"]


def test_nothing_changes_without_gradients():
    model = checkpoint_activations(tiny()).eval()
    plain = tiny()
    plain.load_state_dict(model.state_dict())
    images = torch.rand(1, 3, SIDE, SIDE)
    assert model.predict(images)[0].equal(plain.predict(images)[0])


def test_a_forward_of_a_blocks_own_is_kept():
    model = SoundEventDetector(num_classes=2, dropout=0.0)
    layer = model.predictor.decoder.layers[0]
    calls = []
    forward = layer.forward
    layer.forward = lambda *args: calls.append(1) or forward(*args)
    checkpoint_activations(model)
    sum(model(torch.randn(2, 6400), [{"labels": torch.tensor([1])}] * 2).values()).backward()
    assert len(calls) == 2


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match="Sequential has no transformer layers and no backbone"):
        checkpoint_activations(nn.Sequential(nn.Linear(2, 2)))
