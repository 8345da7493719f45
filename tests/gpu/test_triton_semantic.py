"""The Triton kernels of semantic_inference against the reference in float64, and against the C++ operator, on the CPU:
interpreted or, with --compiled, as PTX.

float32 and float16 logits are held to the reference in float32, bfloat16 ones to the reference in bfloat16: their
products have one part, of fp16, for each factor.
"""

from __future__ import annotations

import sys
from importlib import import_module

import pytest
import torch

from fastmask import reference, semantic_inference
from fastmask.ops._geometry import Geometry
from fastmask.ops.semantic import label_dtype
from fastmask.testing import error_budget
from tests.helpers import gpu_errors
from tests.helpers.inference_inputs import SMALL_GEOMETRIES, random_classes, random_masks, steps
from tests.helpers.op_info import HALVES, poisoned_memory
from tests.helpers.semantic_operator import SEMANTIC_INFERENCE

pytestmark = pytest.mark.usefixtures("triton_kernels")

USUAL = SMALL_GEOMETRIES["stride 4"]


def kernels():
    return import_module("fastmask.kernels.semantic")


def reference_scores(class_logits, mask_logits, sizes, dtype, order):
    return reference.semantic_inference(
        class_logits.to(dtype), mask_logits.to(dtype), sizes.size, order=order, output="scores", **steps(sizes)
    )


def error_bound(same_dtype, exact, queries):
    """How far a score may be off."""
    return error_budget(torch.float32, same_dtype, exact, gpu_errors.semantic(queries), on_gpu=False)[0]


def assert_labels(labels, same_dtype, exact, queries):
    """The labels are the best classes wherever the best is ahead by more than two scores may be off together."""
    best = exact.topk(min(2, exact.shape[1]), dim=1).values
    sure = best[:, 0] - best[:, -1] > 2 * error_bound(same_dtype, exact, queries)
    assert exact.shape[1] == 1 or sure.double().mean() > 0.5
    assert torch.equal(labels.long()[sure], exact.argmax(1)[sure])


def inputs(sizes, generator, batch=1, queries=18, classes=5, dtype=torch.float32):
    return (
        random_classes(batch, queries, classes, generator, dtype),
        random_masks(batch, queries, sizes.grid, generator, dtype),
    )


def check_labels(class_logits, mask_logits, size, order, **sizes):
    """The labels are the best classes of the scores that the battery of operators checks."""
    own = torch.bfloat16 if mask_logits.dtype == torch.bfloat16 else torch.float32
    exact, same_dtype = (
        reference.semantic_inference(
            class_logits.to(dtype), mask_logits.to(dtype), size, order=order, output="scores", **sizes
        )
        for dtype in (torch.float64, own)
    )
    labels = semantic_inference(class_logits, mask_logits, size, order=order, backend="triton", **sizes)
    assert labels.dtype == label_dtype(exact.shape[1])
    assert_labels(labels, same_dtype, exact, mask_logits.shape[1])


@pytest.mark.parametrize("case", SEMANTIC_INFERENCE.triton.values(), ids=SEMANTIC_INFERENCE.triton)
def test_labels(case, generator):
    check_labels(**case(generator))


@pytest.mark.parametrize("name", ["both steps, masks first", "both steps, scores first", "100 queries, 150 classes"])
@pytest.mark.parametrize("dtype", HALVES)
def test_labels_by_half_precision_logits(dtype, name, generator):
    check_labels(**SEMANTIC_INFERENCE.cast(SEMANTIC_INFERENCE.triton[name](generator), dtype))


@pytest.mark.parametrize(
    ("classes", "dtype"), [*((classes, torch.float32) for classes in (1, 3, 40, 200)), (40, torch.bfloat16)]
)
def test_details(classes, dtype, generator):
    class_logits, mask_logits = inputs(USUAL, generator, classes=classes, dtype=dtype)
    exact = reference_scores(class_logits, mask_logits, USUAL, torch.float64, "masks")
    same_dtype = reference_scores(class_logits, mask_logits, USUAL, dtype, "masks")
    details = semantic_inference(class_logits, mask_logits, USUAL.size, details=True, backend="triton")
    assert_labels(details.labels, same_dtype, exact, 18)
    best = exact.topk(min(2, classes), dim=1).values
    bound = error_bound(same_dtype, exact, 18)
    assert (details.score - best[:, 0]).abs().max() <= bound
    margin = best[:, 0] - best[:, 1] if classes > 1 else best[:, 0]
    assert (details.margin - margin).abs().max() <= 2 * bound
    assert not details.nan_logits.any()


def test_ties_take_the_lowest_class(generator):
    class_logits, mask_logits = inputs(USUAL, generator, classes=20)
    class_logits[..., 1:7] = 9.0
    class_logits[..., 17] = 9.0
    details = semantic_inference(class_logits, mask_logits, USUAL.size, details=True, backend="triton")
    assert (details.labels == 1).all()
    assert not details.margin.any()


def test_unlikely_queries_are_skipped_and_labels_stay_the_same(generator, monkeypatch):
    """20 of 100 queries have a class. Where tiles do without the rest, that may hold anything."""
    sizes = SMALL_GEOMETRIES["both steps"]
    class_logits = random_classes(1, 100, 5, generator)
    query = torch.arange(100)
    class_logits[:, query, torch.where(query % 5 == 0, query // 5 % 4 + 1, 5)] += 9
    probabilities = class_logits.softmax(-1)[..., :-1].contiguous()
    mask_logits = random_masks(1, 100, sizes.grid, generator) * 3
    arguments = (probabilities, mask_logits, "masks", "labels", False, *sizes.arguments())
    semantic = kernels()
    dense = semantic.semantic_inference(*arguments, skip=False)[0]
    assert torch.equal(semantic.semantic_inference(*arguments)[0], dense)

    def poisoned(*options):
        query_order, tables = class_tables(*options)
        stop, high = tables["stop_ptr"], tables["high_ptr"]
        assert (stop < 7).all() and (stop > 0).all()
        high[:, :, 16 * stop.max() :, 0] = 1000.0
        return query_order, tables

    class_tables = semantic.class_tables
    monkeypatch.setattr(semantic, "class_tables", poisoned)
    changed = semantic.semantic_inference(*arguments)[0] != dense
    assert 0 < changed.double().mean() < 0.9


@pytest.mark.parametrize("order", ["masks", "scores"])
def test_nan_and_infinite_logits(order, generator):
    sizes = SMALL_GEOMETRIES["both steps"]
    class_logits, mask_logits = inputs(sizes, generator, 2)
    mask_logits[0, 0, 2, 3] = float("nan")
    mask_logits[0, 1] = float("nan")
    mask_logits[0, 2, 1, :3] = float("inf")
    mask_logits[1, 3, :, 4] = -float("inf")
    arguments = {"class_logits": class_logits, "mask_logits": mask_logits, "size": sizes.size, "order": order}
    SEMANTIC_INFERENCE.check(arguments | steps(sizes), torch.float32, "triton")
    check_labels(**arguments, **steps(sizes))
    options = {"order": order, "details": True, "backend": "triton", **steps(sizes)}
    nan_logits = semantic_inference(class_logits, mask_logits, sizes.size, **options).nan_logits
    assert nan_logits[0, :2].tolist() == [1, 42] and nan_logits.sum() == 43


@pytest.mark.parametrize(("dtype", "precision"), [(torch.float32, 2**-16), (torch.bfloat16, 2**-9)])
def test_small_scores_are_as_precise_as_large_ones(dtype, precision, generator):
    """No query is likely there, nor of any class: what counts is small, not nothing, in spite of fp16 factors."""
    class_logits, mask_logits = inputs(USUAL, generator)
    class_logits[..., -1] += 12
    class_logits, mask_logits = class_logits.to(dtype), (mask_logits / 8 - 30).to(dtype)
    exact = reference_scores(class_logits, mask_logits, USUAL, torch.float64, "masks")
    assert exact.max() < 1e-9
    scores = semantic_inference(class_logits, mask_logits, USUAL.size, output="scores", backend="triton")
    best = exact.amax(1, keepdim=True)
    assert ((scores - exact).abs() <= precision * best).all()


@pytest.mark.parametrize("order", ["masks", "scores"])
@pytest.mark.parametrize("name", ["stride 4", "both steps", "downsampling"])
def test_bands_of_staged_logits(name, order, generator, monkeypatch):
    sizes = SMALL_GEOMETRIES[name]
    class_logits, mask_logits = inputs(sizes, generator)
    options = {"order": order, "output": "scores", "backend": "triton", **steps(sizes)}
    expected = semantic_inference(class_logits, mask_logits, sizes.size, **options)
    monkeypatch.setattr(sys.modules["fastmask.kernels._stage"], "STAGE_BYTES", 1)
    assert torch.equal(semantic_inference(class_logits, mask_logits, sizes.size, **options), expected)


@pytest.mark.parametrize("name", ["stride 4", "cropped", "downsampling", "crop alone"])
@pytest.mark.parametrize("order", ["masks", "scores"])
def test_nan_logits_are_counted_once(order, name, generator, monkeypatch):
    """Whether one, two or no band of rows reads them."""
    sizes = SMALL_GEOMETRIES[name]
    class_logits, mask_logits = inputs(sizes, generator, 2)
    mask_logits[torch.rand(mask_logits.shape, generator=generator) < 0.05] = float("nan")
    expected = mask_logits.isnan().sum((-2, -1))
    options = {"order": order, "details": True, "backend": "triton", **steps(sizes)}
    for stage_bytes in (1 << 20, 1):
        monkeypatch.setattr(sys.modules["fastmask.kernels._stage"], "STAGE_BYTES", stage_bytes)
        assert torch.equal(semantic_inference(class_logits, mask_logits, sizes.size, **options).nan_logits, expected)


@pytest.mark.parametrize(
    "sizes",
    [
        Geometry((3, 5), None, None, (12, 20)),  # fours of rows begin two rows before the image
        Geometry((2, 3), None, None, (16, 11)),  # ... with it, and the columns have no ratio
        Geometry((4, 3), (16, 12), (15, 9), (15, 9)),  # the last four are cut off
        Geometry((3, 3), None, None, (36, 36)),  # three fours read the same rows
        Geometry((4, 6), (8, 24), None, (8, 24)),  # only columns have the ratio
    ],
    ids=str,
)
@pytest.mark.parametrize("order", ["masks", "scores"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_read_the_same_logits(dtype, order, sizes, generator, monkeypatch):
    class_logits, mask_logits = inputs(sizes, generator, 2, dtype=dtype)
    arguments = {"class_logits": class_logits, "mask_logits": mask_logits, "size": sizes.size, "order": order}
    SEMANTIC_INFERENCE.check(arguments | steps(sizes), dtype, "triton")
    check_labels(**arguments, **steps(sizes))
    options = {"order": order, "output": "scores", "backend": "triton", **steps(sizes)}
    whole = semantic_inference(class_logits, mask_logits, sizes.size, **options)
    monkeypatch.setattr(sys.modules["fastmask.kernels._stage"], "STAGE_BYTES", 1)
    assert torch.equal(semantic_inference(class_logits, mask_logits, sizes.size, **options), whole)


@pytest.mark.parametrize("classes", [17, 48, 150, 400])
def test_the_lowest_of_classes_that_tie(classes, generator):
    """Any two classes, and the last one: the first of them wins wherever one of them does."""
    sizes = SMALL_GEOMETRIES["one dimension"]
    _, mask_logits = inputs(sizes, generator, queries=2)
    for pair in torch.randint(classes, (6, 2), generator=generator).tolist():
        class_logits = torch.zeros(1, 2, classes + 1)
        class_logits[..., [*pair, classes - 1]] = 5.0
        details = semantic_inference(class_logits, mask_logits, sizes.size, details=True, backend="triton")
        assert (details.labels == min(pair)).all()
        assert not details.margin.any()


@pytest.mark.parametrize("name", ["stride 4", "both steps"])
def test_some_rows_of_the_result(name, generator):
    """What a caller with a band of mask logits asks for."""
    sizes = SMALL_GEOMETRIES[name]
    class_logits, mask_logits = inputs(sizes, generator)
    probabilities = class_logits.softmax(-1)[..., :-1].contiguous()
    run = kernels().semantic_inference
    *geometry, _, _, _ = sizes.arguments()
    full = run(probabilities, mask_logits, "masks", "scores", False, *sizes.arguments())[0]
    some = run(probabilities, mask_logits[:, :, 1:5], "masks", "scores", False, *geometry, 1, 7, 6)[0]
    assert torch.equal(some, full[:, :, 7:13])


def test_no_queries():
    class_logits, mask_logits = torch.zeros(2, 0, 4), torch.zeros(2, 0, 5, 7)
    options = {"backend": "triton"}
    assert not semantic_inference(class_logits, mask_logits, USUAL.size, **options).any()
    assert not semantic_inference(class_logits, mask_logits, USUAL.size, output="scores", **options).any()


def test_two_runs_give_the_same_bits_whatever_was_in_memory(generator):
    arguments = (*inputs(USUAL, generator), USUAL.size)
    first = semantic_inference(*arguments, details=True, backend="triton")
    with poisoned_memory():
        second = semantic_inference(*arguments, details=True, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("order", ["masks", "scores"])
def test_the_kernels_of_both_backends_agree(order, generator):
    sizes = SMALL_GEOMETRIES["both steps"]
    arguments = (*inputs(sizes, generator, queries=40, classes=30), sizes.size)
    options = {"order": order, **steps(sizes)}
    exact = reference_scores(*arguments[:2], sizes, torch.float64, order)
    native = semantic_inference(*arguments, output="scores", backend="native", **options)
    triton = semantic_inference(*arguments, output="scores", backend="triton", **options)
    bound = error_bound(reference_scores(*arguments[:2], sizes, torch.float32, order), exact, 40)
    assert (native - triton).abs().max() <= 2 * bound
    labels = [semantic_inference(*arguments, backend=backend, **options) for backend in ("native", "triton")]
    best = exact.topk(2, dim=1).values
    sure = best[:, 0] - best[:, 1] > 2 * bound
    assert torch.equal(labels[0][sure], labels[1][sure])
