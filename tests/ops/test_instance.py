"""Instance inference: the public function against the reference, and run lengths against pycocotools; the battery of
operators checks masks, sums and boxes."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastmask import instance_inference, reference
from fastmask.measure import peak_memory
from fastmask.ops import _mask_source
from fastmask.ops import instance as instance_module
from fastmask.ops._geometry import Geometry
from fastmask.ops.instance import INSTANCE_MASKS, _bounding_boxes, _encode
from fastmask.testing import assert_within_budget
from tests.helpers.inference_inputs import (
    BAD_LOGITS_AND_SIZES,
    GEOMETRIES,
    SMALL_GEOMETRIES,
    check_refused,
    exact_embeddings,
    make_class_logits,
    make_logits,
    random_classes,
    random_masks,
    steps,
)
from tests.helpers.instance_operator import box_of, make_queries

RULES = ("mask2former", "huggingface", "rf_detr")


def masks_of(
    mask_logits: Tensor, queries: Tensor, geometry: Geometry, packed: bool = False, backend: str = "native"
) -> tuple[Tensor, ...]:
    return INSTANCE_MASKS(backend, mask_logits, queries, packed, *geometry.arguments())


@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0])
def test_all_or_nothing(value):
    """A logit of 0 is background; tiles that lie wholly on one side."""
    geometry = Geometry((9, 40), None, None, (36, 160))
    masks, foreground, area, boxes, _ = masks_of(torch.full((1, 1, 9, 40), value), torch.zeros(1, 1).long(), geometry)
    assert (masks == (value > 0)).all()
    assert area == (36 * 160 if value > 0 else 0)
    assert foreground.item() == pytest.approx(area.item() * torch.tensor(value).sigmoid().item(), rel=1e-6)
    assert boxes.flatten().tolist() == ([0, 0, 160, 36] if value > 0 else [0, 0, 0, 0])


@pytest.mark.parametrize(
    ("geometry", "backend"),
    [
        *(pytest.param(geometry, "native", id=f"native-{name}") for name, geometry in GEOMETRIES.items()),
        *(
            pytest.param(SMALL_GEOMETRIES[name], "triton", id=f"triton-{name}")
            for name in ("stride 4", "one dimension")
        ),
    ],
    indirect=["backend"],
)
def test_bits_are_the_bytes(geometry, backend, generator):
    queries = make_queries(generator)[:, :4] if backend == "triton" else make_queries(generator)
    arguments = (make_logits(generator, geometry.grid), queries, geometry)
    masks, *others = masks_of(*arguments, backend=backend)
    bits, *same = masks_of(*arguments, packed=True, backend=backend)
    assert bits.numpy().tobytes() == np.packbits(masks.numpy(), axis=-1, bitorder="little").tobytes()
    assert all(map(torch.equal, same, others))


@pytest.mark.parametrize("backend", ["native", "triton"], indirect=True)
@pytest.mark.parametrize(
    "geometry",
    [Geometry((12, 5), None, None, (48, 20)), Geometry((12, 5), (48, 20), (47, 19), (53, 21))],
    ids=["stride 4", "both steps"],
)
def test_bands_of_rows_make_the_whole(geometry, backend, generator):
    """Bands that begin at each of the four rows that read the same logits; the fourth takes more than one program."""
    height = geometry.size[0]
    mask_logits, queries = make_logits(generator, geometry.grid, batch=1, queries=4), torch.tensor([[2, -1, 0, 3]])
    whole, foreground, area, _, _ = masks_of(mask_logits, queries, geometry, backend=backend)
    foregrounds, areas, bands = 0, 0, []
    for top, rows in ((0, 5), (5, 1), (6, 1), (7, height - 8), (height - 1, 1)):
        first, end = geometry.input_rows(top, rows)
        arguments = (mask_logits[:, :, first:end], queries, False, *geometry.arguments(first, top, rows))
        masks, band_foreground, band_area, boxes, _ = INSTANCE_MASKS(backend, *arguments)
        on_whole = F.pad(masks, (0, 0, top, height - top - rows))
        assert boxes[0].tolist() == [box_of(mask) for mask in on_whole[0].numpy()]
        foregrounds, areas = foregrounds + band_foreground, areas + band_area
        bands.append(masks)
    assert torch.cat(bands, 2).equal(whole) and areas.equal(area)
    torch.testing.assert_close(foregrounds, foreground, rtol=1e-6, atol=0)


@pytest.mark.usefixtures("triton_kernels")
def test_a_query_beyond_the_last_reads_nothing(generator):
    geometry = SMALL_GEOMETRIES["stride 4"]
    mask_logits, queries = make_logits(generator, geometry.grid, queries=6), torch.tensor([[1 << 40, -1]] * 2)
    for result in masks_of(mask_logits, queries, geometry, backend="triton"):
        assert not result[:, 0].any() and not result[:, -1].any()


@pytest.mark.usefixtures("triton_kernels")
def test_no_queries_have_no_masks(generator):
    geometry = SMALL_GEOMETRIES["stride 4"]
    for result in masks_of(torch.zeros(1, 0, *geometry.grid), torch.full((1, 3), -1), geometry, backend="triton"):
        assert not result.any()


@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize("width", [16, 33])
def test_rows_of_masks_are_padded_to_whole_groups(width, generator):
    """Eight pixels are one store, whatever the width; fake masks have the strides of real ones."""
    geometry = Geometry((5, 7), None, None, (20, width))
    mask_logits, queries = make_logits(generator, geometry.grid, batch=1), torch.tensor([[3, -1]])
    masks, *_ = masks_of(mask_logits, queries, geometry, backend="triton")
    assert masks.stride(-2) == -(-width // 8) * 8
    fake_masks, *_ = masks_of(mask_logits.to("meta"), queries.to("meta"), geometry)
    assert fake_masks.shape == masks.shape and fake_masks.stride() == masks.stride()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_instances_of_triton(rule, backend, generator):
    geometry = SMALL_GEOMETRIES["cropped"]
    class_logits, mask_logits = random_classes(2, 6, 4, generator), random_masks(2, 6, geometry.grid, generator)
    options = {"rule": rule, "top_k": 4, **steps(geometry)}
    actual = instance_inference(class_logits, mask_logits, geometry.size, backend=backend, **options)
    expected = reference.instance_inference(class_logits, mask_logits, geometry.size, **options)
    for result, wanted in zip(actual, expected, strict=True):
        assert torch.equal(result["labels"], wanted["labels"])
        assert (result["masks"] != wanted["masks"]).double().mean() < 1e-3
        torch.testing.assert_close(result["scores"], wanted["scores"])


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("stuff_classes", [(), {0, 2}])
def test_public_results_equal_the_reference(geometry, rule, stuff_classes, generator):
    class_logits, mask_logits = make_class_logits(generator), make_logits(generator, geometry.grid)
    class_logits[0, 3] = float("nan")
    mask_logits[0, :, 0, 0] = float("nan")
    options = {"rule": rule, "top_k": 23, "stuff_classes": stuff_classes, "boxes": True, "details": True}
    options |= {"padded_size": geometry.padded_size, "valid_size": geometry.valid_size}
    results = instance_inference(class_logits, mask_logits, geometry.size, **options)
    expected, exact = (
        instance_inference(class_logits.to(dtype), mask_logits.to(dtype), geometry.size, **options, backend="reference")
        for dtype in (torch.float32, torch.float64)
    )
    for result, single, double in zip(results, expected, exact, strict=True):
        assert (
            result.keys() == single.keys() == {"scores", "labels", "masks", "boxes", "queries", "nan_logits", "areas"}
        )
        assert torch.equal(result["areas"], result["masks"].sum((1, 2)))
        assert all(value.dtype == single[name].dtype for name, value in result.items())
        assert all(result[name].equal(single[name]) for name in ("labels", "queries", "nan_logits"))
        assert (result["masks"] != double["masks"]).float().mean() < 1e-3
        assert result["boxes"].tolist() == [box_of(mask) for mask in result["masks"].numpy()]
        assert single["boxes"].tolist() == [box_of(mask) for mask in single["masks"].numpy()]
        if result["masks"].equal(double["masks"]):
            assert_within_budget(result["scores"], single["scores"], double["scores"], name="scores")

    packed = instance_inference(class_logits, mask_logits, geometry.size, **options, output="rle")
    for result, dense in zip(packed, results, strict=True):
        assert result.keys() == {"scores", "labels", "rle", "boxes", "queries", "nan_logits", "areas"}
        assert all(result[name].equal(dense[name]) for name in ("scores", "labels", "boxes"))
        assert result["rle"] == reference.rle_encode(dense["masks"])
        assert torch.equal(result["areas"], dense["masks"].sum((1, 2)))


def test_only_what_is_asked_for_is_returned(generator):
    class_logits, mask_logits = make_class_logits(generator), make_logits(generator, (9, 11))
    for backend in ("native", "reference"):
        for output in ("masks", "rle"):
            results = instance_inference(class_logits, mask_logits, (21, 34), output=output, backend=backend)
            assert all(result.keys() == {"scores", "labels", output} for result in results)


def test_a_query_of_several_classes_has_one_mask(generator):
    """Also where the host makes run lengths in several pieces."""
    class_logits, mask_logits = make_class_logits(generator, queries=2), make_logits(generator, (9, 11), queries=2)
    for result in instance_inference(class_logits, mask_logits, (21, 34), details=True):
        assert len(result["scores"]) == 8
        for query, mask in zip(result["queries"], result["masks"], strict=True):
            other = (result["queries"] == query).nonzero()[0]
            assert mask.equal(result["masks"][other][0])


@pytest.mark.parametrize("rule", RULES)
def test_run_lengths_in_pieces(rule, generator, monkeypatch):
    class_logits, mask_logits = make_class_logits(generator), make_logits(generator, (9, 11))
    options = {"rule": rule, "output": "rle", "boxes": True, "top_k": 7, "stuff_classes": {1}}
    expected = instance_inference(class_logits, mask_logits, (21, 34), **options)
    monkeypatch.setitem(instance_module.MASK_BYTES, "cpu", 2 * 21 * 34)
    for result, wanted in zip(
        instance_inference(class_logits, mask_logits, (21, 34), **options), expected, strict=True
    ):
        assert result["rle"] == wanted["rle"]
        assert result["boxes"].equal(wanted["boxes"])
        assert result["scores"].equal(wanted["scores"])


def test_no_queries_and_no_things(generator):
    class_logits, mask_logits = make_class_logits(generator), make_logits(generator, (9, 11))
    for rule in RULES:
        for output in ("masks", "rle"):
            options = {"rule": rule, "output": output, "boxes": True}
            results = instance_inference(class_logits[:, :0], mask_logits[:, :0], (21, 34), **options)
            results += instance_inference(class_logits, mask_logits, (21, 34), **options, stuff_classes=range(5))
            assert [len(result["scores"]) for result in results] == [0] * 4
            assert [len(result[output]) for result in results] == [0] * 4
            assert [tuple(result["boxes"].shape) for result in results] == [(0, 4)] * 4
            assert instance_inference(class_logits[:0], mask_logits[:0], (21, 34), **options) == []


def decode(rle: dict[str, object]) -> np.ndarray:
    """Character by character, pixel by pixel."""
    height, width = rle["size"]
    lengths, position = [], 0
    counts = rle["counts"]
    while position < len(counts):
        value, shift, more = 0, 0, True
        while more:
            digit = counts[position] - 48
            value |= (digit & 31) << shift
            shift += 5
            position += 1
            more = digit & 32 != 0
            if not more and digit & 16:
                value |= -1 << shift
        lengths.append(value + lengths[-2] if len(lengths) > 2 else value)
    pixels = [i % 2 for i, length in enumerate(lengths) for _ in range(length)]
    return np.array(pixels, dtype=bool).reshape(width, height).T


def binary_masks(generator: torch.Generator) -> list[Tensor]:
    """Of all sizes: noise, blobs, stripes, empty and full."""
    masks = [torch.zeros(1, 1, 1) > 0, torch.ones(1, 1, 1) > 0, torch.ones(2, 300, 65) > 0, torch.zeros(2, 65, 300) > 0]
    for height, width in ((1, 130), (130, 1), (64, 64), (63, 65), (17, 128), (90, 41)):
        masks += [torch.rand(3, height, width, generator=generator) < share for share in (0.02, 0.5, 0.97)]
        masks.append(make_logits(generator, (height, width), batch=1, queries=5)[0] > 0)
        masks.append(((torch.arange(height)[:, None] + torch.arange(width)) % 2 == 0)[None])
    masks.append(make_logits(generator, (700, 900), batch=1, queries=2)[0] > 0)
    return masks


def encodings(masks: Tensor) -> list[list[bytes]]:
    """Of bytes, of bits, and by the reference."""
    packed = torch.from_numpy(np.packbits(masks.numpy(), axis=-1, bitorder="little"))
    results = [[rle["counts"] for rle in reference.rle_encode(masks)]]
    for form in (masks, packed):
        counts, offsets, areas = torch.ops.fastmask.rle_encode(form, masks.shape[2])
        assert torch.equal(areas, masks.sum((1, 2)))
        data = counts.numpy().tobytes()
        results.append([data[begin:end] for begin, end in pairwise(offsets.tolist())])
    return results


def test_run_lengths_decode_to_their_masks(generator):
    for masks in binary_masks(generator)[:-1]:
        for results in encodings(masks):
            for counts, mask in zip(results, masks, strict=True):
                np.testing.assert_array_equal(decode({"size": mask.shape, "counts": counts}), mask)


def test_run_lengths_equal_pycocotools(generator):
    coco = pytest.importorskip("pycocotools.mask")
    for masks in binary_masks(generator):
        wanted = coco.encode(np.asfortranarray(masks.permute(1, 2, 0).numpy().astype(np.uint8)))
        for results in encodings(masks):
            assert results == [rle["counts"] for rle in wanted]
        assert [list(rle["size"]) for rle in wanted] == [rle["size"] for rle in reference.rle_encode(masks)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["four times larger", "two steps up", "smaller than the logits"])
def test_embeddings_equal_their_product(rule, name, generator, monkeypatch):
    """In bands of a few rows, with NaN in rows that two bands read; masks that some bands do not meet."""
    geometry = GEOMETRIES[name]
    class_logits = make_class_logits(generator)
    class_logits[:, 5] = 0
    mask_embed, pixel_embed = exact_embeddings(generator, geometry.grid)
    pixel_embed[0, :, 3:] -= 4
    pixel_embed[1, 2, ::4] = float("nan")
    mask_logits = torch.einsum("bnc,bchw->bnhw", mask_embed, pixel_embed)
    options = {"rule": rule, "top_k": 9, "stuff_classes": (1,), "details": True, "boxes": True}
    options |= {"padded_size": geometry.padded_size, "valid_size": geometry.valid_size}
    monkeypatch.setitem(_mask_source.BAND_BYTES, "cpu", 6000)
    for output in ("masks", "rle"):
        expected = instance_inference(class_logits, mask_logits, geometry.size, **options, output=output)
        results = instance_inference(class_logits, (mask_embed, pixel_embed), geometry.size, **options, output=output)
        for result, wanted in zip(results, expected, strict=True):
            torch.testing.assert_close(result.pop("scores"), wanted.pop("scores"), rtol=1e-6, atol=0)
            assert result.keys() == wanted.keys()
            for key, value in wanted.items():
                assert result[key] == value if key == "rle" else torch.equal(result[key], value)


@pytest.mark.parametrize("rule", RULES)
def test_run_lengths_need_no_bytes_for_pixels(rule, generator, monkeypatch):
    """100 masks of this size take 15 MB as bytes and 1.9 MB as bits."""
    class_logits = make_class_logits(generator, batch=1, queries=40)
    mask_logits = make_logits(generator, (80, 120), batch=1, queries=40)
    monkeypatch.setitem(instance_module.MASK_BYTES, "cpu", 320 * 480)
    options = {"rule": rule, "output": "rle", "boxes": True}
    _, memory = peak_memory(
        lambda: instance_inference(class_logits, mask_logits, (320, 480), **options), torch.device("cpu")
    )
    assert memory["allocator"] < 3e6


BAD_ARGUMENTS = {
    "no results": ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
    "unknown rule": ({"rule": "maskformer"}, ValueError, "rule must be one of mask2former"),
    "unknown output": ({"output": "polygons"}, ValueError, "output must be one of masks, rle"),
    **BAD_LOGITS_AND_SIZES,
}


@pytest.mark.parametrize(("change", "error", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments(change, error, message, generator):
    check_refused(instance_inference, generator, change, error, message)


@pytest.mark.parametrize("size", [(5, 11), (10, 22), (23, 40), (16, 33), (3, 7), (1, 1), (64, 5)])
def test_resized_masks(size, generator):
    """Larger, smaller and equal, by whole ratios and others: as PyTorch does; run lengths and boxes fit the masks."""
    masks = torch.rand(4, 5, 11, generator=generator) < torch.tensor([0.0, 0.1, 0.5, 1.0])[:, None, None]
    expected = F.interpolate(masks.to(torch.uint8)[:, None], size, mode="nearest")[:, 0].bool()
    assert torch.ops.fastmask.resize_masks(masks, size).equal(expected)
    packed = torch.from_numpy(np.packbits(masks.numpy(), axis=-1, bitorder="little"))
    for form in (masks, packed):
        runs, areas = _encode(form, 11, size)
        assert runs == reference.rle_encode(expected)
        assert torch.equal(areas, expected.sum((1, 2)))
    assert _bounding_boxes(masks, size).equal(_bounding_boxes(expected, size))


def test_opcheck_of_resized_masks(generator):
    masks = torch.rand(3, 5, 11, generator=generator) < 0.5
    torch.library.opcheck(torch.ops.fastmask.resize_masks.default, (masks, (7, 30)))
    torch.library.opcheck(torch.ops.fastmask.rle_encode.default, (masks, 11, (7, 30)))


@pytest.mark.parametrize("size", [(0, 3), (3,), (3, -1), (3, 1 << 40)])
def test_sizes_of_no_mask(size):
    masks = torch.zeros(2, 4, 9, dtype=torch.bool)
    for run in (
        lambda: torch.ops.fastmask.resize_masks(masks, size),
        lambda: torch.ops.fastmask.rle_encode(masks, 9, size),
    ):
        with pytest.raises(RuntimeError, match="size must be"):
            run()


def test_opcheck_of_run_lengths(generator):
    masks = torch.rand(3, 5, 11, generator=generator) < 0.5
    torch.library.opcheck(torch.ops.fastmask.rle_encode.default, (masks, 11))
    torch.library.opcheck(torch.ops.fastmask.rle_encode.default, (masks[..., :2].to(torch.uint8), 11))


@pytest.mark.parametrize("shape", [(2, 4, 5), (2, 4, 1), (2, 0, 9)])
def test_run_lengths_of_masks_that_do_not_fit(shape):
    with pytest.raises(RuntimeError, match="masks"):
        torch.ops.fastmask.rle_encode(torch.zeros(shape, dtype=torch.bool), 9)
