"""Deformable attention: what the battery of operators does not ask of every operator."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fastmask import deformable_attention, reference
from fastmask.measure import peak_memory
from fastmask.testing import simd_level, simd_levels
from tests.helpers.backends import kernels
from tests.helpers.deformable_operator import DEFORMABLE_ATTENTION, SHAPES, SMALL, Inputs
from tests.helpers.exporting import session
from tests.helpers.op_info import HALVES, assert_same_bits, threads

BACKENDS = pytest.mark.parametrize("backend", ["native", "triton"], indirect=True)
SHAPE = {"native": SHAPES["odd sizes"], "triton": SMALL}


def drawn(backend, generator):
    return Inputs(SHAPE[backend])(generator)


@pytest.mark.parametrize("level", simd_levels())
@pytest.mark.parametrize("dim", [1, 3, 15, 16, 17, 31, 33, 64, 100, 130])
def test_any_number_of_channels(dim, level, generator):
    images = -(-128 // dim)  # as many elements at each width: of a few, chance decides whose error is the largest
    arguments = Inputs((images, 7, 2, dim, [(5, 6), (2, 3)], 3))(generator)
    with simd_level(level):
        DEFORMABLE_ATTENTION.check(arguments, torch.float32, "native")


@pytest.mark.parametrize("shape", [SHAPES["one head"], SHAPES["wide heads"], SHAPES["usual"]])
@pytest.mark.parametrize("count", [2, 5, 32])
def test_no_bit_depends_on_the_number_of_threads(shape, count, generator):
    """More threads than planes split the channels of a plane."""
    arguments = Inputs(shape)(generator)
    with threads(1):
        expected = DEFORMABLE_ATTENTION.run(arguments, "native")
    with threads(count):
        assert_same_bits(DEFORMABLE_ATTENTION.run(arguments, "native"), expected)


@BACKENDS
@pytest.mark.parametrize("dtype", HALVES)
def test_locations_and_weights_in_float32(dtype, backend, generator):
    """As under autocast; nothing of them is rounded to the dtype of the values."""
    arguments = drawn(backend, generator)
    arguments["value"] = arguments["value"].to(dtype)
    results = DEFORMABLE_ATTENTION.run(arguments, backend)
    assert [result.dtype for result in results.values()] == [dtype, dtype, torch.float32, torch.float32]
    same = DEFORMABLE_ATTENTION.run(arguments | {"value": arguments["value"].float()}, backend)
    # Not equal: Triton's interpreter cuts off what bfloat16 rounds.
    torch.testing.assert_close(results["out"].float(), same["out"], rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_under_autocast(generator):
    arguments = Inputs(SHAPES["usual"])(generator)
    project = nn.Linear(32, 32)
    value = arguments["value"]
    with torch.autocast("cpu", torch.bfloat16):
        out = deformable_attention(**(arguments | {"value": project(value)}))
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert project.weight.grad.isfinite().all()


@BACKENDS
def test_levels_as_integers_of_any_kind(backend, generator):
    arguments = drawn(backend, generator)
    expected = deformable_attention(**arguments, backend=backend)
    levels = arguments.pop("spatial_shapes")
    for given in (torch.tensor(levels), torch.tensor(levels, dtype=torch.int32), np.array(levels), tuple(levels)):
        assert torch.equal(deformable_attention(spatial_shapes=given, **arguments, backend=backend), expected)


@BACKENDS
def test_pixels_that_hold_nan_reach_only_points_that_read_them(backend, generator):
    arguments = drawn(backend, generator)
    expected = DEFORMABLE_ATTENTION.run(arguments, backend)
    value, levels = arguments["value"], arguments["spatial_shapes"]
    marked = torch.zeros(value.shape, dtype=torch.float64)
    marked[0, 0], marked[-1, -1] = 1, 1
    # The samples of |weight| > 0 that have a share of a marked pixel.
    weights = torch.ones_like(arguments["attention_weights"], dtype=torch.float64)
    locations = arguments["sampling_locations"].double()
    reads = reference.deformable_attention(marked, levels, locations, weights) > 0
    assert reads.any()
    assert not reads.all()
    value[marked > 0] = torch.nan
    results = DEFORMABLE_ATTENTION.run(arguments, backend)
    assert torch.equal(results["out"].isnan(), reads)
    assert torch.equal(results["out"][~reads], expected["out"][~reads])
    assert torch.equal(results["gradient of value"], expected["gradient of value"])


@BACKENDS
def test_points_outside_have_no_gradient(backend, generator):
    arguments = drawn(backend, generator)
    locations = arguments["sampling_locations"]
    locations[0, 0, 0, 0, 0], locations[0, 1, 0, 0, 0] = torch.nan, 1e30
    results = DEFORMABLE_ATTENTION.run(arguments, backend)
    assert all(result.isfinite().all() for result in results.values())
    assert not results["gradient of sampling_locations"][0, :2, 0, 0, 0].any()
    assert not results["gradient of attention_weights"][0, :2, 0, 0, 0].any()


@BACKENDS
def test_offsets_beyond_32_bits(backend, generator):
    """Of the third pixel; memory that is not touched costs nothing."""
    memory = torch.from_numpy(np.empty(2**31 + 8, np.int16)).view(torch.bfloat16)
    value = memory.as_strided((1, 3, 1, 8), (0, 2**30, 0, 1))
    value.copy_(torch.randn(value.shape, generator=generator))
    arguments = Inputs((1, 4, 1, 8, [(1, 3)], 2))(generator) | {"value": value}
    near = DEFORMABLE_ATTENTION.run(arguments | {"value": value.contiguous()}, backend)
    assert_same_bits(DEFORMABLE_ATTENTION.run(arguments, backend), near)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_more_images_and_heads_than_a_grid_has_take_several_launches(backend, generator, monkeypatch):
    arguments = Inputs((3, 4, 3, 8, [(2, 3)], 2))(generator)
    expected = deformable_attention(**arguments, backend=backend)
    monkeypatch.setattr("fastmask.kernels.deformable_attention.MAX_GRID", 2)
    assert_same_bits({"out": deformable_attention(**arguments, backend=backend)}, {"out": expected})


def test_memory_does_not_grow_with_points(generator):
    """What autograd saves are the arguments; backward stores rows of the values, not of the points."""
    arguments = Inputs((1, 1000, 2, 32, [(16, 16), (8, 8)], 16))(generator)
    levels = arguments.pop("spatial_shapes")
    leaves = [x.requires_grad_() for x in arguments.values()]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out, memory = peak_memory(lambda: deformable_attention(leaves[0], levels, *leaves[1:]), leaves[0].device)
    assert {x.data_ptr() for x in saved} == {x.data_ptr() for x in leaves}
    value = leaves[0].nbytes
    assert memory["allocator"] < out.nbytes + 1.5 * value
    grad_out = torch.ones_like(out)
    _, memory = peak_memory(lambda: torch.autograd.grad(out, leaves, grad_out), out.device)
    assert memory["allocator"] < sum(x.nbytes for x in leaves) + 2.5 * value


def test_float64_takes_the_reference_and_no_kernel(generator):
    arguments = drawn("native", generator)
    doubles = DEFORMABLE_ATTENTION.cast(arguments, torch.float64)
    assert torch.equal(deformable_attention(**doubles), reference.deformable_attention(**doubles))
    one = arguments | {"sampling_locations": doubles["sampling_locations"]}
    assert deformable_attention(**one).dtype == torch.float32
    with pytest.raises(RuntimeError, match="the kernels of deformable_attention do not support float64"):
        deformable_attention(**one, backend="native")


@pytest.mark.parametrize(
    ("shape", "message"), [("nine levels", "up to 8 levels"), ("wide heads", "256 channels of a head, got 1 and 300")]
)
def test_what_the_triton_kernels_do_not_take_is_named(shape, message, generator):
    *rest, dim, levels, points = SHAPES[shape]
    arguments = Inputs((*rest, 300 if shape == "wide heads" else dim, levels, points))(generator)
    with kernels("triton"), pytest.raises(RuntimeError, match=message):
        deformable_attention(**arguments, backend="triton")


class Attention(nn.Module):
    def forward(self, value, locations, weights):
        return deformable_attention(value, [(5, 7), (13, 9)], locations, weights, backend="reference")


@pytest.mark.slow
def test_it_exports_as_gathers(generator, tmp_path):
    """For any number of images and queries, to operators that every runtime has."""
    pytest.importorskip("onnxscript")
    dims = {"value": {0: "images"}, "locations": {0: "images", 1: "queries"}, "weights": {0: "images", 1: "queries"}}
    arguments = drawn("native", generator)
    levels = arguments.pop("spatial_shapes")
    inputs = tuple(arguments.values())
    exported = torch.onnx.export(
        Attention().eval(),
        inputs,
        input_names=list(dims),
        dynamic_shapes=dims,
        dynamo=True,
        opset_version=18,
        verbose=False,
    )
    kinds = {node.op_type for node in exported.model_proto.graph.node}
    assert "GridSample" not in kinds
    assert kinds & {"Gather", "GatherND"}
    exported.save(tmp_path / "attention.onnx")
    opened = session(tmp_path / "attention.onnx")
    for shape in (SHAPES["odd sizes"], (1, 19, *SHAPES["odd sizes"][2:])):
        inputs = Inputs(shape)(generator)
        del inputs["spatial_shapes"]
        (out,) = opened.run(None, {name: x.numpy() for name, x in zip(dims, inputs.values(), strict=True)})
        expected = deformable_attention(inputs["value"], levels, *list(inputs.values())[1:])
        torch.testing.assert_close(torch.from_numpy(out), expected, rtol=1e-5, atol=1e-5)
