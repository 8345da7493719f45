"""Describes the machine: its name, the versions of its software, and its highest rates."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = ("torch", "triton", "transformers", "scipy", "numpy", "lapx")


@dataclass(frozen=True)
class Work:
    """The least that an operation must do on given inputs.

    Args:
        bytes: read and written once each.
        specials: on a GPU, evaluations of exp, log and reciprocals, which have a unit of their own.
        flops: of matrix products that cannot be avoided.
        operations: on a CPU, vector operations of the formula, counted for one element; each takes as long as a fused
            multiply-add. An exp counts as 10, a log as 12, a reciprocal as 4.
    """

    bytes: int
    specials: int = 0
    flops: int = 0
    operations: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class Rates:
    """What the machine does at best, each a second; None for what counts nothing there.

    ``source`` says where the numbers come from.
    """

    bytes: float
    flops: float
    source: str
    specials: float | None = None
    operations: float | None = None

    def floor(self, work: Work) -> tuple[float, str]:
        """(seconds, name of the resource that takes them): no implementation of ``work`` is faster on this machine."""
        times = self.floors(work)
        bound = max(times, key=times.__getitem__)
        return times[bound], bound

    def floors(self, work: Work) -> dict[str, float]:
        """Seconds that each resource takes at least."""
        rates = {
            "memory": (work.bytes, self.bytes),
            "special functions": (work.specials, self.specials),
            "matrix products": (work.flops, self.flops),
            "vector operations": (work.operations, self.operations),
        }
        return {name: amount / rate for name, (amount, rate) in rates.items() if rate is not None}

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class GpuModel:
    """Datasheet numbers: memory bandwidth, clock, dense bfloat16 rate."""

    bytes: float
    clock: float
    bf16_flops: float


# By a part of the name that torch gives; the first that fits counts.
GPU_MODELS = {
    "B200": GpuModel(8.0e12, 1.965e9, 2250e12),
    "H200": GpuModel(4.8e12, 1.98e9, 989e12),
    "H100 PCIe": GpuModel(2.0e12, 1.755e9, 756e12),
    "H100": GpuModel(3.35e12, 1.98e9, 989e12),
    "A100-SXM4-40GB": GpuModel(1.555e12, 1.41e9, 312e12),
    "A100-PCIE-40GB": GpuModel(1.555e12, 1.41e9, 312e12),
    "A100": GpuModel(2.04e12, 1.41e9, 312e12),
    "L40S": GpuModel(0.864e12, 2.52e9, 362e12),
    "RTX 4090": GpuModel(1.008e12, 2.52e9, 165e12),
    "RTX 3090": GpuModel(0.936e12, 1.695e9, 71e12),
}
SPECIALS_PER_CLOCK = 16  # of one streaming multiprocessor, compute capability 7.0 to 10.0


def best_rates(device: torch.device) -> Rates:
    """The rates of this machine, measured where no table has them. Takes about a second on a CPU."""
    return _gpu_rates(device) if device.type == "cuda" else _cpu_rates()


def _cpu_rates() -> Rates:
    source, target = torch.ones(64 << 20), torch.empty(64 << 20)
    size = source.numel() * source.element_size()
    copied = 2 * size / _best_seconds(lambda: target.copy_(source), 5)
    read = size / _best_seconds(source.sum, 5)
    threads = torch.get_num_threads()
    # One thread on data in its own cache: with more, the start of the threads would be in the measurement.
    torch.set_num_threads(1)
    try:
        a = torch.ones(512, 512)
        flops = 2 * 512**3 / _best_seconds(lambda: a @ a, 20)
    finally:
        torch.set_num_threads(threads)
    return Rates(
        bytes=max(copied, read),
        flops=flops * threads,
        operations=flops / 2 * threads,  # at the rate of a matrix product's multiply-adds
        source=f"measured: copy or sum of 256 MiB, {threads} threads; matmul of one thread x {threads}",
    )


def _gpu_rates(device: torch.device) -> Rates:
    properties = torch.cuda.get_device_properties(device)
    for name, model in GPU_MODELS.items():
        if name in properties.name:
            specials = properties.multi_processor_count * SPECIALS_PER_CLOCK * model.clock
            return Rates(model.bytes, model.bf16_flops, f"datasheet of {name}", specials)
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a = torch.ones(4096, 4096, dtype=torch.bfloat16, device=device)
    synchronize = torch.cuda.synchronize
    copied = 2 * source.numel() / _best_seconds(lambda: (target.copy_(source), synchronize()), 10)
    flops = 2 * 4096**3 / _best_seconds(lambda: (a @ a, synchronize()), 10)
    clock = 1e3 * getattr(properties, "clock_rate", 1.5e6)
    specials = properties.multi_processor_count * SPECIALS_PER_CLOCK * clock
    return Rates(copied, flops, "measured copy and bfloat16 matmul; special functions from the clock", specials)


def _best_seconds(call: Callable[[], Any], repeats: int) -> float:
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def use_device(name: str, threads: int | None) -> torch.device:
    """The device of the options ``--device`` and ``--threads``, checked and set. ValueError: it is not there."""
    if name not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but torch finds no CUDA device")
    if threads is not None:
        torch.set_num_threads(threads)
    return torch.device(name)


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Names, sizes and versions, for the result file."""
    machine: dict[str, Any] = {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "simd": _simd_level(),
        "torch_simd": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        machine["cuda"] = torch.version.cuda
    machine["packages"] = {name: _version(name) for name in PACKAGES}
    return machine


def cpu_model() -> str:
    """The processor's name without trade marks, such as "AMD EPYC 9654 96-Core Processor"."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists() and (match := re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)):
        name = match[1]
    return " ".join(re.sub(r"\((R|TM)\)|\bCPU\b|@.*", " ", name, flags=re.IGNORECASE).split())


def default_name(machine: dict[str, Any]) -> str:
    """The result file's name without suffix: the GPU's, or "cpu-" and the processor's, with a SIMD level that is not
    its own."""
    name = machine["gpu"] or f"cpu-{machine['cpu']} {machine.get('simd_cap') or ''}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def commit() -> tuple[str | None, bool]:
    """(short hash of the source tree's commit, whether files of the tree differ from it); (None, False) without git.

    Result files do not count: a run changes them itself.
    """
    try:
        head = _git("rev-parse", "--short=10", "HEAD").strip()
        changes = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return None, False
    return head, bool(changes.strip())


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def _simd_level() -> str | None:
    try:
        from fastmask import _native
    except ImportError:
        return None
    return _native.simd_level()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
