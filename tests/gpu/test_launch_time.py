"""The host's side of launches, in a process where kernels are neither interpreted nor compiled: Triton's launcher calls
a libcuda that does nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks.gpu import launch_time
from tests.helpers.launches import forget_compiled_kernels

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="takes the place of a GPU's driver")
OPERATORS = [name for name in launch_time.MAKERS if not name.startswith("criterion")]


def described(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.stride(), value.data_ptr() % 16
    return value


def launches_of(call: Callable[[], Any]) -> list[tuple[Any, ...]]:
    """What Triton's launcher gets in a call."""
    from triton.backends.nvidia.driver import CudaLauncher

    launches = []

    def launch(launcher: CudaLauncher, *arguments: Any) -> None:
        grid, (stream, function, options), values = arguments[:3], arguments[3:6], arguments[9:]
        launches.append((id(launcher), *grid, stream, function, options, *map(described, values)))

    with mock.patch.object(CudaLauncher, "__call__", launch):
        call()
    return launches


def first_and_later_launches(name: str) -> list[tuple[str, list[Any], list[Any]]]:
    from triton.runtime.jit import JITFunction

    found = []
    with launch_time.without_gpu() as device:
        for way, call in launch_time.MAKERS[name](launch_time.Inputs(device, launch_time.SMALL)).items():
            call()
            forget_compiled_kernels()
            first = launches_of(call)
            with mock.patch.object(JITFunction, "run", side_effect=AssertionError("not planned")):
                found.append((way, first, launches_of(call)))
    return found


@pytest.mark.parametrize("name", OPERATORS)
def test_later_calls_launch_what_the_first_call_does_through_triton(name, elsewhere):
    for way, first, later in elsewhere(first_and_later_launches, name):
        assert first and first == later, way


def streams_of_a_later_call() -> list[int]:
    import triton

    with launch_time.without_gpu() as device:
        call = launch_time.make_mask_cost(launch_time.Inputs(device, launch_time.SMALL))[""]
        call()
        with mock.patch.object(triton.runtime.driver.active, "get_current_stream", return_value=7):
            return [stream for _, _, _, _, stream, *_ in launches_of(call)]


def test_later_calls_launch_on_the_current_stream(elsewhere):
    assert elsewhere(streams_of_a_later_call) == [7, 7, 7]


def compiled_again(sizes: launch_time.Sizes) -> list[str]:
    """The kernels for which a call with other sizes goes through Triton."""
    from triton.runtime.jit import JITFunction

    run, through_triton = JITFunction.run, []

    def recorded(kernel: JITFunction, **arguments: Any) -> Any:
        through_triton.append(kernel.__name__)
        return run(kernel, **arguments)

    with launch_time.without_gpu() as device:
        launch_time.make_mask_cost(launch_time.Inputs(device, launch_time.SMALL))[""]()
        with mock.patch.object(JITFunction, "run", recorded):
            launch_time.make_mask_cost(launch_time.Inputs(device, sizes))[""]()
    return through_triton


def test_other_sizes_launch_the_same_kernels(elsewhere):
    """Unless a constant is another one, such as the unit of sizes."""
    small = launch_time.SMALL
    assert elsewhere(compiled_again, replace(small, images=3, queries=31, targets=4, size=(65, 63))) == []
    assert elsewhere(compiled_again, replace(small, grid=(15, 17))) == ["_mask_cost_fwd_kernel"]


def test_sizes_differ_by_the_type_that_triton_gives_them():
    from fastmask.kernels._launch import size_kind

    of_32_bits = [-(1 << 31), -1, 0, 1, (1 << 31) - 1]
    of_64_bits = [-(1 << 63), -(1 << 31) - 1, 1 << 31, (1 << 63) - 1]
    groups = [of_32_bits, of_64_bits, [1 << 63], [0.0, 1.5, float("nan")], [None], [True, False]]
    kinds = [{size_kind(size) for size in group} for group in groups]
    assert all(len(kind) == 1 for kind in kinds) and len(set.union(*kinds)) == len(groups)


def test_a_row_of_the_table():
    command = [sys.executable, "-m", "benchmarks.gpu.launch_time", "uncertain_points", "--seconds", "0.01"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert re.search(r"^\| uncertain_points \| 1 \| 1 \| \d+ \| \d+ \| \d+ \|$", run.stdout, re.MULTILINE), run.stdout
