"""Every operator on a device: the values of the reference, no host sync, the same bits in 20 runs, CUDA graphs, two
streams, a second GPU. What needs no GPU of it runs on the CPU too."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu.operators import MAKERS, Call, expected_results, make_call
from benchmarks.harness.graphs import capture

CUDA = pytest.param("cuda", marks=pytest.mark.cuda)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of the largest value; results are float32 or rounded to the dtype of the logits once.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}
PLANE = 1000  # elements; integers that are fewer count pixels or bound them, and follow from those of a plane


def results_of(call: Call) -> tuple[torch.Tensor, ...]:
    results = call()
    if any(tensor.is_cuda for tensor in results):
        torch.cuda.synchronize()
    return results


def assert_same_bits(results, expected):
    for result, value in zip(results, expected, strict=True):
        assert torch.equal(result.nan_to_num(7e7), value.nan_to_num(7e7))


def replace_inputs(call: Call, other: Call) -> None:
    with torch.no_grad():
        for own, new in zip(call.inputs, other.inputs, strict=True):
            own.copy_(new)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("name", MAKERS)
def test_results_are_written_and_the_same_each_time(name, device):
    """Twenty runs; memory that a kernel leaves unwritten would hold another run's values, or NaN."""
    call = make_call(name, device)
    first = results_of(call)
    for _ in range(19 if device == "cuda" else 1):
        poison = [torch.full_like(result, float("nan") if result.is_floating_point() else 1) for result in first]
        del poison
        assert_same_bits(results_of(call), first)
    assert all(result.isfinite().all() for result in first if result.is_floating_point())


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MAKERS)
def test_the_values_are_those_of_the_reference(name, dtype, device):
    """To rounding; where two classes, queries or keys lie closer than that, a few pixels may be another's."""
    results = results_of(make_call(name, device, dtype))
    for result, value in zip(results, expected_results(name, dtype), strict=True):
        assert result.shape == value.shape
        assert result.dtype == value.dtype or (result.is_floating_point() and value.dtype == torch.float64)
        result = result.cpu().to(value.dtype)
        if name == "assign":
            assert torch.equal(result, value)
        elif name == "uncertain_points":  # the same ones, in any order
            assert (result[..., 0].sort().values != value[..., 0].sort().values).double().mean() <= 0.01
        elif value.is_floating_point():
            tolerance = TOLERANCES[dtype] * value.abs().max().item()
            torch.testing.assert_close(result, value, rtol=0, atol=tolerance)
        elif value.numel() >= PLANE:
            assert (result != value).double().mean() <= (0.05 if dtype == torch.bfloat16 else 0.01)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MAKERS)
def test_nothing_waits_for_the_gpu(name, dtype):
    call = make_call(name, "cuda", dtype)
    results_of(call)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
@pytest.mark.parametrize("name", MAKERS)
def test_a_graph_replays_on_other_inputs(name):
    call, other = make_call(name, "cuda"), make_call(name, "cuda", seed=1)
    graph, results = capture(call)
    replace_inputs(call, other)
    graph.replay()
    torch.cuda.synchronize()
    assert_same_bits(results, results_of(other))


@pytest.mark.cuda
@pytest.mark.parametrize("name", MAKERS)
def test_two_streams_do_not_disturb_each_other(name):
    calls = [make_call(name, "cuda", seed=seed) for seed in (0, 1)]
    alone = [results_of(call) for call in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    together = []
    for _ in range(5):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                together.append((i, calls[i]()))
    torch.cuda.synchronize()
    for i, results in together:
        assert_same_bits(results, alone[i])


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", MAKERS)
def test_a_second_gpu_while_the_first_is_current(name):
    expected = results_of(make_call(name, "cuda:0"))
    results = make_call(name, "cuda:1")()
    torch.cuda.synchronize("cuda:1")
    assert all(result.device.index == 1 for result in results)
    assert_same_bits([result.cpu() for result in results], [value.cpu() for value in expected])


@pytest.mark.parametrize("name", MAKERS)
def test_inputs_are_the_same_on_every_device_and_differ_by_seed(name):
    call, again, other = make_call(name, "cpu"), make_call(name, "cpu"), make_call(name, "cpu", seed=1)
    assert all(torch.equal(a, b) for a, b in zip(call.inputs, again.inputs, strict=True))
    replace_inputs(call, other)
    assert_same_bits(call(), other())
