"""How tests describe an operator, in the manner of PyTorch's OpInfo, and run it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastmask import Targets
from fastmask.testing import GpuError, assert_within_budget

Arguments = dict[str, Any]
Case = Callable[[torch.Generator], Arguments]
# What must be refused: a change of the arguments, the error, and what its message says.
Refused = tuple[Callable[[Arguments], Arguments], type[Exception], str]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HALVES = DTYPES[1:]


@dataclass(frozen=True)
class OpInfo:
    """An operator with a reference, and what tests of it need.

    Args:
        name: of the entry.
        operator: what ``function`` calls beneath, in the namespace ``fastmask``; None if it calls PyTorch's alone.
        function: takes arguments by name, and ``backend``. "reference" runs in the dtype of the logits.
        outputs: their names.
        logits: the arguments that have the dtype under test.
        cases: arguments for the CPU's and CUDA's kernels, float32 and on the CPU.
        triton: the same for Triton's kernels, few and small, as the interpreter needs a millisecond for a line.
        typical: names of the cases, of both tables, that further tests use; where one is enough, the first.
        refused: what must be refused.
        operands: the arguments of ``operator`` that its gradient takes too.
        options: its further arguments.
        gpu_error: of each result, for arguments and their dtype.
        judge: asserts that results follow from the arguments, instead of a budget for each: of integers, for instance.
        output_dtype: None if it is that of the logits.
        differentiable: the arguments that have a gradient.
        backward_operands: what the gradient's operator is called with before ``operands``, for the operator's outputs.
        corrupt: where NaN makes results NaN, writes it into the arguments; returns masks of what it may change, by the
            names of results.
        own_products: dtypes in which factors of products on GPUs have the dtype of the logits, as the reference's have.
        compiled_only: dtypes that Triton's interpreter computes wrongly.
        backends: that the battery runs; "cuda" is what ``backend="auto"`` takes on a GPU.
    """

    name: str
    operator: str | None
    function: Callable[..., Tensor | tuple[Tensor, ...]]
    outputs: tuple[str, ...]
    logits: tuple[str, ...]
    cases: Mapping[str, Case]
    triton: Mapping[str, Case]
    typical: tuple[str, ...]
    refused: Mapping[str, Refused]
    operands: Callable[[Arguments], tuple[Any, ...]] = tuple
    options: tuple[Any, ...] = ()
    gpu_error: Callable[[Arguments, torch.dtype], tuple[GpuError, ...]] | None = None
    judge: Callable[[Arguments, dict[str, Tensor]], None] | None = None
    output_dtype: torch.dtype | None = torch.float32
    differentiable: tuple[str, ...] = ()
    backward_operands: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] = tuple
    corrupt: Callable[[Arguments], dict[str, Tensor]] | None = None
    own_products: tuple[torch.dtype, ...] = ()
    compiled_only: tuple[torch.dtype, ...] = ()
    backends: tuple[str, ...] = ("native", "triton", "cuda")

    def __str__(self) -> str:
        return self.name

    @property
    def results(self) -> tuple[str, ...]:
        return *self.outputs, *(f"gradient of {name}" for name in self.differentiable)

    def cast(self, arguments: Arguments, dtype: torch.dtype) -> Arguments:
        """The same with logits of another dtype."""
        return arguments | {name: arguments[name].to(dtype) for name in self.logits if arguments[name] is not None}

    def run(
        self, arguments: Arguments, backend: str = "reference", function: Callable[..., Any] | None = None
    ) -> dict[str, Tensor]:
        """Outputs by name, and the gradients of a weighted sum of them, so that each element has one of its own."""
        if backend == "cuda":
            arguments, backend = {name: on_gpu(value) for name, value in arguments.items()}, "auto"
        leaves = {name: arguments[name].detach().requires_grad_() for name in self.differentiable}
        outputs = (function or self.function)(**(arguments | leaves), backend=backend)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        found = {name: output.detach() for name, output in zip(self.outputs, outputs, strict=True)}
        if leaves:
            total = sum((output * weights(output, seed)).sum() for seed, output in enumerate(outputs))
            gradients = torch.autograd.grad(total, tuple(leaves.values()))
            found |= zip(self.results[len(outputs) :], gradients, strict=True)
        return found

    def check(self, arguments: Arguments, dtype: torch.dtype, backend: str) -> dict[str, Tensor]:
        """Results are within the error budget of the reference in float64, or what ``judge`` says."""
        arguments = self.cast(arguments, dtype)
        if self.judge is not None:
            actual = self.run(arguments, backend)
            self.judge(arguments, {name: result.cpu() for name, result in actual.items()})
            return actual
        own = dtype if dtype in self.own_products and backend != "native" else torch.float32
        exact, same_dtype = (self.run(self.cast(arguments, of)) for of in (torch.float64, own))
        actual = self.run(arguments, backend)
        errors = self.gpu_error(arguments, dtype) if self.gpu_error else [None] * len(self.results)
        for name, error in zip(self.results, errors, strict=True):
            assert_within_budget(actual[name], same_dtype[name], exact[name], name=name, gpu=error)
        assert {actual[name].dtype for name in self.outputs} == {self.output_dtype or dtype}
        assert {actual[f"gradient of {name}"].dtype for name in self.differentiable} <= {dtype}
        return actual


def changed(name: str, change: Callable[[Any], Any]) -> Callable[[Arguments], Arguments]:
    """The same arguments but for one."""
    return lambda arguments: arguments | {name: change(arguments[name])}


def float64_for_kernels(*names: str) -> Refused:
    """Which read no such logits."""

    def change(arguments: Arguments) -> Arguments:
        return arguments | {name: arguments[name].double() for name in names} | {"backend": "native"}

    return change, RuntimeError, "do not support float64"


def on_gpu(value: Any) -> Any:
    """With the strides and the offset that a tensor has on the CPU."""
    if isinstance(value, Tensor):
        storage = value.untyped_storage().cuda()
        return value.new_empty(0, device="cuda").set_(storage, value.storage_offset(), value.shape, value.stride())
    return value.to("cuda") if isinstance(value, Targets) else value


def weights(output: Tensor, seed: int) -> Tensor:
    """Random ones that every dtype holds."""
    drawn = torch.randint(-128, 129, output.shape, generator=torch.Generator().manual_seed(seed)) / 32
    return drawn.to(output)


def assert_same_bits(results: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for name, result in results.items():
        assert torch.equal(result.nan_to_num(7e7), expected[name].nan_to_num(7e7)), name


def transposed(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT


def outermost_second(x: Tensor) -> Tensor:
    """As a model lays out the masks of all layers that it makes in one product."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def innermost_third_last(x: Tensor) -> Tensor:
    """Queries innermost, as convolutions lay them out in channels-last networks."""
    return x.movedim(-3, -1).contiguous().movedim(-1, -3) if x.dim() > 2 else x


def part_of_more(x: Tensor) -> Tensor:
    """Rows apart, with NaN between them, as parts of a projection have."""
    return torch.cat([filler(x), x], -1)[..., x.shape[-1] :]


def every_other_column(x: Tensor) -> Tensor:
    return torch.stack([x, filler(x)], -1).flatten(-2)[..., ::2]


def filler(x: Tensor) -> Tensor:
    return torch.full_like(x, torch.nan if x.is_floating_point() else 1)


LAYOUTS = (transposed, outermost_second, innermost_third_last, part_of_more, every_other_column)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """New tensors hold the largest integer, True or NaN until they are written."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
