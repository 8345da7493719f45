"""Semantic inference: the C++ kernel against the reference in float64."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch.nn.functional import interpolate

from fastmask import reference, semantic_inference
from fastmask.ops import _mask_source, semantic
from fastmask.ops._geometry import Geometry
from fastmask.testing import simd_level, simd_levels
from tests.helpers.semantic_operator import SEMANTIC_INFERENCE, SHAPES, STEPS


def random_inputs(shape, generator, scale=4.0):
    batch_size, num_queries, num_classes, grid, _ = shape
    class_logits = 2 * torch.randn(batch_size, num_queries, num_classes + 1, generator=generator)
    return class_logits, scale * torch.randn(batch_size, num_queries, *grid, generator=generator)


def smooth_inputs(generator, *, num_queries=40, num_classes=19, grid=(32, 60), no_object=30):
    """As after training: few queries are objects, whose smooth masks cover the plane; the others are sure of being
    none."""
    class_logits = torch.randn(1, num_queries, num_classes + 1, generator=generator)
    kinds = torch.randint(num_classes, (num_queries - no_object,), generator=generator)
    class_logits[0, torch.arange(num_queries - no_object), kinds] += 8
    rest = class_logits[:, num_queries - no_object :]
    rest[..., -1] = rest[..., :-1].logsumexp(-1) + 4.6
    coarse = torch.randn(1, num_queries, 4, 6, generator=generator) * 12 - 4
    masks = interpolate(coarse, grid, mode="bicubic") + torch.randn(1, num_queries, *grid, generator=generator)
    return class_logits, masks


@contextmanager
def all_queries():
    """No query is left out."""
    before = semantic.set_query_skipping(False)
    try:
        yield
    finally:
        semantic.set_query_skipping(before)


def check_labels(class_logits, mask_logits, size, **options):
    """Labels are those of the best scores, which the battery of operators checks, and details have the same bits."""
    scores = semantic_inference(class_logits, mask_logits, size, output="scores", backend="native", **options)
    labels = semantic_inference(class_logits, mask_logits, size, backend="native", **options)
    assert labels.dtype == semantic.label_dtype(scores.shape[1])
    assert torch.equal(labels.long(), scores.argmax(1))
    details = semantic_inference(class_logits, mask_logits, size, details=True, backend="native", **options)
    assert torch.equal(details.labels, labels)
    best = scores.topk(min(2, scores.shape[1]), dim=1).values
    assert torch.equal(details.score, best[:, 0])
    assert torch.equal(details.margin, best[:, 0] - best[:, 1] if scores.shape[1] > 1 else best[:, 0])
    assert torch.equal(details.nan_logits, mask_logits.isnan().sum((2, 3)).int())
    return labels


def check_against_reference(class_logits, mask_logits, size, **options):
    arguments = {"class_logits": class_logits, "mask_logits": mask_logits, "size": size, **options}
    SEMANTIC_INFERENCE.check(arguments, mask_logits.dtype, "native")
    return check_labels(class_logits, mask_logits, size, **options)


@pytest.mark.parametrize("case", SEMANTIC_INFERENCE.cases.values(), ids=SEMANTIC_INFERENCE.cases)
def test_labels(case, generator):
    check_labels(**case(generator))


@pytest.mark.parametrize("level", simd_levels())
@pytest.mark.parametrize("order", ["masks", "scores"])
def test_every_simd_level_and_dtype(level, order, generator):
    with simd_level(level):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            class_logits, mask_logits = random_inputs(SHAPES["odd sizes"], generator)
            check_against_reference(class_logits, mask_logits.to(dtype), (50, 117), order=order)
        class_logits, mask_logits = smooth_inputs(generator)
        labels = check_against_reference(class_logits, mask_logits, (128, 240), order=order)
        with all_queries():
            assert torch.equal(semantic_inference(class_logits, mask_logits, (128, 240), order=order), labels)


@pytest.mark.parametrize("level", simd_levels())
@pytest.mark.parametrize("size", [(128, 240), (33, 61), (301, 77), (20, 30)])
@pytest.mark.parametrize("num_classes", [1, 2, 19, 150])
def test_labels_are_the_same_without_the_queries_left_out(level, size, num_classes, generator):
    with simd_level(level):
        for scale in (0.05, 1.0, 20.0):
            class_logits, mask_logits = smooth_inputs(generator, num_classes=num_classes)
            mask_logits *= scale
            labels = semantic_inference(class_logits, mask_logits, size, backend="native")
            with all_queries():
                assert torch.equal(semantic_inference(class_logits, mask_logits, size, backend="native"), labels)


@pytest.mark.parametrize(
    "change",
    [
        lambda c, m: (c * 0, m * 0),  # all classes tie
        lambda c, m: (c[..., torch.arange(20) // 2], m),  # pairs of classes tie
        lambda c, m: (c, m * 0 - 200),  # all scores are 0
        lambda c, m: (c, m.sign() * torch.inf),
        lambda c, m: (c.masked_fill(torch.arange(20) < 19, -1e30), m),  # no class has any probability
        lambda c, m: (c.index_fill(1, torch.tensor([2]), torch.nan), m),
        lambda c, m: (c, m.index_fill(1, torch.tensor([0, 1, 2]), torch.nan)),
        lambda c, m: (c * 100, m * 100),
    ],
)
def test_hard_inputs_give_the_same_labels_without_the_queries_left_out(change, generator):
    class_logits, mask_logits = change(*smooth_inputs(generator))
    labels = semantic_inference(class_logits, mask_logits, (128, 240), backend="native")
    with all_queries():
        assert torch.equal(semantic_inference(class_logits, mask_logits, (128, 240), backend="native"), labels)


def test_ties_take_the_lowest_class(generator):
    class_logits, mask_logits = random_inputs((1, 5, 6, (8, 8), None), generator)
    class_logits[..., 3] = class_logits[..., 1] = class_logits.amax(-1) + 1
    for order in ("masks", "scores"):
        assert (semantic_inference(class_logits, mask_logits, (30, 30), order=order, backend="native") == 1).all()


@pytest.mark.parametrize("order", ["masks", "scores"])
def test_nan_and_infinite_logits(order, generator):
    class_logits, mask_logits = random_inputs((2, 6, 5, (12, 12), None), generator)
    clean = semantic_inference(class_logits, mask_logits, (48, 48), output="scores", order=order, backend="native")
    mask_logits[0, 1, 3, 4] = mask_logits[0, 1, 3, 5] = torch.nan
    mask_logits[1, 2] = torch.nan
    check_against_reference(class_logits, mask_logits, (48, 48), order=order)
    scores = semantic_inference(class_logits, mask_logits, (48, 48), output="scores", order=order, backend="native")
    assert torch.equal(scores[0, :, 24:], clean[0, :, 24:])
    without = class_logits.clone()
    others = [0, 1, 3, 4, 5]
    expected = semantic_inference(without[1:, others], mask_logits[1:, others], (48, 48), output="scores", order=order)
    torch.testing.assert_close(scores[1], expected[0])
    mask_logits[0, 3, :6] = torch.inf
    mask_logits[0, 3, 6:] = -torch.inf
    check_against_reference(class_logits, mask_logits, (48, 48), order=order)
    check_against_reference(class_logits, mask_logits, (17, 60), order=order)


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.mT.contiguous().mT,
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: torch.cat([x, x], 2)[:, :, : x.shape[2]],
        lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
        lambda x: x.repeat_interleave(2, 1)[:, ::2],
    ],
)
def test_non_contiguous_logits(layout, generator):
    class_logits, mask_logits = random_inputs(SHAPES["usual"], generator)
    strided = layout(mask_logits)
    assert not strided.is_contiguous()
    for options in ({}, {"order": "scores"}, {"output": "scores"}):
        expected = semantic_inference(class_logits, mask_logits, (128, 128), **options)
        assert torch.equal(
            semantic_inference(class_logits.mT.contiguous().mT, strided, (128, 128), **options), expected
        )


def test_one_plane_for_all_queries(generator):
    class_logits, mask_logits = random_inputs(SHAPES["usual"], generator)
    same = mask_logits[:, :1].expand_as(mask_logits)
    assert torch.equal(
        semantic_inference(class_logits, same, (50, 60)), semantic_inference(class_logits, same.contiguous(), (50, 60))
    )


@pytest.mark.parametrize("order", ["masks", "scores"])
@pytest.mark.parametrize("steps", [{}, STEPS["two steps"], STEPS["smaller, then larger"]])
@pytest.mark.parametrize("size", [(70, 100), (13, 20)])
def test_bands_of_rows_make_the_whole(order, steps, size, generator):
    class_logits, mask_logits = random_inputs((2, 8, 9, (24, 40), None), generator)
    probabilities = class_logits.softmax(-1)[..., :-1].contiguous()
    geometry = Geometry((24, 40), steps.get("padded_size"), steps.get("valid_size"), size)
    run = torch.ops.fastmask.semantic_inference
    whole = run(probabilities, mask_logits, order, "scores", False, *geometry.arguments())[0]
    for top, rows in ((0, 5), (5, 1), (6, size[0] - 6), (size[0] - 1, 1)):
        first, end = geometry.input_rows(top, rows)
        logits = mask_logits[:, :, first:end]
        band = run(probabilities, logits, order, "scores", False, *geometry.arguments(first, top, rows))[0]
        assert torch.equal(band, whole[:, :, top : top + rows])
    with pytest.raises(RuntimeError, match="of the result read the rows"):
        run(probabilities, mask_logits[:, :, :1], order, "scores", False, *geometry.arguments(0, size[0] - 1, 1))


@pytest.mark.parametrize("order", ["masks", "scores"])
@pytest.mark.parametrize("details", [False, True])
def test_from_embeddings(order, details, generator, monkeypatch):
    class_logits = torch.randn(2, 6, 8, generator=generator)
    mask_embed = torch.randn(2, 6, 16, generator=generator)
    pixel_embed = torch.randn(2, 16, 30, 44, generator=generator)
    pixel_embed[0, :, 12, 7] = torch.nan
    mask_logits = torch.einsum("bnc,bchw->bnhw", mask_embed, pixel_embed)
    options = {"order": order, "details": details, "padded_size": (120, 176), "valid_size": (111, 160)}
    expected = semantic_inference(class_logits, mask_logits, (99, 170), **options)
    monkeypatch.setitem(_mask_source.BAND_BYTES, "cpu", 2 * 6 * 44 * 4 * 6)
    source, _, _ = _mask_source.prepare(
        semantic.SEMANTIC_INFERENCE, class_logits, (mask_embed, pixel_embed), (99, 170), (120, 176), (111, 160), "auto"
    )
    shapes = [band.mask_logits.shape for band in source.bands()]
    assert len(shapes) > 4 and max(shape[2] for shape in shapes) <= 7
    actual = semantic_inference(class_logits, (mask_embed, pixel_embed), (99, 170), **options)
    if details:
        assert torch.equal(actual.nan_logits, expected.nan_logits)
        sure = expected.margin > 1e-5
        torch.testing.assert_close(actual.score, expected.score, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(actual.margin, expected.margin, rtol=1e-5, atol=1e-5)
        assert torch.equal(actual.labels[sure], expected.labels[sure])
    else:
        assert (actual == expected).float().mean() > 0.999


@pytest.mark.parametrize("num_classes", [1, 5])
def test_reference_details(num_classes, generator):
    class_logits, mask_logits = random_inputs((2, 6, num_classes, (8, 9), None), generator)
    mask_logits[0, 3, 2, 2] = torch.nan
    options = {"size": (20, 31), "backend": "reference"}
    details = semantic_inference(class_logits, mask_logits, details=True, **options)
    scores = semantic_inference(class_logits, mask_logits, output="scores", **options).sort(1, descending=True).values
    assert torch.equal(details.labels, semantic_inference(class_logits, mask_logits, **options))
    assert torch.equal(details.score, scores[:, 0])
    assert torch.equal(details.margin, scores[:, 0] - scores[:, 1] if num_classes > 1 else scores[:, 0])
    assert torch.equal(details.nan_logits, mask_logits.isnan().sum((2, 3)).int())
    native = semantic_inference(class_logits, mask_logits, (20, 31), details=True, backend="native")
    assert [x.dtype for x in native] == [x.dtype for x in details]


def test_label_dtypes_are_the_references():
    for num_classes in (1, 255, 256, 257, 32767, 32768, 32769):
        assert semantic.label_dtype(num_classes) == reference.label_dtype(num_classes)


def test_two_runs_give_the_same_bits_whatever_the_number_of_threads(generator):
    inputs = smooth_inputs(generator)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(
                [
                    semantic_inference(*inputs, (200, 300), order=order, output=output)
                    for order in ("masks", "scores")
                    for output in ("labels", "scores")
                ]
            )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(("output", "details"), [("labels", False), ("labels", True), ("scores", False)])
def test_opcheck(output, details, generator):
    """Of some rows; the battery has all rows of scores."""
    class_logits, mask_logits = random_inputs(SHAPES["odd sizes"], generator)
    probabilities = class_logits.softmax(-1)[..., :-1].contiguous()
    geometry = Geometry((13, 29), (52, 116), (50, 101), (20, 30)).arguments(0, 3, 12)
    arguments = (probabilities, mask_logits, "masks", output, details, *geometry)
    torch.library.opcheck(torch.ops.fastmask.semantic_inference.default, arguments)


def test_compiles_to_one_graph(generator):
    class_logits, mask_logits = random_inputs(SHAPES["odd sizes"], generator)
    embeddings = torch.randn(1, 7, 4, generator=generator), torch.randn(1, 4, 13, 29, generator=generator)
    for masks in (mask_logits, embeddings):
        compiled = torch.compile(semantic_inference, fullgraph=True, backend="aot_eager")
        expected = semantic_inference(class_logits, masks, (50, 117), details=True)
        assert all(map(torch.equal, compiled(class_logits, masks, (50, 117), details=True), expected))
