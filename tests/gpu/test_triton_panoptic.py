"""The Triton kernels of panoptic_inference against the reference in float64, and against the C++ operator, on the CPU:
interpreted or, with --compiled, as PTX."""

from __future__ import annotations

import sys
from importlib import import_module

import pytest
import torch

from fastmask import panoptic_inference, reference
from fastmask.reference._common import image_logits, reads_nan, resize_bilinear
from tests.helpers.geometries import GEOMETRIES, random_classes, random_masks, steps
from tests.helpers.inputs import at_odd_address

pytestmark = pytest.mark.usefixtures("triton_kernels")

RULES = ("maskformer", "mask2former", "huggingface")
USUAL = GEOMETRIES["stride 4"]
# Pixels this near to a tie or to the threshold may go either way.
NEAR = 1e-5


def inputs(sizes, generator, batch=2, queries=18, dtype=torch.float32):
    scores = torch.rand(batch, queries, generator=generator)
    scores[torch.rand(batch, queries, generator=generator) < 0.4] = 0
    return scores, random_masks(batch, queries, sizes.grid, generator, dtype)


def winners(scores, mask_logits, sizes, resize=False, clip=False, threshold=0.5):
    run = import_module("fastmask.kernels.panoptic").panoptic_winners
    return run(scores, mask_logits, resize, clip, threshold, *sizes.arguments())


def check(scores, mask_logits, sizes, resize=False, clip=False, threshold=0.5):
    """Winners against the probabilities in float64; the areals against the winners."""
    winner, areas, nan_logits = winners(scores, mask_logits, sizes, resize, clip, threshold)
    options = steps(sizes).values()
    nan = reads_nan(mask_logits, *options, sizes.size)
    logits = image_logits(mask_logits.double(), *options)
    if resize:
        probabilities = resize_bilinear(logits.sigmoid(), sizes.size)
    else:
        probabilities = resize_bilinear(logits, sizes.size).sigmoid()
    inside = (probabilities >= threshold) & ~nan  # [B, N, H, W]
    at_threshold = (probabilities - threshold).abs() < NEAR
    products = (scores[:, :, None, None] * probabilities).masked_fill(nan | (scores == 0)[:, :, None, None], -1)
    best = products.topk(min(2, products.shape[1]), dim=1)
    expected = best.indices[:, 0].masked_fill(best.values[:, 0] < 0, -1)
    sure = best.values[:, 0] - best.values[:, -1] > NEAR * best.values[:, 0]
    sure |= (best.values[:, 0] < 0) | (products.shape[1] == 1)
    if clip:
        own = inside.gather(1, expected.clamp(min=0)[:, None]).squeeze(1)
        sure &= ~at_threshold.gather(1, expected.clamp(min=0)[:, None]).squeeze(1)
        expected = expected.masked_fill(~own, -1)
    assert sure.double().mean() > 0.9
    assert torch.equal(winner.long()[sure], expected[sure])

    kept = (scores > 0)[:, :, None, None]
    queries = torch.arange(scores.shape[1])[:, None, None]
    visible = (winner[:, None] == queries).sum((-2, -1))
    assert torch.equal(areas[..., 2].long(), visible)
    mask_area = (inside & kept).sum((-2, -1))
    assert ((areas[..., 1] - mask_area).abs() <= (at_threshold & kept).sum((-2, -1))).all()
    if not clip:
        assert torch.equal(areas[..., 0].long(), visible)
    assert (areas[..., 0].sum(-1) <= winner[0].numel()).all() and (areas[..., 0] >= areas[..., 2]).all()
    assert torch.equal(nan_logits.long(), mask_logits.isnan().sum((-2, -1)) * (scores > 0))
    return winner, areas


@pytest.mark.parametrize("resize", [False, True])
@pytest.mark.parametrize("sizes", GEOMETRIES.values(), ids=GEOMETRIES)
def test_geometries(sizes, resize, generator):
    check(*inputs(sizes, generator, batch=1), sizes, resize)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("clip", [False, True])
def test_half_precision_logits(dtype, clip, generator):
    sizes = GEOMETRIES["both steps"]
    check(*inputs(sizes, generator, queries=40, dtype=dtype), sizes, clip=clip, threshold=0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("resize", [False, True])
def test_odd_addresses(resize, dtype, generator):
    scores, mask_logits = inputs(USUAL, generator, dtype=dtype)
    check(at_odd_address(scores), at_odd_address(mask_logits), USUAL, resize)


@pytest.mark.parametrize("resize", [False, True])
@pytest.mark.parametrize("clip", [False, True])
def test_nan_and_infinite_logits(resize, clip, generator):
    sizes = GEOMETRIES["both steps"]
    scores, mask_logits = inputs(sizes, generator)
    # Infinities of both signs would cancel in one query, and leave a sign to rounding.
    mask_logits[:, ::2][torch.rand(2, 9, *sizes.grid, generator=generator) < 0.05] = float("inf")
    mask_logits[:, 1::2][torch.rand(2, 9, *sizes.grid, generator=generator) < 0.05] = -float("inf")
    mask_logits[torch.rand(mask_logits.shape, generator=generator) < 0.05] = float("nan")
    mask_logits[:, :, 2, 3][scores > 0] = float("nan")
    winner, _ = check(scores, mask_logits, sizes, resize, clip)
    assert (winner == -1).any()


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_thresholds_at_the_ends(threshold, generator):
    scores, mask_logits = inputs(USUAL, generator)
    _, areas, _ = winners(scores, mask_logits, USUAL, threshold=threshold)
    pixels = USUAL.size[0] * USUAL.size[1]
    assert torch.equal(areas[..., 1], (scores > 0).int() * (pixels if threshold == 0 else 0))


def test_equal_queries_leave_the_pixel_to_the_first(generator):
    scores, mask_logits = inputs(USUAL, generator, queries=40)
    scores[:], mask_logits[:] = 0.5, mask_logits[:, :1]
    scores[:, :3] = 0
    winner, areas, _ = winners(scores, mask_logits, USUAL)
    assert (winner == 3).all() and (areas[:, 3, 0] == winner[0].numel()).all()


def test_nothing_is_kept(generator):
    scores, mask_logits = inputs(USUAL, generator)
    for kept, logits in ((torch.zeros_like(scores), mask_logits), (scores[:, :0], mask_logits[:, :0])):
        winner, areas, nan_logits = winners(kept, logits, USUAL)
        assert (winner == -1).all() and not areas.any() and not nan_logits.any()


def test_strides_and_bands_change_nothing(generator, monkeypatch):
    sizes = GEOMETRIES["both steps"]
    scores, mask_logits = inputs(sizes, generator)
    expected = winners(scores, mask_logits, sizes, clip=True)
    channels_last = mask_logits.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    monkeypatch.setattr(sys.modules["fastmask.kernels._resample"], "STAGE_BYTES", 1)
    for a, b in zip(expected, winners(scores.mT.contiguous().mT, channels_last, sizes, clip=True), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rule", RULES)
def test_segments(rule, generator):
    sizes = GEOMETRIES["cropped"]
    class_logits = random_classes(2, 18, 5, generator)
    mask_logits = random_masks(2, 18, sizes.grid, generator)
    options = {"rule": rule, "threshold": 0.4, "overlap_threshold": 0.3, "stuff_classes": (1, 3), **steps(sizes)}
    actual = panoptic_inference(class_logits, mask_logits, sizes.size, backend="triton", **options)
    expected = reference.panoptic_inference(class_logits, mask_logits, sizes.size, **options)
    for (segmentation, infos), (wanted, wanted_infos) in zip(actual, expected, strict=True):
        assert (segmentation != wanted).double().mean() < 0.01
        assert len(infos) == len(wanted_infos) > 1
        for info, wanted_info in zip(infos, wanted_infos, strict=True):
            assert abs(info.pop("area") - wanted_info.pop("area")) <= 5
            assert info.pop("score") == pytest.approx(wanted_info.pop("score"))
            assert info == wanted_info


@pytest.mark.parametrize("resize", [False, True])
def test_the_kernels_of_both_backends_agree(resize, generator):
    sizes = GEOMETRIES["both steps"]
    scores, mask_logits = inputs(sizes, generator)
    winner, areas, _ = winners(scores, mask_logits, sizes, resize)
    native, native_areas, _ = torch.ops.fastmask.panoptic_winners(
        scores, mask_logits, resize, False, 0.5, *sizes.arguments()
    )
    assert (winner != native).double().mean() < 0.005
    assert (areas - native_areas).abs().max() <= 3
