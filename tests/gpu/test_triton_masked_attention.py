"""The Triton kernels of masked_attention, interpreted or, with --compiled, as PTX: what the battery of operators does
not ask of every operator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from itertools import product
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from fastmask.ops.masked_attention import MASKED_ATTENTION
from tests.helpers.attention_operator import (
    SEVERAL_BLOCKS,
    SMALL,
    attended_keys,
    check_attention,
    output_and_gradients,
    random_inputs,
)
from tests.helpers.op_info import DTYPES
from tests.ops.test_masked_attention import uniform

pytestmark = pytest.mark.usefixtures("triton_kernels")

# The interpreter's ``tl.dot`` is wrong for bfloat16.
HALVES = pytest.mark.parametrize(
    "dtype", [pytest.param(torch.bfloat16, marks=pytest.mark.compiled), torch.float16], ids=["bfloat16", "float16"]
)


def change_configs(monkeypatch, **changes):
    """Some fields of the configurations are others."""
    kernels = import_module("fastmask.kernels._attention")
    pick = kernels.config_of_heads
    monkeypatch.setattr(kernels, "config_of_heads", lambda *arguments: replace(pick(*arguments), **changes))


def triton_results(q, k, v, mask_logits, grad_out, **options):
    return output_and_gradients(q, k, v, mask_logits, grad_out, backend="triton", **options)


@pytest.mark.parametrize(
    "shape",
    [SMALL, (1, 140, 1, 16, (3, 25), (8, 8)), (1, 3, 1, 16, (128, 33), (64, 64))],
    ids=["small", "many queries", "many keys"],
)
@HALVES
def test_half_precision(dtype, shape, generator):
    q, k, v, mask_logits, options = random_inputs(shape, generator, padding=True)
    check_attention(*(x.to(dtype) for x in (q, k, v, mask_logits)), "triton", **options)


@pytest.mark.slow
@pytest.mark.parametrize("major", [9, 10])
@pytest.mark.parametrize("head_dim", [32, 48, 128])
@HALVES
def test_configurations_of_other_gpus(dtype, head_dim, major, generator, monkeypatch):
    monkeypatch.setattr(import_module("fastmask.kernels._common"), "generation", lambda _: major)
    q, k, v, mask_logits, options = random_inputs((1, 70, 1, head_dim, (9, 17), (20, 20)), generator, padding=True)
    check_attention(*(x.to(dtype) for x in (q, k, v)), mask_logits, "triton", **options)


@pytest.mark.parametrize("changes", [{"programs": 1}, {"min_keys": 32}], ids=["no splits", "a split a block"])
@pytest.mark.parametrize("padding", [False, True], ids=["whole", "padded"])
def test_splits_of_the_keys(padding, changes, generator, monkeypatch):
    """Without splits a program handles 41 blocks of 32 keys: more than its word has bits."""
    change_configs(monkeypatch, **changes)
    shape = (1, 5, 1, 16, (37, 35), (13, 17)) if "programs" in changes else SEVERAL_BLOCKS
    q, k, v, mask_logits, options = random_inputs(shape, generator, padding=padding)
    check_attention(q, k, v, mask_logits, "triton", **options)


BLOCKS = (16, 32, 64, 128)
KEY_GRIDS = (
    ((16, 16), (128, 128)), ((7, 9), (30, 20)), ((40, 37), (13, 21)), ((9, 9), (9, 9)), ((1, 1), (5, 4)),
    ((24, 24), (48, 48)), ((5, 8), (30, 32)), ((40, 32), (80, 64)), ((9, 8), (27, 16)), ((9, 8), (18, 24)),
    ((16, 16), (16, 16)), ((5, 8), (5, 8)),
)  # fmt: skip


def key_grids() -> Iterator[Any]:
    """Each grid in blocks of each size, in one dtype after another; in all of them if slow."""
    for (i, (grid, size)), (j, block), (k, dtype) in product(*map(enumerate, (KEY_GRIDS, BLOCKS, DTYPES))):
        yield pytest.param(grid, size, dtype, block, marks=[] if (i + j) % len(DTYPES) == k else pytest.mark.slow)


@pytest.mark.parametrize(("grid", "size", "dtype", "block"), key_grids())
def test_the_very_keys_are_attended_to(grid, size, dtype, block, generator):
    """The bits are those of PyTorch's resampling wherever that is further from 0 than rounding; some queries have no
    foreground, or none but padding, and attend to all keys that are not padding."""
    keys = grid[0] * grid[1]
    mask_logits = torch.randn(2, 6, *size, generator=generator).to(dtype)
    mask_logits[0, 0] = -1
    mask_logits[1, 5] = torch.nan
    padding = torch.rand(2, keys, generator=generator) < 0.3
    padding[0] = True
    bits, occupied = attended_keys(mask_logits, padding, grid, block)
    resampled = F.interpolate(mask_logits.double(), size=grid, mode="bilinear", align_corners=False).flatten(2)
    foreground = (resampled >= 0) & ~padding[:, None]
    expected = torch.where(foreground.any(-1, keepdim=True), foreground, ~padding[:, None])
    clear = ~(resampled.abs() <= 1e-5)
    assert clear.float().mean() > 0.99
    assert torch.equal(bits[clear], expected[clear])
    groups = F.pad(bits, (0, -keys % block, 0, -6 % 4)).unflatten(2, (-1, block)).unflatten(1, (-1, 4))
    assert torch.equal(occupied, groups.any(-1).any(2))


def test_zero_is_foreground_and_nan_is_background():
    mask_logits = torch.tensor([[[[0.0, -0.0, -1.0, torch.nan]]], [[[torch.nan] * 4]], [[[1.0, -1.0, -3.0, 1.0]]]])
    bits, _ = attended_keys(mask_logits, None, (1, 4), 32)
    assert bits.flatten(1).tolist() == [[True, True, False, False], [True] * 4, [True, False, False, True]]
    halved, _ = attended_keys(mask_logits[2:], None, (1, 2), 32)
    assert halved.flatten().tolist() == [True, False]  # (1 - 1) / 2 is foreground, (-3 + 1) / 2 is not


def test_blocks_that_no_query_needs_are_not_read(generator):
    q, k, v, mask_logits, options = random_inputs(SEVERAL_BLOCKS, generator)
    grid = options["grid"]
    mask_logits = torch.ones(1, 6, *grid)
    mask_logits.flatten(2)[..., 96:288] = -1
    expected = check_attention(q, k, v, mask_logits, "triton", **options)
    k[:, 96:288], v[:, 96:288] = torch.nan, torch.inf
    actual = triton_results(q, k, v, mask_logits, torch.ones_like(q), **options)
    assert torch.equal(actual[0], expected)
    assert all(x.isfinite().all() for x in actual)
    assert not any(x[:, 96:288].any() for x in actual[2:])


def test_logsumexp_is_that_of_the_native_kernel(generator):
    q, k, v, mask_logits, options = random_inputs(SMALL, generator, padding=True)
    padding = options["key_padding_mask"]
    padding[1] = True
    arguments = (q, k, v, mask_logits, padding, *options["grid"], options["num_heads"], 0.3, 0.0, None)
    expected = MASKED_ATTENTION("native", *arguments)[1].float()
    torch.testing.assert_close(MASKED_ATTENTION("triton", *arguments)[1], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("seed", "p"), [(0, 0.1), (2**63 - 5, 0.5), (-17, 0.9)])
def test_dropout_drops_what_the_native_kernel_drops(seed, p, generator):
    """Which weights those are, and how many, the native kernel's tests compare with the paper's generator."""
    q, k, v, mask_logits, options = random_inputs((2, 9, 3, 16, (5, 9), (10, 18)), generator, padding=True)
    kept = uniform(seed, (2, 3, 9, 45)) >= p
    assert abs(kept.double().mean() - (1 - p)) < 0.03
    grad_out = torch.randn(q.shape, generator=generator)
    arguments = (mask_logits, options["key_padding_mask"], *options["grid"], 3, 0.25, p, torch.tensor([seed]))
    results = []
    for backend in ("triton", "native"):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, _ = MASKED_ATTENTION(backend, *leaves, *arguments)
        results.append((out.detach(), *torch.autograd.grad(out, leaves, grad_out)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_no_keys():
    forward = import_module("fastmask.kernels.masked_attention").masked_attention
    backward = import_module("fastmask.kernels.masked_attention_backward").masked_attention_backward
    q, none = torch.randn(2, 3, 8), torch.empty(2, 0, 8)
    arguments = (q, none, none, None, None, 0, 1, 2, 0.5, 0.0, None)
    out, logsumexp = forward(*arguments)
    assert not out.any()
    assert (logsumexp == torch.inf).all()
    assert not backward(torch.randn_like(q), out, logsumexp, *arguments)[0].any()
