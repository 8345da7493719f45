"""The Triton kernels of instance_inference against the reference in float64, and against the C++ operator, on the CPU:
interpreted or, with --compiled, as PTX."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module

import pytest
import torch

from fastmask import instance_inference, reference
from fastmask.reference._common import image_logits, reads_nan, resize_bilinear
from fastmask.testing import assert_within_budget
from tests.helpers import gpu_errors
from tests.helpers.geometries import GEOMETRIES, random_classes, random_masks, steps
from tests.helpers.inputs import at_odd_address
from tests.helpers.op_info import poisoned_memory

USUAL = GEOMETRIES["stride 4"]
# Logits this near to 0 may be rounded to either side of it.
NEAR = 1e-5


@pytest.fixture(autouse=True)
def _small_programs(triton_kernels, monkeypatch) -> None:
    """Masks have several parts."""
    configs = import_module("fastmask.kernels.instance").CONFIGS
    monkeypatch.setitem(configs, None, replace(configs[None], groups=32, rows=16))


def kernel(mask_logits, queries, sizes, packed=False):
    return import_module("fastmask.kernels.instance").instance_masks(mask_logits, queries, packed, *sizes.arguments())


def chosen_logits(mask_logits, queries, sizes, dtype):
    """(B, R, H, W), below 0 for padding and NaN."""
    options = steps(sizes).values()
    nan = reads_nan(mask_logits, *options, sizes.size)
    x = resize_bilinear(image_logits(mask_logits.to(dtype), *options), sizes.size).masked_fill(nan, -1)
    x = x.gather(1, queries.clamp(min=0)[:, :, None, None].expand(-1, -1, *sizes.size))
    return x.masked_fill((queries < 0)[:, :, None, None], -1)


def check(mask_logits, queries, sizes):
    masks, foreground_sum, area, boxes, nan_logits = kernel(mask_logits, queries, sizes)
    exact = chosen_logits(mask_logits, queries, sizes, torch.float64)
    sure = exact.abs() > NEAR
    assert masks.dtype == torch.bool and torch.equal(masks[sure], (exact > 0)[sure])
    assert torch.equal(area.long(), masks.sum((-2, -1)))
    for mask, box in zip(masks.flatten(0, 1), boxes.flatten(0, 1).tolist(), strict=True):
        rows, columns = mask.nonzero().unbind(1)
        expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] if len(rows) else [0, 0, 0, 0]
        assert box == [int(bound) for bound in expected]
    inside = masks.to(exact.dtype)
    same_dtype = chosen_logits(mask_logits, queries, sizes, torch.float32)
    sums = [(x.sigmoid() * inside.to(x.dtype)).sum((-2, -1)) for x in (same_dtype, exact)]
    assert_within_budget(foreground_sum, *sums, name="foreground_sum", gpu=gpu_errors.foreground_sum())
    counts = mask_logits.isnan().sum((-2, -1)).gather(1, queries.clamp(min=0)) * (queries >= 0)
    assert torch.equal(nan_logits.long(), counts)
    return masks


def inputs(sizes, generator, batch=1, count=5, dtype=torch.float32):
    queries = torch.randint(0, 6, (batch, count), generator=generator)
    queries[:, -1] = -1
    return random_masks(batch, 6, sizes.grid, generator, dtype), queries


@pytest.mark.parametrize("sizes", GEOMETRIES.values(), ids=GEOMETRIES)
def test_geometries(sizes, generator):
    check(*inputs(sizes, generator), sizes)


@pytest.mark.parametrize("width", [16, 33, 300])
def test_rows_of_masks_are_padded_to_whole_groups(width, generator):
    """Eight pixels are one store, whatever the width; fake masks have the strides of real ones."""
    sizes = replace(USUAL, size=(20, width))
    mask_logits, queries = inputs(sizes, generator, 2)
    masks = check(mask_logits, queries, sizes)
    assert masks.stride(-2) == -(-width // 8) * 8
    fake_masks, *_ = torch.ops.fastmask.instance_masks(
        mask_logits.to("meta"), queries.to("meta"), False, *sizes.arguments()
    )
    assert fake_masks.shape == masks.shape and fake_masks.stride() == masks.stride()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits(dtype, generator):
    check(*inputs(USUAL, generator, 2, dtype=dtype), USUAL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_odd_addresses(dtype, generator):
    mask_logits, queries = inputs(USUAL, generator, dtype=dtype)
    check(at_odd_address(mask_logits), queries, USUAL)


def test_nan_and_infinite_logits(generator):
    sizes = GEOMETRIES["both steps"]
    mask_logits, queries = inputs(sizes, generator, 2)
    # Infinities of both signs would cancel in one query, and leave a sign to rounding.
    mask_logits[:, ::2][torch.rand(2, 3, *sizes.grid, generator=generator) < 0.05] = float("inf")
    mask_logits[:, 1::2][torch.rand(2, 3, *sizes.grid, generator=generator) < 0.05] = -float("inf")
    mask_logits[torch.rand(mask_logits.shape, generator=generator) < 0.05] = float("nan")
    check(mask_logits, queries, sizes)


@pytest.mark.parametrize("name", ["stride 4", "one dimension"])
def test_packed_masks(name, generator):
    sizes = GEOMETRIES[name]
    arguments = inputs(sizes, generator)
    masks = kernel(*arguments, sizes)
    packed = kernel(*arguments, sizes, packed=True)
    bits = (packed[0][..., None] >> torch.arange(8, dtype=torch.uint8)) & 1
    bits = bits.flatten(-2).bool()
    assert torch.equal(bits[..., : sizes.size[1]], masks[0]) and not bits[..., sizes.size[1] :].any()
    for a, b in zip(packed[1:], masks[1:], strict=True):
        assert torch.equal(a, b)


def test_a_query_beyond_the_last_reads_nothing(generator):
    mask_logits, queries = inputs(USUAL, generator)
    queries[0, 0] = 1 << 40
    for result in kernel(mask_logits, queries, USUAL):
        assert not result[0, 0].any() and not result[0, -1].any()


def test_no_masks(generator):
    mask_logits, queries = inputs(USUAL, generator)
    assert kernel(mask_logits, queries[:, :0], USUAL)[0].shape == (1, 0, *USUAL.size)
    for result in kernel(mask_logits[:, :0], torch.full_like(queries, -1), USUAL):
        assert not result.any()


def test_strided_logits(generator):
    mask_logits, queries = inputs(USUAL, generator, 2)
    expected = kernel(mask_logits, queries, USUAL)
    channels_last = mask_logits.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    for a, b in zip(expected, kernel(channels_last, queries.mT.contiguous().mT, USUAL), strict=True):
        assert torch.equal(a, b)


def test_two_runs_give_the_same_bits_whatever_was_in_memory(generator):
    arguments = (*inputs(USUAL, generator), USUAL)
    first = kernel(*arguments)
    with poisoned_memory():
        second = kernel(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("rule", ["mask2former", "huggingface"])
def test_instances(rule, generator):
    sizes = GEOMETRIES["cropped"]
    class_logits, mask_logits = random_classes(2, 6, 4, generator), random_masks(2, 6, sizes.grid, generator)
    options = {"rule": rule, "top_k": 7, **steps(sizes)}
    actual = instance_inference(class_logits, mask_logits, sizes.size, backend="triton", **options)
    expected = reference.instance_inference(class_logits, mask_logits, sizes.size, **options)
    for result, wanted in zip(actual, expected, strict=True):
        assert torch.equal(result["labels"], wanted["labels"])
        assert (result["masks"] != wanted["masks"]).double().mean() < 1e-3
        torch.testing.assert_close(result["scores"], wanted["scores"])
