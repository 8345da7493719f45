"""Patched deformable attention of transformers' models computes what it computed before."""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch

import fastmask
from fastmask.integrations._known import DEFORMABLE_DETRS
from fastmask.testing import assert_within_budget
from tests.helpers.foreign_models import tiny_mask2former
from tests.helpers.tiny_models import randomize

SIZES = [(5, 7), (3, 4), (1, 1)]
PIXELS = sum(height * width for height, width in SIZES)
BATCH, QUERIES, HEADS, DIM, POINTS = 2, 6, 4, 32, 2
PROJECTED = {
    "mask2former": "Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention",
    "oneformer": "OneFormerPixelDecoderEncoderMultiscaleDeformableAttention",
}


def modeling(name):
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def step(module, inputs, arguments):
    """The first output, and the gradients of inputs and parameters."""
    leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    out = module(**leaves, **arguments)
    out = out if isinstance(out, torch.Tensor) else out[0]
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out)
    parameters = dict(module.named_parameters())
    found = torch.autograd.grad((out * weights).sum(), [*leaves.values(), *parameters.values()])
    return {"output": out.detach(), **dict(zip([*leaves, *parameters], found, strict=True))}


def assert_patched_computes_the_same(module, inputs, arguments):
    theirs = step(module, inputs, arguments)
    exact = step(module.double(), {name: value.double() for name, value in inputs.items()}, arguments)
    module.float()
    own = type(module)
    ours = step(fastmask.patch(module), inputs, arguments)
    assert isinstance(module, own) and type(module) is not own
    assert type(fastmask.unpatch(module)) is own
    for name, value in theirs.items():
        assert_within_budget(ours[name], value, exact[name], name=name)


@pytest.mark.parametrize("name", DEFORMABLE_DETRS)
def test_detr(name, generator):
    inputs = {
        "value": torch.randn(BATCH, PIXELS, HEADS, DIM // HEADS, generator=generator),
        "sampling_locations": torch.rand(BATCH, QUERIES, HEADS, len(SIZES), POINTS, 2, generator=generator) * 1.4 - 0.2,
        "attention_weights": torch.rand(BATCH, QUERIES, HEADS, len(SIZES), POINTS, generator=generator),
    }
    arguments = {
        "value_spatial_shapes": torch.tensor(SIZES),
        "value_spatial_shapes_list": SIZES,
        "level_start_index": None,
        "im2col_step": 64,
    }
    assert_patched_computes_the_same(modeling(name).MultiScaleDeformableAttention(), inputs, arguments)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("name", PROJECTED)
def test_pixel_decoders(name, coordinates, padded, generator):
    module = randomize(getattr(modeling(name), PROJECTED[name])(DIM, HEADS, len(SIZES), POINTS), generator)
    inputs = {
        "hidden_states": torch.randn(BATCH, QUERIES, DIM, generator=generator),
        "position_embeddings": torch.randn(BATCH, QUERIES, DIM, generator=generator),
        "encoder_hidden_states": torch.randn(BATCH, PIXELS, DIM, generator=generator),
        "reference_points": torch.rand(BATCH, QUERIES, len(SIZES), coordinates, generator=generator),
    }
    arguments = {
        "attention_mask": torch.rand(BATCH, PIXELS, generator=generator) < 0.3 if padded else None,
        "spatial_shapes_list": SIZES,
    }
    if "spatial_shapes" in inspect.signature(module.forward).parameters:
        arguments["spatial_shapes"] = torch.tensor(SIZES)
    assert_patched_computes_the_same(module, inputs, arguments)


def test_weights_of_attention_stay(generator):
    model = tiny_mask2former()
    attention = model.model.pixel_level_module.decoder.encoder.layers[0].self_attn
    hidden = torch.randn(BATCH, PIXELS, DIM, generator=generator)
    points = torch.rand(BATCH, PIXELS, len(SIZES), 2, generator=generator)
    arguments = {"encoder_hidden_states": hidden, "reference_points": points, "spatial_shapes_list": SIZES}
    expected = attention(hidden, **arguments)
    fastmask.patch(model)
    for ours, theirs in zip(attention(hidden, **arguments), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_void_needs_masks():
    module = modeling("rt_detr").MultiScaleDeformableAttention()
    with pytest.raises(TypeError, match="ignore_void has no effect on MultiScaleDeformableAttention"):
        fastmask.patch(module, ignore_void=True)
