"""Runs GPU code without a GPU: Triton and nvcc compile it to PTX, and ``ptxvm`` executes that on CPU tensors.

``ptxvm`` is no part of this project. It is used where it can be imported, or lies in ``../shared``; only
``pytest --compiled`` needs it. It raises where an access is out of bounds or misaligned, and reports races, missing
fences and reads of unwritten shared memory, for which ``sound`` fails the test that made the launch. Triton's
interpreter sees none of these, nor inline assembly, layouts and barriers.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from fastmask.ops import _registry
from fastmask.testing import SPECIAL_FUNCTION_ERROR, gpu_budget

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"
# Shared memory that a block of the matcher may have, in bytes.
SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 120: 99 * 1024}
MOST_SHARED_MEMORY = 227 * 1024


def find_emulator() -> bool:
    """Makes ``ptxvm`` importable; whether that was possible."""
    if importlib.util.find_spec("ptxvm") is None and (SHARED / "ptxvm" / "triton_launch.py").exists():
        sys.path.append(str(SHARED))
    return importlib.util.find_spec("ptxvm") is not None


@dataclass(frozen=True)
class Emulation:
    """What ``pytest --compiled`` asks for.

    Args:
        capability: the GPU's compute capability, times ten.
        seed: of the order in which warps run from one barrier to the next.
        hardware_rounding: special functions are off by as much as a GPU's may be, and tensor cores cut off their sums;
            results are then held to the budget of GPU runs.
    """

    capability: int
    seed: int
    hardware_rounding: bool = False

    def __str__(self) -> str:
        rounding = ", rounding as a GPU may" if self.hardware_rounding else ""
        return f"PTX for sm_{self.capability} in ptxvm, warps in the order of --warp-seed {self.seed}{rounding}"

    def options(self) -> Any:
        from ptxvm.machine import Options

        return Options(order="random", seed=self.seed, counters=False)

    @contextmanager
    def rounding(self) -> Iterator[None]:
        from ptxvm.ops import Approximations

        if self.hardware_rounding:
            Approximations.error, Approximations.truncate_sums = SPECIAL_FUNCTION_ERROR, True
        try:
            with gpu_budget() if self.hardware_rounding else nullcontext():
                yield
        finally:
            Approximations.error, Approximations.truncate_sums = 0.0, False

    @contextmanager
    def triton_kernels(self) -> Iterator[None]:
        """``backend="triton"`` runs on CPU tensors here, with the configurations of that GPU; new tensors hold NaN."""
        from ptxvm.triton_launch import emulated

        common = importlib.import_module("fastmask.kernels._common")
        generation, interpreted = common.generation, _registry.triton_interpreted
        deterministic = torch.are_deterministic_algorithms_enabled()
        with self.rounding(), waiting_warps(), emulated(self.capability, self.options()) as reports:
            launch = JITFunction.run

            def checked(kernel: JITFunction, *args: Any, **kwargs: Any) -> None:
                launch(kernel, *args, **kwargs)
                sound(reports.pop())

            JITFunction.run = checked  # until ``emulated`` ends
            common.generation = lambda device: self.capability // 10
            _registry.triton_interpreted = lambda: True
            torch.use_deterministic_algorithms(True)
            try:
                yield
            finally:
                torch.use_deterministic_algorithms(deterministic)
                common.generation, _registry.triton_interpreted = generation, interpreted

    def matcher(self) -> Callable[..., tuple[Tensor, ...]]:
        """(cost, counts, threads, in_shared) -> what ``fastmask::assign_duals`` returns, by ``csrc/cuda/assign.cu``."""
        limit = SHARED_MEMORY.get(self.capability, MOST_SHARED_MEMORY)
        matcher = compiled_matcher(self.capability, limit)

        def solve(
            cost: Tensor, counts: Tensor | None = None, threads: int = 64, in_shared: bool = True, seed: int = 0
        ) -> tuple[Tensor, ...]:
            matcher.shared_limit = limit
            if not in_shared and matcher.plan(*cost.shape[1:])[2]:
                matcher.shared_limit = matcher.plan(*cost.shape[1:])[0] - 1  # a byte less than they take
            outputs, report = matcher(cost, counts, self.options(), threads=threads)
            sound(report)
            return tuple(outputs)

        return solve


@contextmanager
def waiting_warps() -> Iterator[None]:
    """A warp whose mbarrier is not complete lets others run.

    ptxvm would have it ask again without end: in random order one warp runs until it comes to a barrier of the block,
    and the warp that is to complete the mbarrier never has its turn.
    """
    from ptxvm.machine import Machine

    done, arrive, release = Machine.mbarrier_done, Machine.mbarrier_arrive, Machine._release
    asleep = 1 << 20  # in ``waiting``, beside the numbers of the block's barriers

    def mbarrier_done(machine: Any, address: Any, parity: Any, mask: Any, number: int) -> Any:
        complete = done(machine, address, parity, mask, number)
        machine.waiting[(True if mask is None else mask) & ~complete] = asleep
        return complete

    def mbarrier_arrive(machine: Any, address: Any, mask: Any, number: int) -> None:
        arrive(machine, address, mask, number)
        machine.waiting[machine.waiting == asleep] = -1

    def barriers(machine: Any) -> None:
        sleepers = machine.waiting == asleep
        machine.waiting[sleepers] = -1
        release(machine)
        machine.waiting[sleepers] = asleep

    Machine.mbarrier_done, Machine.mbarrier_arrive, Machine._release = mbarrier_done, mbarrier_arrive, barriers
    try:
        yield
    finally:
        Machine.mbarrier_done, Machine.mbarrier_arrive, Machine._release = done, arrive, release


@functools.cache
def compiled_matcher(capability: int, limit: int) -> Any:
    from ptxvm.cuda_assign import Matcher

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CPATH", str(Path(__file__).parent))  # of cuda_emulation.h, for ptxvm's compilers
        return Matcher(ROOT, capability, limit)


def sound(report: Any) -> None:
    """Fails if a launch had a race, read what nothing wrote, or lacked a fence."""
    found = [
        f"{kind} ({count} times): {text}"
        for kind, notes in (("race", report.races), ("uninitialized", report.uninitialised), ("fence", report.proxy))
        for text, count in notes.items()
    ]
    assert not found, "\n".join([f"{report.kernel} is not sound:", *found])
