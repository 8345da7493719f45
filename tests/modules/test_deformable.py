"""Multi-scale deformable attention as a module, and the pixel decoder made of it, against Hugging Face's modules."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers import DeformableDetrConfig, Mask2FormerConfig, ResNetConfig
from transformers.models.deformable_detr.modeling_deformable_detr import DeformableDetrMultiscaleDeformableAttention
from transformers.models.mask2former.modeling_mask2former import Mask2FormerPixelDecoder

from fastmask.modules import DeformablePixelDecoder, MultiScaleDeformableAttention
from fastmask.testing import assert_within_budget
from tests.helpers.tiny_models import randomize

BATCH, QUERIES, DIM, HEADS, POINTS = 2, 7, 32, 4, 3
SIZES = ((3, 4), (5, 7), (1, 1))
PIXELS = sum(height * width for height, width in SIZES)


def gradients(output, weights, leaves):
    return torch.autograd.grad((output * weights).sum(), leaves)


def random_inputs(generator, coordinates=2):
    query, value = (torch.randn(BATCH, n, DIM, generator=generator) for n in (QUERIES, PIXELS))
    points = torch.rand(BATCH, QUERIES, len(SIZES), coordinates, generator=generator)
    return query, points, value


def attention(**options):
    return MultiScaleDeformableAttention(DIM, HEADS, len(SIZES), POINTS, **options)


def deformable_detrs():
    config = DeformableDetrConfig(d_model=DIM, num_feature_levels=len(SIZES))
    return DeformableDetrMultiscaleDeformableAttention(config, HEADS, POINTS)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("coordinates", [2, 4])
def test_equals_that_of_deformable_detr(coordinates, padded, generator):
    theirs = randomize(deformable_detrs(), generator).double()
    query, points, value = random_inputs(generator, coordinates)
    padding = torch.rand(BATCH, PIXELS, generator=generator) < 0.3 if padded else None
    weights = torch.randn(query.shape, generator=generator).double()

    leaves = [x.double().requires_grad_() for x in (query, points, value)]
    shapes = {"spatial_shapes": torch.tensor(SIZES), "spatial_shapes_list": list(SIZES)}
    attend = {"encoder_hidden_states": leaves[2], "reference_points": leaves[1], **shapes}
    out = theirs(leaves[0], attention_mask=None if padding is None else ~padding, **attend)[0]
    exact = out.detach(), *gradients(out, weights, [*leaves, *theirs.parameters()])

    def ours(backend):
        module = attention(backend=backend)
        module.load_state_dict(theirs.state_dict())
        inputs = [x.clone().requires_grad_() for x in (query, points, value)]
        result = module(*inputs, SIZES, padding)
        return result.detach(), *gradients(result, weights, [*inputs, *module.parameters()])

    for results in zip(ours("auto"), ours("reference"), exact, strict=True):
        assert_within_budget(*results)


def test_initial_values_are_those_of_the_paper():
    module = attention()
    assert list(module.state_dict()) == list(deformable_detrs().state_dict())
    offsets = module.sampling_offsets.bias.view(HEADS, len(SIZES), POINTS, 2)
    assert not module.sampling_offsets.weight.any() and not module.attention_weights.weight.any()
    for head, direction in enumerate([(1, 0), (0, 1), (-1, 0), (0, -1)]):
        for point in range(POINTS):
            expected = torch.tensor(direction).expand(len(SIZES), 2) * (point + 1.0)
            torch.testing.assert_close(offsets[head, :, point], expected, rtol=0, atol=1e-6)
    bound = math.sqrt(3 / DIM)
    assert 0.9 * bound < module.value_proj.weight.abs().max() <= bound


def test_module_refuses_what_does_not_fit(generator):
    with pytest.raises(ValueError, match="num_heads=3 does not divide embed_dim=32"):
        MultiScaleDeformableAttention(DIM, 3)
    with pytest.raises(ValueError, match="num_points must be at least 1, got 0"):
        MultiScaleDeformableAttention(DIM, HEADS, 3, 0)
    query, points, value = random_inputs(generator)
    module = attention()
    with pytest.raises(ValueError, match="spatial_shapes has 2 levels; expected num_levels=3"):
        module(query, points, value, SIZES[:2])
    with pytest.raises(ValueError, match=r"spatial_shapes=.* has 48 pixels in all; value of shape \(2, 47, 4, 8\)"):
        module(query, points, value[:, :-1], SIZES)
    with pytest.raises(ValueError, match=r"value has shape \(2, 48, 5\); expected \(B, S, embed_dim=32\)"):
        module(query, points, value[..., :5], SIZES)
    with pytest.raises(ValueError, match=r"reference_points has shape \(2, 7, 3, 3\); expected \(B, Q, L, 2\) or"):
        module(query, torch.rand(BATCH, QUERIES, 3, 3), value, SIZES)
    with pytest.raises(ValueError, match=r"padding_mask has shape \(2, 5\); expected \(2, 48\)"):
        module(query, points, value, SIZES, torch.zeros(BATCH, 5, dtype=torch.bool))


def test_module_compiles_to_one_graph(generator):
    module = randomize(attention(), generator)
    query, points, value = random_inputs(generator)
    query.requires_grad_()
    results = []
    for run in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
        out = run(query, points, value, SIZES)
        results.append((out.detach(), *gradients(out, out.detach(), [query, *module.parameters()])))
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y)


CHANNELS = (8, 12, 16, 20)
MAP_SIZES = ((20, 28), (10, 14), (5, 7), (3, 4))
LAYERS, HIDDEN, MASK_DIM = 2, 24, 12
OPTIONS = {"encoder_layers": LAYERS, "num_heads": HEADS, "feedforward_dim": HIDDEN}


def random_features(generator, sizes=MAP_SIZES):
    return [
        torch.randn(BATCH, width, *size, generator=generator).double()
        for width, size in zip(CHANNELS, sizes, strict=True)
    ]


def own_name(name):
    for theirs, ours in (
        ("input_projections", "input_proj"),
        ("encoder.layers", "encoder"),
        ("self_attn_layer_norm", "norm1"),
        ("final_layer_norm", "norm2"),
        (".fc", ".linear"),
        ("mask_projection", "mask_features"),
        ("adapter_1.0", "adapters.0.conv"),
        ("adapter_1.1", "adapters.0.norm"),
        ("layer_1.0", "layers.0.conv"),
        ("layer_1.1", "layers.0.norm"),
    ):
        name = name.replace(theirs, ours)
    return name


def test_pixel_decoder_equals_that_of_mask2former(generator):
    sizes = {"feature_size": DIM, "mask_feature_size": MASK_DIM, "encoder_feedforward_dim": HIDDEN}
    config = Mask2FormerConfig(
        backbone_config=ResNetConfig(), encoder_layers=LAYERS, num_attention_heads=HEADS, dropout=0.0, **sizes
    )
    theirs = Mask2FormerPixelDecoder(config, CHANNELS)
    nn.init.normal_(theirs.level_embed)
    theirs = randomize(theirs, generator).double()
    ours = DeformablePixelDecoder(CHANNELS, DIM, MASK_DIM, **OPTIONS).double()
    ours.load_state_dict({own_name(name): weight for name, weight in theirs.state_dict().items()})

    features = [x.requires_grad_() for x in random_features(generator)]
    expected = theirs(features)
    expected = [expected.mask_features, *expected.multi_scale_features]
    pixel_embed, levels = ours(features)
    weights = [torch.randn(x.shape, generator=generator).double() for x in expected]
    sums = []
    for outputs, module in (([pixel_embed, *levels], ours), (expected, theirs)):
        total = sum((x * w).sum() for x, w in zip(outputs, weights, strict=True))
        named = dict(module.named_parameters())
        found = torch.autograd.grad(total, [*features, *named.values()])
        gradients = dict(
            zip([f"feature {i}" for i in range(4)] + [own_name(name) for name in named], found, strict=True)
        )
        sums.append({**{f"output {i}": x for i, x in enumerate(outputs)}, **gradients})
    assert sums[0].keys() == sums[1].keys()
    for name, value in sums[0].items():
        torch.testing.assert_close(value, sums[1][name], rtol=1e-7, atol=1e-8, msg=name)


def test_the_encoder_sees_no_padding(generator):
    """In a larger, padded map the encoder computes what it does in the image's own."""
    decoder = randomize(DeformablePixelDecoder(CHANNELS, DIM, MASK_DIM, **OPTIONS), generator).double()
    own = [torch.randn(1, DIM, *size, generator=generator).double() for size in ((2, 3), (4, 5), (8, 9))]
    expected = decoder.encode(own, [None] * 3)
    padded = [torch.randn(BATCH, DIM, *size, generator=generator).double() for size in ((2, 3), (6, 6), (9, 12))]
    masks = []
    for whole, part in zip(padded, own, strict=True):
        height, width = part.shape[-2:]
        whole[1:, :, :height, :width] = part
        mask = torch.zeros(BATCH, *whole.shape[-2:], dtype=torch.bool)
        mask[1, height:] = mask[1, :, width:] = True
        masks.append(mask if mask.any() else None)
    assert masks[0] is None
    for whole, part in zip(decoder.encode(padded, masks), expected, strict=True):
        height, width = part.shape[-2:]
        torch.testing.assert_close(whole[1:, :, :height, :width], part, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_fewer_maps_than_four(count, generator):
    decoder = DeformablePixelDecoder(CHANNELS[:count], DIM, MASK_DIM, **OPTIONS).double()
    pixel_embed, levels = decoder(random_features(generator)[:count])
    assert pixel_embed.shape == (BATCH, MASK_DIM, *MAP_SIZES[0])
    assert [tuple(level.shape[-2:]) for level in levels] == list(MAP_SIZES[1:count][::-1])


def test_pixel_decoder_refuses_what_does_not_fit(generator):
    with pytest.raises(ValueError, match=r"channels is \[8\]; expected those of at least two maps"):
        DeformablePixelDecoder(CHANNELS[:1])
    with pytest.raises(ValueError, match="dim must be a positive multiple of 32, got 40"):
        DeformablePixelDecoder(CHANNELS, 40)
    decoder, features = DeformablePixelDecoder(CHANNELS, DIM, MASK_DIM, **OPTIONS), random_features(generator)
    with pytest.raises(ValueError, match="features has 3 maps; expected 4"):
        decoder(features[:3])
    with pytest.raises(ValueError, match="padding_masks has 3 entries; expected 4"):
        decoder(features, [None] * 3)
