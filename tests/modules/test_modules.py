import math

import pytest
import torch
from torch import nn

from fastmask.modules.mlp import MLP
from fastmask.modules.pixel_decoder import PixelDecoder
from fastmask.modules.position_encoding import sine_position_encoding
from fastmask.modules.predictor import TransformerPredictor
from fastmask.modules.transformer import TransformerDecoder, TransformerDecoderLayer, TransformerEncoder


def bottom_right_padding(height, width, sizes):
    mask = torch.ones(len(sizes), height, width, dtype=torch.bool)
    for b, (h, w) in enumerate(sizes):
        mask[b, :h, :w] = False
    return mask


def test_position_encoding_equals_its_formula_entry_by_entry():
    height, width, dim, temperature = 3, 5, 16, 100.0
    encoding = sine_position_encoding(height, width, dim, temperature=temperature, dtype=torch.float64)
    encoding = encoding.view(height, width, dim)
    for row in range(height):
        for column in range(width):
            for half, (index, count) in enumerate(((row, height), (column, width))):
                position = (index + 1) / (count + 1e-6) * 2 * math.pi
                for i in range(dim // 4):
                    angle = position / temperature ** (2 * i / (dim / 2))
                    base = half * dim // 2 + 2 * i
                    assert encoding[row, column, base].item() == pytest.approx(math.sin(angle), abs=1e-12)
                    assert encoding[row, column, base + 1].item() == pytest.approx(math.cos(angle), abs=1e-12)


def test_position_encoding_of_a_padded_image_is_that_of_the_image_alone():
    sizes = [(4, 6), (2, 6), (3, 1)]
    encoding = sine_position_encoding(4, 6, 8, padding_mask=bottom_right_padding(4, 6, sizes)).view(3, 4, 6, 8)
    assert encoding.isfinite().all()
    for b, (h, w) in enumerate(sizes):
        alone = sine_position_encoding(h, w, 8).view(h, w, 8)
        torch.testing.assert_close(encoding[b, :h, :w], alone, rtol=0, atol=0)


def test_position_encoding_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="multiple of 4, got 6"):
        sine_position_encoding(2, 2, 6)
    with pytest.raises(ValueError, match=r"padding_mask has shape \(1, 2, 3\)"):
        sine_position_encoding(2, 2, 8, padding_mask=torch.zeros(1, 2, 3, dtype=torch.bool))


def test_mlp_is_relu_between_linear_layers():
    mlp = MLP(4, 8, 3, 3)
    assert list(mlp.state_dict()) == [f"layers.{i}.{kind}" for i in range(3) for kind in ("weight", "bias")]
    x = torch.randn(2, 5, 4)
    first, second, third = mlp.layers
    assert torch.equal(mlp(x), third(second(first(x).clamp(min=0)).clamp(min=0)))
    with pytest.raises(ValueError, match="num_layers"):
        MLP(4, 8, 3, 0)


def attention(module, query, key, value):
    """Multi-head attention as its equation reads, for one image (arXiv:1706.03762, equation 1)."""
    q_weight, k_weight, v_weight = module.in_proj_weight.chunk(3)
    q_bias, k_bias, v_bias = module.in_proj_bias.chunk(3)
    heads = []
    for q, k, v in zip(
        (query @ q_weight.T + q_bias).chunk(module.num_heads, -1),
        (key @ k_weight.T + k_bias).chunk(module.num_heads, -1),
        (value @ v_weight.T + v_bias).chunk(module.num_heads, -1),
        strict=True,
    ):
        heads.append((q @ k.T / q.shape[-1] ** 0.5).softmax(-1) @ v)
    return torch.cat(heads, -1) @ module.out_proj.weight.T + module.out_proj.bias


def test_decoder_layer_equals_its_equations():
    layer = TransformerDecoderLayer(16, 4, 32).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    queries, position = torch.randn(2, 5, 16).double(), torch.randn(1, 5, 16).double()
    keys, values = torch.randn(2, 7, 16).double(), torch.randn(2, 7, 16).double()
    result = layer(queries, position, keys, values)
    for b in range(2):
        q = queries[b]
        q = layer.norm1(q + attention(layer.self_attn, q + position[0], q + position[0], q))
        q = layer.norm2(q + attention(layer.multihead_attn, q + position[0], keys[b], values[b]))
        q = layer.norm3(q + layer.linear2(layer.linear1(q).relu()))
        torch.testing.assert_close(result[b], q, rtol=1e-12, atol=1e-12)


def test_decoder_gives_every_layer_or_the_last():
    decoder = TransformerDecoder(3, 16, 4, 32).double()
    arguments = (torch.randn(5, 16).double(), torch.randn(2, 7, 16).double(), torch.randn(1, 7, 16).double())
    layers = decoder(*arguments)
    assert layers.shape == (3, 2, 5, 16)
    assert torch.equal(decoder(*arguments, all_layers=False), layers[-1:])


@pytest.mark.parametrize("seed", range(3))
def test_padded_memory_changes_nothing(seed):
    """Attention with a key padding mask sums over the same tokens as the image alone does, so only the order of
    summation may differ; hence float64 and rounding.
    """
    torch.manual_seed(seed)
    dim, height, width, h, w = 16, 4, 6, 3, 2
    encoder, decoder = TransformerEncoder(2, dim, 4, 32).double(), TransformerDecoder(2, dim, 4, 32).double()
    query_position = torch.randn(5, dim).double()
    padded = torch.randn(1, height, width, dim).double()
    alone = padded[:, :h, :w].reshape(1, h * w, dim)
    mask = bottom_right_padding(height, width, [(h, w)])
    position = sine_position_encoding(height, width, dim, padding_mask=mask, dtype=torch.float64)
    own_position = sine_position_encoding(h, w, dim, dtype=torch.float64)

    memory = encoder(padded.flatten(1, 2), position, mask.flatten(1))
    own_memory = encoder(alone, own_position)
    kept = memory.view(1, height, width, dim)[:, :h, :w].reshape(1, h * w, dim)
    torch.testing.assert_close(kept, own_memory, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        decoder(query_position, memory, position, mask.flatten(1)),
        decoder(query_position, own_memory, own_position),
        rtol=1e-12,
        atol=1e-12,
    )


@pytest.mark.parametrize("encoder_layers", [0, 2])
def test_pixel_decoder_shapes_on_odd_maps(encoder_layers):
    channels, sizes = (8, 12, 16, 20), ((19, 25), (10, 13), (5, 7), (3, 4))
    decoder = PixelDecoder(channels, 32, 24, encoder_layers=encoder_layers, num_heads=4, feedforward_dim=16)
    features = [torch.randn(2, c, *size) for c, size in zip(channels, sizes, strict=True)]
    pixel_embed, memory = decoder(features)
    assert pixel_embed.shape == (2, 24, 19, 25)
    if encoder_layers:
        assert memory.shape == (2, 32, 3, 4)
    else:
        assert memory is features[-1]


def test_pixel_decoder_adds_upsampled_to_lateral():
    decoder = PixelDecoder((8, 12), 32, 24).double()
    fine, coarse = torch.randn(1, 8, 6, 8).double(), torch.randn(1, 12, 3, 4).double()
    top = decoder.layers[1].norm(decoder.layers[1].conv(coarse)).relu()
    repeated = top.repeat_interleave(2, -1).repeat_interleave(2, -2)
    merged = decoder.adapters[0].norm(decoder.adapters[0].conv(fine)) + repeated
    expected = decoder.mask_features(decoder.layers[0].norm(decoder.layers[0].conv(merged)).relu())
    torch.testing.assert_close(decoder([fine, coarse])[0], expected, rtol=1e-12, atol=1e-12)


def test_initial_weights_are_the_original_ones():
    decoder = PixelDecoder((64, 64), 64, 64)
    bound = (3 / (64 * 9)) ** 0.5
    weight = decoder.mask_features.weight
    assert weight.abs().max() <= bound and weight.abs().max() > 0.99 * bound
    assert decoder.mask_features.bias.abs().max() == 0
    assert decoder.layers[0].conv.bias is None
    predictor = TransformerPredictor(64, 5, hidden_dim=64, decoder_layers=1, feedforward_dim=64)
    bound = (6 / (64 + 64)) ** 0.5
    weight = predictor.decoder.layers[0].linear1.weight
    assert weight.abs().max() <= bound and weight.abs().max() > 0.99 * bound
    assert predictor.query_embed.weight.std().item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(("input_dim", "projected"), [(12, True), (16, False)])
def test_predictor_gives_each_query_classes_and_a_mask_embedding(input_dim, projected):
    predictor = TransformerPredictor(
        input_dim, 3, num_queries=5, hidden_dim=16, mask_dim=8, decoder_layers=2, num_heads=4, feedforward_dim=32
    ).eval()
    assert isinstance(predictor.input_proj, nn.Conv2d) == projected
    memory = torch.randn(2, input_dim, 3, 4)
    class_logits, mask_embed = predictor(memory)
    assert class_logits.shape == (2, 2, 5, 4) and mask_embed.shape == (2, 2, 5, 8)
    last_classes, last_embed = predictor(memory, all_layers=False)
    torch.testing.assert_close(last_classes, class_logits[-1:])
    torch.testing.assert_close(last_embed, mask_embed[-1:])


def test_pixel_decoder_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="channels is empty"):
        PixelDecoder(())
    with pytest.raises(ValueError, match="multiple of 32, got 40"):
        PixelDecoder((8, 16), 40)
