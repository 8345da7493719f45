"""The reference masked attention against a loop over queries and heads, and the attention of Mask2Former."""

import math

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck
from torch.nn.functional import interpolate
from transformers.models.mask2former import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerMaskedAttentionDecoderLayer,
    Mask2FormerMaskPredictor,
)

from fastmask.reference import masked_attention

# (h, w) of the mask logits and (gh, gw) of the keys: coarser keys, odd sizes, one pixel either way, finer, the same
GRIDS = [((8, 8), (4, 4)), ((7, 9), (3, 5)), ((1, 1), (2, 3)), ((5, 6), (1, 1)), ((3, 2), (5, 7)), ((4, 4), (4, 4))]


def make_inputs(seed, mask_size, grid, *, channels=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    keys = grid[0] * grid[1]
    q, k, v = normal(2, 6, channels), normal(2, keys, channels), normal(2, keys, channels)
    mask_logits = normal(2, 6, *mask_size) * 2
    mask_logits[0, 0] = -1  # background everywhere: attends everywhere
    mask_logits[0, 1] = torch.nan  # counts as background
    mask_logits[0, 2] = 0  # exactly at the threshold: foreground
    padding = torch.rand(2, keys, generator=generator) > 0.6
    return q, k, v, mask_logits, padding


def expected_attention(q, k, v, mask_logits, grid, num_heads, scale, padding):
    batch, queries, channels = q.shape
    width = channels // num_heads
    output = torch.zeros_like(q)
    foreground = None
    if mask_logits is not None:
        foreground = interpolate(mask_logits, size=grid, mode="bilinear", align_corners=False).flatten(2) >= 0
    for b, n in np.ndindex(batch, queries):
        present = [s for s in range(k.shape[1]) if not padding[b, s]]
        keys = present if foreground is None else [s for s in present if foreground[b, n, s]] or present
        for head in range(num_heads if keys else 0):
            channel = slice(head * width, (head + 1) * width)
            weights = [math.exp(scale * float(q[b, n, channel] @ k[b, s, channel])) for s in keys]
            total = sum(w * v[b, s, channel] for w, s in zip(weights, keys, strict=True))
            output[b, n, channel] = total / sum(weights)
    return output


@pytest.mark.parametrize("with_mask", [True, False])
@pytest.mark.parametrize("with_padding", [True, False])
@pytest.mark.parametrize(("mask_size", "grid"), GRIDS)
def test_equals_a_loop_over_queries(mask_size, grid, with_padding, with_mask):
    q, k, v, mask_logits, padding = make_inputs(0, mask_size, grid)
    if not with_mask:
        mask_logits = None
    result = masked_attention(
        q, k, v, mask_logits, grid=grid, num_heads=2, scale=0.7, key_padding_mask=padding if with_padding else None
    )
    if not with_padding:
        padding = torch.zeros_like(padding)
    expected = expected_attention(q, k, v, mask_logits, grid, 2, 0.7, padding)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def test_foreground_that_is_all_padding_counts_as_none():
    q, k, v, mask_logits, _ = make_inputs(1, (4, 4), (4, 4))
    mask_logits = torch.full_like(mask_logits, -1.0)
    mask_logits[..., 0, :] = 1
    padding = torch.zeros(2, 16, dtype=torch.bool)
    padding[1, :4] = True
    options = {"grid": (4, 4), "num_heads": 4}
    result = masked_attention(q, k, v, mask_logits, key_padding_mask=padding, **options)
    torch.testing.assert_close(result[1], masked_attention(q, k, v, None, key_padding_mask=padding, **options)[1])
    torch.testing.assert_close(result[0], masked_attention(q, k, v, mask_logits, **options)[0])


def test_padded_keys_may_hold_anything_and_all_padding_gives_zero():
    q, k, v, mask_logits, padding = make_inputs(2, (4, 4), (4, 4))
    padding[1] = True
    options = {"grid": (4, 4), "num_heads": 2, "key_padding_mask": padding}
    expected = masked_attention(q, k, v, mask_logits, **options)
    k[padding], v[padding] = torch.nan, torch.inf
    for tensor in (q, k, v):
        tensor.requires_grad_()
    result = masked_attention(q, k, v, mask_logits, **options)
    torch.testing.assert_close(result, expected)
    assert (result[1] == 0).all()
    result.square().sum().backward()
    for tensor in (q, k, v):
        assert tensor.grad.isfinite().all()
    assert (k.grad[padding] == 0).all()


def test_gradients_reach_queries_keys_and_values_but_not_the_mask():
    q, k, v, mask_logits, padding = make_inputs(3, (3, 5), (2, 3), channels=4)
    mask_logits.requires_grad_()
    inputs = [tensor.requires_grad_() for tensor in (q, k, v)]
    options = {"grid": (2, 3), "num_heads": 2, "key_padding_mask": padding}
    assert gradcheck(lambda *qkv: masked_attention(*qkv, mask_logits, **options), inputs)
    masked_attention(*inputs, mask_logits, **options).sum().backward()
    assert mask_logits.grad is None


def test_dropout_keeps_the_mean():
    torch.manual_seed(0)
    q, k, v, mask_logits, _ = make_inputs(4, (4, 4), (4, 4))
    options = {"grid": (4, 4), "num_heads": 2}
    expected = masked_attention(q, k, v, mask_logits, **options)
    samples = torch.stack([masked_attention(q, k, v, mask_logits, dropout_p=0.25, **options) for _ in range(400)])
    error = (samples.mean(0) - expected).abs()
    assert (samples[0] != expected).any()
    assert (error <= 6 * samples.std(0) / 20 + 1e-12).all()
    assert (masked_attention(q, k, v, mask_logits, dropout_p=1.0, **options) == 0).all()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("grid", [(4, 5), (2, 3)])
def test_equals_the_attention_of_mask2former(grid, seed):
    torch.manual_seed(seed)
    batch, queries, channels, num_heads, pixels = 2, 7, 16, 4, (8, 10)
    config = Mask2FormerConfig(hidden_dim=channels, num_attention_heads=num_heads, dim_feedforward=8)
    attention = Mask2FormerMaskedAttentionDecoderLayer(config).cross_attn.double()
    predictor = Mask2FormerMaskPredictor(channels, num_heads, torch.tensor(channels)).double()
    hidden = torch.randn(queries, batch, channels, dtype=torch.float64)
    memory = torch.randn(grid[0] * grid[1], batch, channels, dtype=torch.float64)
    pixel_embeddings = torch.randn(batch, channels, *pixels, dtype=torch.float64) * 3
    pixel_embeddings[0] = 0  # a bias alone: whole rows of one sign, some without any foreground

    mask_logits, excluded = predictor(hidden, pixel_embeddings, grid)
    mask_logits[0, 0] -= 1
    excluded.unflatten(0, (batch, num_heads))[0, :, 0] = True
    excluded = excluded & ~excluded.all(-1, keepdim=True)
    expected, _ = attention(hidden, memory, memory, attn_mask=excluded)

    weights = attention.in_proj_weight.chunk(3)
    biases = attention.in_proj_bias.chunk(3)
    q, k, v = (
        torch.nn.functional.linear(x.transpose(0, 1), weight, bias)
        for x, weight, bias in zip((hidden, memory, memory), weights, biases, strict=True)
    )
    heads = masked_attention(q, k, v, mask_logits, grid=grid, num_heads=num_heads)
    torch.testing.assert_close(attention.out_proj(heads), expected.transpose(0, 1), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_keeps_the_dtype(dtype):
    q, k, v, mask_logits, padding = (
        x.to(dtype) if x.is_floating_point() else x for x in make_inputs(5, (4, 4), (4, 4))
    )
    options = {"grid": (4, 4), "num_heads": 2, "key_padding_mask": padding}
    result = masked_attention(q, k, v, mask_logits, **options)
    assert result.dtype == dtype
    exact = masked_attention(q.double(), k.double(), v.double(), mask_logits.double(), **options)
    torch.testing.assert_close(result.double(), exact, rtol=0, atol=16 * torch.finfo(dtype).eps)


def test_wrong_arguments_are_named():
    q, k, v, mask_logits, padding = make_inputs(6, (4, 4), (4, 4))
    with pytest.raises(ValueError, match=r"k has shape \(2, 16, 8\); expected \(\.\.\., 2, 15, 8\)"):
        masked_attention(q, k, v, mask_logits, grid=(3, 5), num_heads=2)
    with pytest.raises(ValueError, match="num_heads=3 does not divide the 8 channels"):
        masked_attention(q, k, v, mask_logits, grid=(4, 4), num_heads=3)
    with pytest.raises(ValueError, match="mask_logits has shape"):
        masked_attention(q, k, v, mask_logits[:, :5], grid=(4, 4), num_heads=2)
    with pytest.raises(ValueError, match="key_padding_mask has shape"):
        masked_attention(q, k, v, mask_logits, grid=(4, 4), num_heads=2, key_padding_mask=padding[:, 1:])
