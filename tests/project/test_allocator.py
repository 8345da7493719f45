"""The settings of the memory allocator that benchmarks run with."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from benchmarks.harness import allocator
from benchmarks.harness.registry import Provider
from benchmarks.harness.runner import measure_case
from benchmarks.harness.timing import TimeBudget
from tests.project.test_benchmarks import CPU, RATES, double, make_operation


def test_the_process_that_measures_says_which_allocator_it_has(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    assert allocator.allocators("cpu") == ("default", "retaining")
    assert allocator.allocators("cuda") == ("default",)
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    operation = make_operation(Provider("a", double))
    for name in ("default", "retaining"):
        environment = allocator.environment_with(name)
        assert environment.get("MALLOC_TRIM_THRESHOLD_") == {"default": None, "retaining": "100000000000"}[name]
        monkeypatch.setattr(allocator.os, "environ", environment)
        rows = measure_case(operation, operation.cases[0], "float32", CPU, RATES, TimeBudget(rounds=1))
        assert [row["allocator"] for row in rows] == [name]
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert allocator.allocators("cpu") == ("default",)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the variables are glibc's")
def test_with_the_retaining_allocator_large_blocks_come_back_without_page_faults():
    code = (
        "import resource, torch\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "x = torch.empty(20 << 20)\n"  # 80 MiB
        "for _ in range(20): torch.exp(x)\n"  # the heap needs some calls to settle
        "before = faults()\n"
        "torch.exp(x)\n"
        "print(faults() - before)"
    )
    environment = allocator.environment_with("retaining")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 0.05 * (80 << 20) / 4096  # of the block's pages
