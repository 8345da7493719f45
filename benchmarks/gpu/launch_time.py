"""How long the host takes to launch each operator that Triton runs: ``python -m benchmarks.gpu.launch_time NAME ...``.

From a call to the return of its last launch: argument checks, PyTorch's dispatcher, autograd and allocations, and
Triton's launcher. Calls are timed one by one, when the device is idle.

Without a GPU, small tensors on the CPU take the way of those on a GPU, and Triton's own launcher, Python and C, calls a
libcuda that does nothing; kernels are not compiled. What is missing then is the driver's time, some microseconds for
each launch and each of PyTorch's operations, which the table counts; these run on the CPU instead. Needs a C compiler,
as Triton does.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import re
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from fastmask import (
    HungarianMatcher,
    PointSampling,
    SetCriterion,
    Targets,
    deformable_attention,
    mask_cost,
    mask_loss,
    masked_attention,
    semantic_inference,
)
from fastmask.functional import uncertain_points
from fastmask.ops import OPERATORS, _registry
from fastmask.ops._geometry import Geometry, GeometryArguments

CAPABILITY = (9, 0)
Call = Callable[[], Any]


@dataclass(frozen=True)
class Sizes:
    """In the words of the documentation; ``keys`` is the grid of masked attention."""

    layers: int = 6
    images: int = 16
    queries: int = 100
    classes: int = 150
    targets: int = 20
    points: int = 12544
    heads: int = 8
    grid: tuple[int, int] = (128, 128)
    size: tuple[int, int] = (512, 512)
    keys: tuple[int, int] = (64, 64)
    levels: tuple[tuple[int, int], ...] = ((64, 64), (32, 32), (16, 16))


TRAINING = Sizes()
# As many launches as with training sizes, and next to no work for a CPU.
SMALL = Sizes(2, 2, 20, 20, 6, 64, 8, (16, 16), (64, 64), (32, 32), ((4, 4), (2, 2), (1, 1)))


@dataclass(frozen=True)
class Inputs:
    """Zeros on a device, which all operators take."""

    device: torch.device
    sizes: Sizes

    def zeros(self, *shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = False) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device, requires_grad=grad)

    def class_logits(self, *layers: int, grad: bool = False) -> Tensor:
        return self.zeros(*layers, self.sizes.images, self.sizes.queries, self.sizes.classes + 1, grad=grad)

    def mask_logits(self, *layers: int, grad: bool = False) -> Tensor:
        return self.zeros(*layers, self.sizes.images, self.sizes.queries, *self.sizes.grid, grad=grad)

    def targets(self) -> Targets:
        labels = self.zeros(self.sizes.images, self.sizes.targets, dtype=torch.int64)
        segments = self.zeros(self.sizes.images, *self.sizes.size, dtype=torch.uint8)
        return Targets(labels, labels[:, 0].clone(), segments=segments)

    def assignment(self) -> Tensor:
        return self.zeros(self.sizes.layers, self.sizes.images, self.sizes.targets, dtype=torch.int64)

    def points(self, *leading: int) -> Tensor:
        return self.zeros(*leading, self.sizes.points, 2, dtype=torch.float32)

    def geometry(self) -> GeometryArguments:
        return Geometry(self.sizes.grid, None, None, self.sizes.size).arguments()


def both_ways(run: Callable[..., Any], *inputs: Tensor) -> dict[str, Call]:
    """A call with inputs that need a gradient, and its backward."""

    def forward() -> tuple[Tensor, ...]:
        outputs = run(*inputs)
        return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)

    outputs = forward()
    grads = [torch.ones_like(output) for output in outputs]
    return {"": forward, ", backward": lambda: torch.autograd.grad(outputs, inputs, grads, retain_graph=True)}


def make_mask_cost(of: Inputs, *points: Tensor) -> dict[str, Call]:
    class_logits, mask_logits, targets = of.class_logits(of.sizes.layers), of.mask_logits(of.sizes.layers), of.targets()
    return {"": lambda: mask_cost(class_logits, mask_logits, targets, *points)}


def make_mask_loss(of: Inputs, *points: Tensor) -> dict[str, Call]:
    targets, assignment = of.targets(), of.assignment()
    return both_ways(lambda x: mask_loss(x, targets, assignment, *points), of.mask_logits(of.sizes.layers, grad=True))


def make_uncertain_points(of: Inputs) -> dict[str, Call]:
    mask_logits, assignment = of.mask_logits(of.sizes.layers), of.assignment()
    return {"": lambda: uncertain_points(mask_logits, assignment, of.sizes.points)}


def make_masked_attention(of: Inputs) -> dict[str, Call]:
    grid, mask_logits = of.sizes.keys, of.mask_logits()
    q, k, v = (
        of.zeros(of.sizes.images, n, of.sizes.heads * 32, grad=True)
        for n in (of.sizes.queries, grid[0] * grid[1], grid[0] * grid[1])
    )
    return both_ways(lambda *x: masked_attention(*x, mask_logits, grid=grid, num_heads=of.sizes.heads), q, k, v)


def make_deformable_attention(of: Inputs) -> dict[str, Call]:
    pixels = sum(height * width for height, width in of.sizes.levels)
    value = of.zeros(of.sizes.images, pixels, of.sizes.heads, 32, grad=True)
    weights = of.zeros(of.sizes.images, pixels, of.sizes.heads, len(of.sizes.levels), 4, dtype=torch.float32, grad=True)
    locations = of.zeros(*weights.shape, 2, dtype=torch.float32, grad=True)
    return both_ways(lambda *x: deformable_attention(x[0], of.sizes.levels, *x[1:]), value, locations, weights)


def make_semantic(of: Inputs) -> dict[str, Call]:
    class_logits, mask_logits = of.class_logits(), of.mask_logits()
    return {"": lambda: semantic_inference(class_logits, mask_logits, of.sizes.size)}


def make_panoptic(of: Inputs) -> dict[str, Call]:
    """The part that runs on the device, before segments are listed on the host."""
    scores, mask_logits = of.zeros(of.sizes.images, of.sizes.queries, dtype=torch.float32), of.mask_logits()
    return {"": lambda: torch.ops.fastmask.panoptic_winners(scores, mask_logits, False, True, 0.5, *of.geometry())}


def make_instance(of: Inputs) -> dict[str, Call]:
    """The part that runs on the device, before run lengths are made on the host."""
    queries, mask_logits = of.zeros(of.sizes.images, of.sizes.queries, dtype=torch.int64), of.mask_logits()
    return {"": lambda: torch.ops.fastmask.instance_masks(mask_logits, queries, False, *of.geometry())}


def make_criterion(of: Inputs, points: PointSampling | None) -> dict[str, Call]:
    matcher = HungarianMatcher(1.0, 20.0, 1.0, points=points)
    criterion = SetCriterion(of.sizes.classes, matcher, {}, points=points).to(of.device)
    targets = of.targets()

    def run(class_logits: Tensor, mask_logits: Tensor) -> list[Tensor]:
        return list(criterion({"class_logits": class_logits, "mask_logits": mask_logits}, targets).values())

    return both_ways(run, of.class_logits(of.sizes.layers, grad=True), of.mask_logits(of.sizes.layers, grad=True))


MAKERS: dict[str, Callable[[Inputs], dict[str, Call]]] = {
    "mask_cost": make_mask_cost,
    "mask_loss": make_mask_loss,
    "point_mask_cost": lambda of: make_mask_cost(of, of.points(of.sizes.images)),
    "uncertain_points": make_uncertain_points,
    "point_mask_loss": lambda of: make_mask_loss(of, of.points(of.sizes.layers, of.sizes.images, of.sizes.targets)),
    "masked_attention": make_masked_attention,
    "deformable_attention": make_deformable_attention,
    "semantic": make_semantic,
    "panoptic": make_panoptic,
    "instance": make_instance,
    "criterion": lambda of: make_criterion(of, None),
    "criterion at points": lambda of: make_criterion(of, PointSampling(of.sizes.points)),
}


class Counting(TorchDispatchMode):
    """Counts PyTorch's operations in a call, those inside fastmask's operators included: such as launch kernels, and
    views and allocations, which do not."""

    NO_KERNEL = re.compile(r"aten::(empty|new_empty|detach|_unsafe_view|alias|lift_fresh)")

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        operators = list(OPERATORS.values())
        operators += [operator.gradient.operator for operator in operators if operator.gradient is not None]
        self.launching = {f"fastmask::{each.name}": each for each in operators if each.triton is not None}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name
        if name in self.launching:
            with self:
                return self.launching[name].launch(*args)
        kernel = not (function.is_view or self.NO_KERNEL.match(name))
        self.counts["operations" if kernel else "views and allocations"] += 1
        return function(*args, **(kwargs or {}))


def counts_of(call: Call) -> Counter[str]:
    counting = Counting()

    def launched(_: object) -> None:
        counting.counts["launches"] += 1

    hooks = triton.knobs.runtime.launch_enter_hook
    hooks.add(launched)
    try:
        with counting:
            call()
    finally:
        hooks.remove(launched)
    return counting.counts


def microseconds(call: Call, seconds: float, wait: Callable[[], None]) -> list[float]:
    """The time of each of many calls; results are freed before the next call."""
    times: list[float] = []
    for _ in range(20):
        call()
    gc.collect()
    gc.disable()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        wait()
        begin = time.perf_counter_ns()
        result = call()
        times.append((time.perf_counter_ns() - begin) / 1000)
        del result
    gc.enable()
    return times


@cache
def load_idle_libcuda() -> tempfile.TemporaryDirectory[str]:
    """Loads a libcuda.so.1 whose functions all return success. It lies in the folder that is returned as long as this
    process lives: Triton 3.6 links each launcher against it, in the folder where it first found it."""
    folder = tempfile.TemporaryDirectory()
    backend = Path(triton.__file__).parent / "backends" / "nvidia"
    sources = "".join((backend / name).read_text() for name in ("driver.c", "driver.py"))
    names = sorted(set(re.findall(r"\bcu[A-Z]\w+", sources)))
    library = Path(folder.name) / "libcuda.so.1"
    code = "\n".join(f"int {name}() {{ return 0; }}" for name in names)
    command = ["cc", "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", "-x", "c", "-", "-o", str(library)]
    subprocess.run(command, input=code, text=True, check=True)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    triton.knobs.nvidia.libcuda_path = folder.name
    return folder


class _Device:
    """In the place of torch.cuda.device."""

    def __init__(self, device: Any) -> None:
        self.index, self.before = 0, -1

    def __enter__(self) -> None:
        self.before = 0

    def __exit__(self, *_: object) -> bool:
        return False


def launchable(kernel: JITFunction, key: Any, signature: Any, device: int, constants: Any, options: Any, attrs: Any,
               warmup: bool) -> Any:  # fmt: skip
    """In the place of ``JITFunction._do_compile``: a kernel without code."""
    from triton.backends.nvidia.driver import CudaLauncher
    from triton.compiler import ASTSource, CompiledKernel

    assert kernel.cache_key  # by the way, finds the globals that each launch compares
    compiled = object.__new__(CompiledKernel)
    compiled.src = ASTSource(kernel, signature, constants, attrs)
    sizes = dict.fromkeys((f"{kind}_scratch_{what}" for kind in ("global", "profile") for what in ("size", "align")), 0)
    compiled.metadata = SimpleNamespace(**sizes, num_ctas=1, launch_cooperative_grid=False, launch_pdl=False)
    compiled.name, compiled.packed_metadata = kernel.__name__, (options.num_warps, 1, 0)
    compiled.module, compiled._module_pid, compiled.function = 1, None, 1  # as if loaded, and never to be unloaded
    compiled._run = CudaLauncher(compiled.src, compiled.metadata)
    kernel.device_caches[device][0][key] = compiled
    return compiled


@contextmanager
def without_gpu() -> Iterator[torch.device]:
    """Operators launch for tensors on the CPU as for those of a GPU, whose values the host does not check."""
    registered = torch.library.Library("fastmask", "IMPL")
    counting = Counting()
    for name, operator in counting.launching.items():
        registered.impl(name.split("::")[1], operator.launch_on_tensor_device, "CPU", allow_override=True)
    like_gpu, choose = torch.device("cuda", 0), _registry.auto_backend

    def auto_backend(operator: _registry.Operator, tensor: Tensor) -> str:
        if operator.triton is not None:
            choose(operator, SimpleNamespace(dtype=tensor.dtype, device=like_gpu))  # type: ignore[arg-type]
        return "native"

    with ExitStack() as stack:
        load_idle_libcuda()
        patch = lambda *args: stack.enter_context(mock.patch.object(*args))  # noqa: E731
        patch(_registry, "auto_backend", auto_backend)
        patch(JITFunction, "_do_compile", launchable)
        patch(torch.compiler, "is_compiling", lambda: True)
        patch(torch.cuda, "device", _Device)
        patch(torch.cuda, "is_initialized", lambda: True)
        patch(torch.cuda, "get_device_capability", lambda _=None: CAPABILITY)
        patch(torch.cuda, "current_device", lambda: 0)
        driver = triton.backends.backends["nvidia"].driver()
        driver.get_current_stream = lambda _: 0
        triton.runtime.driver.set_active(driver)
        yield torch.device("cpu")


@contextmanager
def with_gpu() -> Iterator[torch.device]:
    yield torch.device("cuda", torch.cuda.current_device())


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how long the host takes to launch each operator.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="operators; all by default")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each of them")
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in MAKERS]:
        parser.error(f"no operator {', '.join(unknown)}; there are {', '.join(MAKERS)}")
    gpu = torch.cuda.is_available()
    wait = torch.cuda.synchronize if gpu else lambda: None
    print(f"{'on a GPU' if gpu else 'no GPU'}, torch {torch.__version__}, triton {triton.__version__}; times in us")
    print("| operator | launches | operations | views, allocations | least | median |\n|---|--:|--:|--:|--:|--:|")
    with with_gpu() if gpu else without_gpu() as device:
        for name in options.names or MAKERS:
            for way, call in MAKERS[name](Inputs(device, TRAINING if gpu else SMALL)).items():
                counts, times = counts_of(call), microseconds(call, options.seconds, wait)
                numbers = (counts[key] for key in ("launches", "operations", "views and allocations"))
                print(f"| {name}{way} |", *(f"{n} |" for n in numbers),
                      f"{min(times):.0f} | {statistics.median(times):.0f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
