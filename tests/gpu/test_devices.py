"""Which GPUs the kernels run on, and on which of several: shown with tensors that only claim to lie on one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from triton.compiler import CompiledKernel
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from fastmask.ops import OPERATORS, _registry
from fastmask.ops.deformable_attention import DEFORMABLE_ATTENTION_BACKWARD
from fastmask.ops.mask_loss import MASK_LOSS_BACKWARD, POINT_MASK_LOSS_BACKWARD
from fastmask.ops.masked_attention import MASKED_ATTENTION_BACKWARD
from tests.helpers.launches import forget_compiled_kernels

TRITON = [
    *(operator for operator in OPERATORS.values() if operator.triton is not None),
    *(MASK_LOSS_BACKWARD, POINT_MASK_LOSS_BACKWARD, MASKED_ATTENTION_BACKWARD, DEFORMABLE_ATTENTION_BACKWARD),
]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A tensor on cuda:1, of a GPU whose compute capability a test sets."""
    monkeypatch.setattr(_registry, "_warned", set())
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"Tesla T{index}")
    with FakeTensorMode():
        yield torch.empty(2, device="cuda:1")


@pytest.mark.parametrize("name", OPERATORS)
def test_a_gpu_that_is_too_old(name, gpu, monkeypatch):
    operator = OPERATORS[name]
    monkeypatch.setattr(_registry, "_registered", lambda name, device: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    reason = r"Tesla T1 has compute capability 7\.5; the kernels need 8\.0 or more"
    with pytest.warns(RuntimeWarning, match=f"falls back to the PyTorch reference: {reason}"):
        assert _registry.choose_backend(operator, "auto", gpu) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _registry.choose_backend(operator, "auto", gpu) == "reference"
    named = "native" if operator.triton is None else "triton"
    with pytest.raises(RuntimeError, match=f"backend='{named}' cannot run {name}: {reason}"):
        _registry.choose_backend(operator, named, gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    assert _registry.choose_backend(operator, "auto", gpu) == named


def test_a_gpu_of_another_maker(gpu, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.1")
    with pytest.raises(RuntimeError, match="cannot run mask_cost: this is a ROCm build"):
        _registry.choose_backend(OPERATORS["mask_cost"], "triton", gpu)


def test_triton_that_is_missing(gpu, monkeypatch):
    monkeypatch.setattr(_registry, "TRITON_INSTALLED", False)
    with pytest.warns(RuntimeWarning, match="triton is not installed"):
        assert _registry.choose_backend(OPERATORS["mask_cost"], "auto", gpu) == "reference"


def test_an_extension_without_cuda(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(_registry, "_registered", lambda name, device: device != "cuda")
    with pytest.warns(RuntimeWarning, match="was built without CUDA"):
        assert _registry.choose_backend(OPERATORS["assign"], "auto", gpu) == "reference"


def test_a_gpu_that_is_too_old_within_a_compiled_graph(monkeypatch):
    """What a GPU can do is no part of a graph, and asking breaks none."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))

    @torch.compile(fullgraph=True, backend="eager")
    def function(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if _registry.gpu_reason(x.device.index) is None else x - 1

    assert function(torch.zeros(())) == -1


class RecordingDriver:
    """Says which device is current, as Triton's driver for CUDA does where a kernel is launched."""

    def __init__(self) -> None:
        self.current = 0
        self.launched_on: list[tuple[str, int]] = []
        self.through_triton: list[str] = []

    def exchange_device(self, device: int) -> int:
        before, self.current = self.current, device if device >= 0 else self.current
        return before

    def get_current_device(self) -> int:
        return self.current


class Loaded(CompiledKernel):
    """A kernel that lies on one device, and records where it is launched."""

    def __init__(self, name: str, driver: RecordingDriver) -> None:
        self.name, self.driver, self.device, self.module = name, driver, driver.current, None

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*_: Any) -> None:
            assert self.driver.current == self.device, f"{self.name} lies on device {self.device}"
            self.driver.launched_on.append((self.name, self.device))

        return launch


class IndexingByShape(TorchFunctionMode):
    """Gives x[index] its shape alone: the CPU build of torch refuses it where x claims to lie on a GPU.

    To set torch.Tensor.__getitem__ instead would make every later tensor of the process a sequence, set back or not:
    torch.tensor of a list of numbers' tensors then fails.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is not torch.Tensor.__getitem__:
            return function(*args, **kwargs or {})
        x, index = args
        return x.new_empty(torch.empty(x.shape, device="meta")[index].shape)


@contextmanager
def recorded_launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[RecordingDriver]:
    driver = RecordingDriver()

    def run(kernel: JITFunction | InterpretedFunction, **_: Any) -> Loaded:
        device = triton.runtime.driver.active.get_current_device()
        driver.launched_on.append((kernel.fn.__name__, device))
        driver.through_triton.append(kernel.fn.__name__)
        return Loaded(kernel.fn.__name__, driver)

    for name in ("_exchange_device", "_maybe_exchange_device"):
        monkeypatch.setattr(torch.cuda, name, driver.exchange_device)
    monkeypatch.setattr(torch.cuda, "current_device", driver.get_current_device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for kind in (JITFunction, InterpretedFunction):
        monkeypatch.setattr(kind, "run", run)
    active = triton.runtime.driver._active
    triton.runtime.driver.set_active(driver)
    forget_compiled_kernels()
    try:
        with IndexingByShape():
            yield driver
    finally:
        triton.runtime.driver._active = active
        forget_compiled_kernels()


def cuda_arguments(operator: _registry.Operator, device: str = "cuda:1") -> tuple[Any, ...]:
    """Arguments on a GPU, under FakeTensorMode."""
    float32, int64 = ({"dtype": dtype, "device": device} for dtype in (torch.float32, torch.int64))
    pairs = torch.empty(1, 2, 3, **float32)
    sums = torch.empty(1, 2, 3, 4, **float32)
    mask_logits = torch.empty(1, 2, 5, 8, 12, **float32)
    planes = mask_logits.squeeze(0)
    class_logits = torch.empty(1, 2, 5, 7, **float32)
    assignment = torch.empty(1, 2, 3, **int64)
    segments = torch.empty(2, 32, 48, dtype=torch.uint8, device=device)
    targets = (torch.empty(2, 3, **int64), None, segments, None, 255, True)
    term = ("focal", 0.25, 2.0)
    q, k = torch.empty(2, 5, 32, **float32), torch.empty(2, 96, 32, **float32)
    attention = (q, k, k, planes, None, 8, 12, 2, 0.25, 0.0, None)
    value, weights = torch.empty(2, 108, 4, 8, **float32), torch.empty(2, 5, 4, 2, 3, **float32)
    deformable = (value, torch.empty(2, 5, 4, 2, 3, 2, **float32), weights, [8, 12, 3, 4])
    geometry = ((8, 12), None, None, (32, 48), 0, 0, 32)
    return {
        "mask_cost": (class_logits, mask_logits, *targets, 1.0, 1.0, 1.0, *term),
        "point_mask_cost": (
            class_logits, mask_logits, *targets, torch.empty(2, 20, 2, **float32), 1.0, 1.0, 1.0, *term
        ),
        "mask_loss": (mask_logits, assignment, *targets, *term, False),
        "mask_loss_backward": (pairs, pairs, sums, torch.empty(0, **float32), mask_logits, assignment, *targets, *term),
        "point_mask_loss": (mask_logits, assignment, *targets, torch.empty(1, 2, 3, 20, 2, **float32), *term, False),
        "point_mask_loss_backward": (
            pairs, pairs, sums, torch.empty(0, **float32), mask_logits, assignment, *targets,
            torch.empty(1, 2, 3, 20, 2, **float32), *term,
        ),
        "uncertain_points": (mask_logits, assignment, torch.empty(1, **int64), 20, 60, 15),
        "masked_attention": attention,
        "masked_attention_backward": (q, q, torch.empty(2, 2, 5, **float32), *attention),
        "deformable_attention": deformable,
        "deformable_attention_backward": (q, *deformable),
        "semantic_inference": (torch.empty(2, 5, 6, **float32), planes, "masks", "labels", False, *geometry),
        "panoptic_winners": (torch.empty(2, 5, **float32), planes, False, False, 0.5, *geometry),
        "instance_masks": (planes, torch.empty(2, 5, **int64), False, *geometry),
    }[operator.name]  # fmt: skip


@pytest.mark.parametrize("operator", TRITON, ids=lambda operator: operator.name)
def test_kernels_run_on_the_device_of_their_tensors(operator, monkeypatch):
    """Whichever device is current; and that one is current again afterwards."""
    with FakeTensorMode(), recorded_launches(monkeypatch) as driver:
        arguments = cuda_arguments(operator)
        operator.launch_on_tensor_device(*arguments)
        assert driver.launched_on
        assert {device for _, device in driver.launched_on} == {1}
        assert driver.current == 0


@pytest.mark.parametrize("operator", TRITON, ids=lambda operator: operator.name)
def test_a_device_launches_only_kernels_that_lie_on_it(operator, monkeypatch):
    """Though the sizes are the same on both; and only the first call on each device goes through Triton."""
    with FakeTensorMode(), recorded_launches(monkeypatch) as driver:
        arguments = [cuda_arguments(operator, f"cuda:{device}") for device in (0, 1)]
        for device, first in ((1, True), (0, True), (1, False), (0, False)):
            driver.launched_on.clear()
            driver.through_triton.clear()
            operator.launch_on_tensor_device(*arguments[device])
            assert {on for _, on in driver.launched_on} == {device}
            assert bool(driver.through_triton) == first


@pytest.mark.parametrize("operator", TRITON, ids=lambda operator: operator.name)
def test_the_dispatcher_has_a_kernel_for_gpus(operator):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastmask::{operator.name}", "CUDA")


def test_tensors_on_the_cpu_do_not_mind_an_old_gpu(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert _registry.choose_backend(OPERATORS["mask_cost"], "auto", torch.empty(1, device="cpu")) == "native"
