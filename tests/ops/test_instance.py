"""Instance inference: masks, scores and boxes against the reference, and run lengths against pycocotools."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

import fastmask
from fastmask import instance_inference, reference
from fastmask.measure import peak_memory
from fastmask.ops import _mask_source
from fastmask.ops import instance as instance_module
from fastmask.ops._geometry import Geometry
from fastmask.reference._common import image_logits, reads_nan, resize_bilinear
from fastmask.testing import assert_within_budget, simd_level, simd_levels
from tests.helpers.inference_inputs import (
    GEOMETRIES,
    KINDS,
    exact_embeddings,
    layouts,
    make_class_logits,
    make_logits,
)
from tests.helpers.op_info import poisoned_memory

RULES = ("mask2former", "huggingface")


def make_queries(generator: torch.Generator, batch: int = 2, queries: int = 9) -> Tensor:
    """``(B, R)``: every query at least once, some again, padding in between."""
    picks = torch.cat([torch.arange(queries), torch.tensor([-1, 0, 3 % queries, 3 % queries, -1])])
    return torch.stack([picks[torch.randperm(len(picks), generator=generator)] for _ in range(batch)])


def masks_of(mask_logits: Tensor, queries: Tensor, geometry: Geometry, packed: bool = False) -> list[Tensor]:
    return torch.ops.fastmask.instance_masks(mask_logits, queries, packed, *geometry.arguments())


def sums_of(logits: Tensor, masks: Tensor) -> Tensor:
    return logits.sigmoid().masked_fill(~masks, 0).sum((-2, -1))


def plain_box(mask: np.ndarray) -> list[int]:
    rows, columns = np.nonzero(mask)
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] if len(rows) else [0, 0, 0, 0]


def check_against_reference(mask_logits: Tensor, queries: Tensor, geometry: Geometry) -> list[Tensor]:
    """Masks equal the reference's in float64 where a logit is farther from 0 than rounding can move it."""
    masks, foreground, area, boxes, nan_logits = results = masks_of(mask_logits, queries, geometry)
    steps = (geometry.padded_size, geometry.valid_size)
    pick = torch.arange(len(queries))[:, None], queries.clamp(min=0)
    present = queries >= 0
    nan = reads_nan(mask_logits, *steps, geometry.size)[pick]
    exact, single = (
        resize_bilinear(image_logits(mask_logits.to(dtype), *steps), geometry.size)[pick]
        for dtype in (torch.float64, torch.float32)
    )
    finite = mask_logits[mask_logits.abs() < 1e4]
    rounding = 16 * torch.finfo(torch.float32).eps * finite.abs().max()
    expected = (exact > 0) & ~nan & present[..., None, None]
    assert masks.dtype == torch.bool
    assert (masks == expected)[(exact.abs() > rounding) | nan | ~present[..., None, None]].all()

    assert area.equal(masks.sum((2, 3), dtype=torch.int32))
    assert_within_budget(foreground, sums_of(single, masks), sums_of(exact, masks), name="foreground_sum")
    for b, r in np.ndindex(queries.shape):
        assert boxes[b, r].tolist() == plain_box(masks[b, r].numpy())
    assert nan_logits.equal(mask_logits.isnan().sum((2, 3), dtype=torch.int32)[pick] * present)

    bits, *others = masks_of(mask_logits, queries, geometry, packed=True)
    assert bits.numpy().tobytes() == np.packbits(masks.numpy(), axis=-1, bitorder="little").tobytes()
    assert all(map(torch.equal, others, results[1:]))
    return results


@pytest.mark.parametrize("level", simd_levels())
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_masks_sums_and_boxes(geometry, kind, level, generator):
    with simd_level(level):
        check_against_reference(make_logits(generator, geometry.grid, kind=kind), make_queries(generator), geometry)


@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0])
def test_all_or_nothing(value):
    """A logit of 0 is background; tiles that lie wholly on one side."""
    geometry = Geometry((9, 40), None, None, (36, 160))
    masks, foreground, area, boxes, _ = masks_of(torch.full((1, 1, 9, 40), value), torch.zeros(1, 1).long(), geometry)
    assert (masks == (value > 0)).all()
    assert area == (36 * 160 if value > 0 else 0)
    assert foreground.item() == pytest.approx(area.item() * torch.tensor(value).sigmoid().item(), rel=1e-6)
    assert boxes.flatten().tolist() == ([0, 0, 160, 36] if value > 0 else [0, 0, 0, 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("level", simd_levels())
def test_half_precision_logits_are_read_as_they_are(dtype, level, generator):
    geometry = GEOMETRIES["two steps up"]
    mask_logits, queries = make_logits(generator, geometry.grid).to(dtype), make_queries(generator)
    with simd_level(level):
        results = masks_of(mask_logits, queries, geometry)
        assert all(map(torch.equal, results, masks_of(mask_logits.float(), queries, geometry)))


def test_layouts(generator):
    geometry = GEOMETRIES["odd sizes"]
    mask_logits, queries = make_logits(generator, geometry.grid), make_queries(generator)
    expected = masks_of(mask_logits, queries, geometry)
    for layout in layouts(mask_logits).values():
        assert all(map(torch.equal, masks_of(layout, queries, geometry), expected))
    assert all(map(torch.equal, masks_of(mask_logits, queries.t().contiguous().t(), geometry), expected))


@pytest.mark.parametrize("kind", KINDS)
def test_bits_do_not_depend_on_threads_or_runs(kind, generator):
    geometry = GEOMETRIES["two steps up"]
    mask_logits, queries = make_logits(generator, geometry.grid, kind=kind), make_queries(generator)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 1, 2, 5):
            torch.set_num_threads(count)
            results.append(masks_of(mask_logits, queries, geometry))
        assert all(all(map(torch.equal, result, results[0])) for result in results)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_outputs_are_written_whole(geometry, generator):
    mask_logits, queries = make_logits(generator, geometry.grid), make_queries(generator)
    for packed in (False, True):
        expected = masks_of(mask_logits, queries, geometry, packed)
        with poisoned_memory():
            assert all(map(torch.equal, masks_of(mask_logits, queries, geometry, packed), expected))


def test_nan_and_infinite_logits(generator):
    geometry = GEOMETRIES["odd sizes"]
    mask_logits = make_logits(generator, geometry.grid)
    mask_logits[0, 0, 3:5, 7] = float("nan")
    mask_logits[0, 1] = float("nan")
    mask_logits[0, 2, 2, :9] = float("inf")
    mask_logits[0, 3, :, 20:] = -float("inf")
    check_against_reference(mask_logits, make_queries(generator), geometry)


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
        assert result.keys() == single.keys() == {"scores", "labels", "masks", "boxes", "queries", "nan_logits"}
        for name in ("labels", "queries", "nan_logits"):
            assert result[name].dtype == single[name].dtype
            assert result[name].equal(single[name])
        assert (result["masks"] != double["masks"]).float().mean() < 1e-3
        assert result["boxes"].tolist() == [plain_box(mask) for mask in result["masks"].numpy()]
        assert single["boxes"].tolist() == [plain_box(mask) for mask in single["masks"].numpy()]
        if result["masks"].equal(double["masks"]):
            assert_within_budget(result["scores"], single["scores"], double["scores"], name="scores")

    packed = instance_inference(class_logits, mask_logits, geometry.size, **options, output="rle")
    for result, dense in zip(packed, results, strict=True):
        assert result.keys() == {"scores", "labels", "rle", "boxes", "queries", "nan_logits"}
        assert all(result[name].equal(dense[name]) for name in ("scores", "labels", "boxes"))
        assert result["rle"] == reference.rle_encode(dense["masks"])


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


def test_run_lengths_in_pieces(generator, monkeypatch):
    class_logits, mask_logits = make_class_logits(generator), make_logits(generator, (9, 11))
    options = {"rule": "huggingface", "output": "rle", "boxes": True, "top_k": 7}
    expected = instance_inference(class_logits, mask_logits, (21, 34), **options)
    monkeypatch.setattr(instance_module, "MASK_BYTES", 2 * 21 * 34)
    for result, wanted in zip(
        instance_inference(class_logits, mask_logits, (21, 34), **options), expected, strict=True
    ):
        assert result["rle"] == wanted["rle"]
        assert result["boxes"].equal(wanted["boxes"])


def test_no_queries_and_no_things(generator):
    class_logits, mask_logits = make_class_logits(generator), make_logits(generator, (9, 11))
    for rule in RULES:
        for output in ("masks", "rle"):
            options = {"rule": rule, "output": output, "boxes": True}
            results = instance_inference(class_logits[:, :0], mask_logits[:, :0], (21, 34), **options)
            results += instance_inference(class_logits, mask_logits, (21, 34), **options, stuff_classes=range(4))
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
        counts, offsets = torch.ops.fastmask.rle_encode(form, masks.shape[2])
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
    monkeypatch.setattr(instance_module, "MASK_BYTES", 320 * 480)
    options = {"rule": rule, "output": "rle", "boxes": True}
    _, memory = peak_memory(
        lambda: instance_inference(class_logits, mask_logits, (320, 480), **options), torch.device("cpu")
    )
    assert memory["allocator"] < 3e6


def test_opcheck(generator):
    geometry = Geometry((5, 7), (10, 14), (9, 11), (13, 17))
    mask_logits, queries = make_logits(generator, geometry.grid), make_queries(generator)
    for packed in (False, True):
        for layout in (mask_logits, mask_logits.mT.contiguous().mT):
            arguments = (layout, queries, packed, *geometry.arguments())
            torch.library.opcheck(torch.ops.fastmask.instance_masks.default, arguments)
    masks = torch.rand(3, 5, 11, generator=generator) < 0.5
    torch.library.opcheck(torch.ops.fastmask.rle_encode.default, (masks, 11))
    torch.library.opcheck(torch.ops.fastmask.rle_encode.default, (masks[..., :2].to(torch.uint8), 11))


def test_compiles_to_one_graph(generator):
    geometry = GEOMETRIES["odd sizes"]
    mask_logits, queries = make_logits(generator, geometry.grid), make_queries(generator)

    def total(mask_logits, queries):
        masks, foreground, area, boxes, _ = masks_of(mask_logits, queries, geometry)
        return masks.logical_not(), foreground / area, boxes + 1

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(mask_logits, queries), total(mask_logits, queries), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


BAD_ARGUMENTS = {
    "no results": ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
    "unknown rule": ({"rule": "maskformer"}, ValueError, "rule must be one of mask2former"),
    "unknown output": ({"output": "polygons"}, ValueError, "output must be one of masks, rle"),
    "no size": ({"size": (4, 0)}, ValueError, "size must be"),
    "crop beyond the map": ({"valid_size": (10, 4)}, ValueError, "valid_size"),
    "integer logits": ({"mask_logits": torch.zeros(2, 9, 9, 11).int()}, TypeError, "mask_logits must be floating"),
    "other queries": ({"mask_logits": torch.zeros(2, 8, 9, 11)}, ValueError, "mask_logits"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments(change, error, message, generator):
    arguments = {"mask_logits": make_logits(generator, (9, 11)), "size": (21, 34)} | change
    with pytest.raises(error, match=message):
        fastmask.instance_inference(make_class_logits(generator), **arguments)


BAD_OPERANDS = {
    "a query beyond N": (lambda m, q, g: (m, q + 1, False, *g), "queries holds 9"),
    "a query below -1": (lambda m, q, g: (m, q - 1, False, *g), "queries holds -2"),
    "queries of another dtype": (lambda m, q, g: (m, q.int(), False, *g), "queries must be"),
    "queries of another batch": (lambda m, q, g: (m, q[:1], False, *g), "queries must be"),
    "rows that are missing": (lambda m, q, g: (m[:, :, :4], q, False, *g), "rows"),
}


@pytest.mark.parametrize(("change", "message"), BAD_OPERANDS.values(), ids=BAD_OPERANDS)
def test_the_operator_reads_nothing_out_of_bounds(change, message, generator):
    geometry = Geometry((9, 11), None, None, (21, 34))
    queries = torch.arange(-1, 9).expand(2, -1)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastmask.instance_masks(*change(make_logits(generator, (9, 11)), queries, geometry.arguments()))


@pytest.mark.parametrize("shape", [(2, 4, 5), (2, 4, 1), (2, 0, 9)])
def test_run_lengths_of_masks_that_do_not_fit(shape):
    with pytest.raises(RuntimeError, match="masks"):
        torch.ops.fastmask.rle_encode(torch.zeros(shape, dtype=torch.bool), 9)
