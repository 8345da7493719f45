"""On a GPU: semantic, panoptic and instance inference against the reference in float64; memory, host syncs, graphs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.harness.graphs import capture
from fastmask import instance_inference, panoptic_inference, reference, semantic_inference
from fastmask.testing import assert_within_budget, error_budget
from tests.helpers import gpu_errors
from tests.helpers.host_syncs import host_syncs
from tests.helpers.inference_inputs import GEOMETRIES, make_class_logits, make_logits

pytestmark = pytest.mark.cuda

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGE = (2048, 4096)


def inputs(generator, geometry, dtype=torch.float32, *, batch=2, queries=20, classes=7):
    """Class and mask logits on the CPU."""
    class_logits = make_class_logits(generator, batch=batch, queries=queries, classes=classes)
    mask_logits = make_logits(generator, geometry.grid, batch=batch, queries=queries)
    return class_logits.to(dtype), mask_logits.to(dtype)


def steps(geometry) -> dict[str, tuple[int, int] | None]:
    return {"padded_size": geometry.padded_size, "valid_size": geometry.valid_size}


def large_inputs(dtype: torch.dtype, queries: int = 100, classes: int = 150) -> tuple[Tensor, Tensor]:
    """On the GPU; the logits of an 8-megapixel image at stride 4."""
    class_logits = torch.randn(1, queries, classes + 1, device="cuda", dtype=dtype)
    return class_logits, torch.randn(1, queries, *(side // 4 for side in LARGE), device="cuda", dtype=dtype) * 4


def extra_memory(run: Callable[[], object]) -> int:
    """Bytes beyond what was allocated before, at the worst."""
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("order", ["masks", "scores"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_semantic(geometry, dtype, order, generator):
    """bfloat16 logits take products of one part, and are held to the reference in bfloat16."""
    logits = inputs(generator, geometry, dtype)
    own = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    options = {"order": order, **steps(geometry)}
    same_dtype, exact = (
        reference.semantic_inference(*(x.to(t) for x in logits), geometry.size, output="scores", **options)
        for t in (own, torch.float64)
    )
    on_gpu = [x.cuda() for x in logits]
    scores = semantic_inference(*on_gpu, geometry.size, output="scores", **options)
    gpu = gpu_errors.semantic(logits[1].shape[1])
    assert_within_budget(scores, same_dtype, exact, name="scores", gpu=gpu)
    labels = semantic_inference(*on_gpu, geometry.size, **options).cpu()
    best = exact.topk(2, dim=1).values
    error, _ = error_budget(torch.float32, same_dtype, exact, gpu, on_gpu=True)
    sure = best[:, 0] - best[:, 1] > 2 * error
    assert torch.equal(labels.long()[sure], exact.argmax(1)[sure])


@pytest.mark.parametrize("classes", [1, 19, 150, 192, 250, 847])
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_of_classes(classes, dtype, generator):
    """Details too: 250 and 847 classes take several passes."""
    geometry = GEOMETRIES["odd sizes"]
    logits = inputs(generator, geometry, dtype, queries=100, classes=classes)
    own = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    same_dtype, exact = (
        reference.semantic_inference(*(x.to(t) for x in logits), geometry.size, output="scores")
        for t in (own, torch.float64)
    )
    on_gpu = [x.cuda() for x in logits]
    scores = semantic_inference(*on_gpu, geometry.size, output="scores")
    assert_within_budget(scores, same_dtype, exact, name="scores", gpu=gpu_errors.semantic(100))
    details = semantic_inference(*on_gpu, geometry.size, details=True)
    assert torch.equal(details.labels.long(), scores.argmax(1))
    best = scores.topk(min(2, classes), dim=1).values
    assert torch.equal(details.score, best[:, 0])
    torch.testing.assert_close(details.margin, best[:, 0] - best[:, 1] if classes > 1 else best[:, 0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_skipped_queries_change_no_label(dtype, generator):
    """80 of 100 queries have no object, at a confidence of 0.99."""
    from fastmask.kernels.semantic import semantic_inference as kernel

    geometry = GEOMETRIES["four times larger"]
    class_logits, mask_logits = inputs(generator, geometry, dtype, queries=100, classes=150)
    class_logits[:, torch.arange(100) % 5 != 0, -1] += 10
    probabilities = class_logits.float().softmax(-1)[..., :-1].contiguous().cuda()
    arguments = probabilities, mask_logits.cuda(), "masks", "labels", False, *geometry.arguments()
    assert torch.equal(kernel(*arguments)[0], kernel(*arguments, skip=False)[0])


@pytest.mark.parametrize("rule", ["maskformer", "mask2former", "huggingface"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_panoptic(geometry, dtype, rule, generator):
    logits = inputs(generator, geometry, dtype)
    options = {"rule": rule, "threshold": 0.4, "stuff_classes": (1, 3, 5), **steps(geometry)}
    expected = reference.panoptic_inference(*(x.double() for x in logits), geometry.size, **options)
    results = panoptic_inference(*(x.cuda() for x in logits), geometry.size, **options)
    for (segmentation, infos), (wanted, wanted_infos) in zip(results, expected, strict=True):
        different = (segmentation.cpu() != wanted).sum().item()
        assert different <= max(2, 0.001 * wanted.numel())
        assert [info["category_id"] for info in infos] == [info["category_id"] for info in wanted_infos]
        for info, wanted_info in zip(infos, wanted_infos, strict=True):
            assert abs(info["area"] - wanted_info["area"]) <= different
            assert info["score"] == pytest.approx(wanted_info["score"], rel=1e-5)


@pytest.mark.parametrize("rule", ["mask2former", "huggingface"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_instance(geometry, dtype, rule, generator):
    logits = inputs(generator, geometry, dtype)
    options = {"rule": rule, "top_k": 15, **steps(geometry)}
    # In float32, as it decides which of two nearly equal pairs comes first.
    expected = reference.instance_inference(*(x.float() for x in logits), geometry.size, **options)
    results = instance_inference(*(x.cuda() for x in logits), geometry.size, boxes=True, **options)
    for result, wanted in zip(results, expected, strict=True):
        assert torch.equal(result["labels"].cpu(), wanted["labels"])
        different = (result["masks"].cpu() != wanted["masks"]).flatten(1).sum(1)
        assert (different <= max(2, 0.001 * wanted["masks"][0].numel())).all()
        same = different == 0
        torch.testing.assert_close(result["scores"].cpu()[same], wanted["scores"][same], rtol=1e-5, atol=1e-6)
        for mask, box in zip(result["masks"], result["boxes"].tolist(), strict=True):
            rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
            assert box == (
                [columns[0].item(), rows[0].item(), columns[-1].item() + 1, rows[-1].item() + 1]
                if len(rows)
                else [0, 0, 0, 0]
            )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ["masks", "scores"])
def test_semantic_memory(dtype, order):
    """Eager code takes 8 GB for the scores alone; the labels themselves are 8 MB."""
    logits = large_inputs(dtype)
    assert extra_memory(lambda: semantic_inference(*logits, LARGE, order=order)) < 200e6


@pytest.mark.parametrize("dtype", DTYPES)
def test_panoptic_memory(dtype):
    """The winners are 34 MB as int32, and so are the segments."""
    logits = large_inputs(dtype)
    assert extra_memory(lambda: panoptic_inference(*logits, LARGE, threshold=0.0)) < 200e6


def runs(logits: tuple[Tensor, Tensor]) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Calls that end before anything is transferred to the host."""
    class_logits, mask_logits = logits
    geometry = GEOMETRIES["two steps up"]
    scores, classes = class_logits.float().softmax(-1).max(-1)
    kept = torch.where((classes < class_logits.shape[-1] - 1) & (scores > 0.4), scores, 0.0)
    queries = torch.arange(mask_logits.shape[1], device=mask_logits.device).repeat(len(mask_logits), 1)
    operators = torch.ops.fastmask
    arguments = geometry.arguments()
    return {
        "labels": lambda: semantic_inference(*logits, geometry.size, details=True, **steps(geometry)),
        "scores": lambda: (
            semantic_inference(*logits, geometry.size, order="scores", output="scores", **steps(geometry)),
        ),
        "panoptic": lambda: operators.panoptic_winners(kept, mask_logits, False, True, 0.5, *arguments),
        "instance": lambda: operators.instance_masks(mask_logits, queries, False, *arguments),
    }


RUNS = ("labels", "scores", "panoptic", "instance")


@pytest.mark.parametrize("name", RUNS)
def test_no_host_sync(name, generator):
    run = runs(tuple(x.cuda() for x in inputs(generator, GEOMETRIES["two steps up"])))[name]
    expected = run()
    with host_syncs():
        results = run()
    for a, b in zip(results, expected, strict=True):
        assert torch.equal(a, b)


def test_panoptic_waits_for_the_device_once(generator):
    """For what ``segments_info`` says."""
    geometry = GEOMETRIES["two steps up"]
    logits = [x.cuda() for x in inputs(generator, geometry)]
    arguments = {"stuff_classes": range(0, 7, 2), "threshold": 0.4, **steps(geometry)}
    panoptic_inference(*logits, geometry.size, **arguments)
    with host_syncs("warn"), pytest.warns(UserWarning, match="synchronizing") as warnings:
        panoptic_inference(*logits, geometry.size, **arguments)
    assert sum("synchronizing" in str(warning.message) for warning in warnings) == 1


@pytest.mark.parametrize("name", RUNS)
def test_twenty_runs_give_the_same_bits(name, generator):
    run = runs(tuple(x.cuda() for x in inputs(generator, GEOMETRIES["two steps up"])))[name]
    first = run()
    for _ in range(19):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@pytest.mark.parametrize("name", RUNS)
def test_a_graph_runs_on_other_logits(name, generator):
    geometry = GEOMETRIES["two steps up"]
    logits = tuple(x.cuda() for x in inputs(generator, geometry))
    run = runs(logits)[name]
    graph, results = capture(run)
    logits[1].copy_(inputs(generator, geometry)[1])
    graph.replay()
    for a, b in zip(results, run(), strict=True):
        assert torch.equal(a, b)


def test_two_streams(generator):
    """Nothing is kept from one call to the next, so calls on different streams do not meet."""
    run = runs(tuple(x.cuda() for x in inputs(generator, GEOMETRIES["two steps up"])))["labels"]
    expected = run()
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    results = []
    for _ in range(5):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(run())
    torch.cuda.synchronize()
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
