"""What runs GPU kernels without a GPU: Triton's interpreter, and with --compiled an emulator of PTX."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl

from fastmask.ops._registry import triton_interpreted
from fastmask.testing import SPECIAL_FUNCTION_ERROR, TENSOR_CORE_ERROR, GpuError, assert_within_budget, gpu_budget
from tests.conftest import EMULATION, emulation
from tests.helpers import compiled


def test_kernels_are_interpreted_where_nothing_compiles_them(request):
    assert triton_interpreted() == (not torch.cuda.is_available() and EMULATION not in request.config.stash)


def folder_of_ptxvm(_: str) -> str | None:
    return next((path for path in sys.path if (Path(path) / "ptxvm").is_dir()), None)


def test_without_the_emulator_compiled_runs_end_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(compiled, "SHARED", tmp_path)
    with pytest.raises(pytest.UsageError, match=r"--compiled needs ptxvm: it cannot be imported, and \.\./shared"):
        emulation(SimpleNamespace())


def test_an_emulator_beside_the_project_is_found(monkeypatch, tmp_path):
    (tmp_path / "ptxvm").mkdir()
    (tmp_path / "ptxvm" / "triton_launch.py").touch()
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(importlib.util, "find_spec", folder_of_ptxvm)
    monkeypatch.setattr(compiled, "SHARED", tmp_path)
    assert compiled.find_emulator() and sys.path == [str(tmp_path)]


@pytest.mark.parametrize("kind", ["races", "uninitialised", "proxy"])
def test_a_launch_that_is_not_sound_fails(kind):
    report = SimpleNamespace(kernel="some_kernel", races={}, uninitialised={}, proxy={})
    compiled.sound(report)
    getattr(report, kind)["line 3"] = 7
    with pytest.raises(AssertionError, match=r"some_kernel is not sound:\n.*\(7 times\): line 3"):
        compiled.sound(report)


@triton.jit
def _store_kernel(out_ptr, step, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + tl.program_id(0) * step + i, i + tl.program_id(0))


@pytest.mark.compiled
def test_what_the_emulator_finds_fails_the_test(triton_kernels):
    """Programs that write apart, to the same place, and beyond the end."""
    out = torch.zeros(256, dtype=torch.int32)
    _store_kernel[(2,)](out, 128, N=128)
    assert torch.equal(out[128:], torch.arange(128, dtype=torch.int32) + 1)
    with pytest.raises(AssertionError, match="_store_kernel is not sound:\nrace"):
        _store_kernel[(2,)](out, 0, N=128)
    with pytest.raises(Exception, match="out_ptr of 1024 bytes"):
        _store_kernel[(2,)](out, 200, N=128)


@triton.jit
def _count_kernel(out_ptr, n_ptr):
    count = 0
    for _ in range(tl.load(n_ptr)):
        count += 1
    tl.store(out_ptr, count)


def test_memory_holds_the_bound_of_a_loop(triton_kernels):
    out = torch.zeros(1, dtype=torch.int32)
    _count_kernel[(1,)](out, torch.tensor([3], dtype=torch.int32))
    assert out.item() == 3


@pytest.mark.compiled
def test_new_tensors_hold_nan(triton_kernels):
    assert torch.empty(3).isnan().all()


def test_the_budget_of_gpu_runs():
    """Only there, and in proportion to the terms."""
    exact = torch.tensor([-2.0, 1.0, torch.nan], dtype=torch.float64)
    gpu = GpuError(functions=3, products=100, magnitude=6.0)
    allowed = 8 * (3 * SPECIAL_FUNCTION_ERROR + 100 * TENSOR_CORE_ERROR)
    rounding = 2 * 2 * torch.finfo(torch.float32).eps

    def check(error: float, gpu: GpuError | None) -> None:
        assert_within_budget((exact + error).float(), exact.float(), exact, gpu=gpu)

    check(rounding / 2, None)
    with pytest.raises(AssertionError, match=r"off by .* \(rounding\)$"):
        check(allowed / 2, gpu)
    with gpu_budget():
        check(allowed, gpu)
        with pytest.raises(AssertionError, match=r"\(GPU\)"):
            check(1.1 * allowed + rounding, gpu)
        with pytest.raises(AssertionError, match="off by"):
            check(allowed / 2, None)
