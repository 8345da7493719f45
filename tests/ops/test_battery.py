"""Every operator on every backend, by one table: values, gradients, dtypes, SIMD levels, layouts, NaN, determinism,
shapes of fake kernels, compilation as one graph, and what must be refused.

"triton" runs Triton's kernels on CPU tensors, interpreted or, with --compiled, as PTX. "cuda" runs what
``backend="auto"`` takes on a GPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmask import Targets
from fastmask.testing import simd_level, simd_levels
from tests.helpers.attention_operator import MASKED_ATTENTION
from tests.helpers.class_operator import CLASS_LOSS
from tests.helpers.deformable_operator import DEFORMABLE_ATTENTION
from tests.helpers.inputs import at_odd_address
from tests.helpers.instance_operator import INSTANCE
from tests.helpers.mask_operators import MASK_OPERATORS
from tests.helpers.op_info import (
    DTYPES,
    HALVES,
    LAYOUTS,
    Case,
    OpInfo,
    assert_same_bits,
    outermost_second,
    poisoned_memory,
    threads,
    transposed,
)
from tests.helpers.panoptic_operator import PANOPTIC
from tests.helpers.points_operator import POINTS
from tests.helpers.semantic_operator import SEMANTIC_INFERENCE

OPERATORS = (
    *MASK_OPERATORS,
    MASKED_ATTENTION,
    DEFORMABLE_ATTENTION,
    SEMANTIC_INFERENCE,
    PANOPTIC,
    INSTANCE,
    POINTS,
    CLASS_LOSS,
)
EACH = pytest.mark.parametrize("op", OPERATORS, ids=str)


def first_name(op: OpInfo, table: Mapping[str, Case]) -> str | None:
    return next((name for name in op.typical if name in table), None)


def named(op: OpInfo, backend: str, names: Iterable[str] | None = None) -> list[Any]:
    """Parameters: an operator, one of its cases and a backend. Of Triton's typical cases all but the first are slow."""
    table = op.triton if backend == "triton" else op.cases
    first = first_name(op, table)

    def marks(name: str) -> list[pytest.MarkDecorator]:
        if backend == "triton" and names is not None and name != first:
            return [pytest.mark.slow]
        return [pytest.mark.cuda] if backend == "cuda" else []

    return [
        pytest.param(op, case, backend, id=f"{op}-{backend}-{name}", marks=marks(name))
        for name, case in table.items()
        if names is None or name in names
    ]


def on_backends(names: Callable[[OpInfo], Iterable[str] | None] = lambda _: None) -> pytest.MarkDecorator:
    params = [param for op in OPERATORS for backend in op.backends for param in named(op, backend, names(op))]
    return pytest.mark.parametrize(("op", "case", "backend"), params, indirect=["backend"])


TYPICAL = on_backends(lambda op: op.typical)


def first_of(op: OpInfo, backend: str = "native") -> Case:
    table = op.triton if backend == "triton" else op.cases
    return table[first_name(op, table)]


ONE = on_backends(lambda op: {first_name(op, op.cases), first_name(op, op.triton)})


@on_backends()
def test_values_and_gradients_are_within_the_budget(op, case, backend, generator):
    op.check(case(generator), torch.float32, backend)


@pytest.mark.parametrize("dtype", HALVES)
@TYPICAL
def test_half_precision_logits(op, case, backend, dtype, generator, request):
    skip_if_interpreted(op, backend, dtype, request)
    op.check(case(generator), dtype, backend)


def skip_if_interpreted(op: OpInfo, backend: str, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    if backend == "triton" and dtype in op.compiled_only and request.config.getoption("--compiled") is None:
        pytest.skip("Triton's interpreter computes it wrongly; run with --compiled 90")


@pytest.mark.parametrize("level", simd_levels())
@EACH
def test_every_simd_level(op, level, generator):
    with simd_level(level):
        for name in op.typical:
            for dtype in DTYPES if name in op.cases else ():
                op.check(op.cases[name](generator), dtype, "native")


@pytest.mark.slow
@pytest.mark.parametrize("level", simd_levels()[:-1])
@pytest.mark.parametrize(("op", "case", "backend"), [param for op in OPERATORS for param in named(op, "native")])
def test_all_cases_at_lower_simd_levels(op, case, backend, level, generator):
    with simd_level(level):
        op.check(case(generator), torch.float32, backend)


@pytest.mark.parametrize("dtype", DTYPES)
@ONE
def test_odd_addresses(op, case, backend, dtype, generator, request):
    """Where vectors cannot be loaded at once."""
    skip_if_interpreted(op, backend, dtype, request)
    arguments = op.cast(case(generator), dtype)
    odd = {name: at_odd_address(value) for name, value in arguments.items() if isinstance(value, Tensor)}
    op.check(arguments | odd, dtype, backend)


def laid_out(value: Any, layout: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Targets):
        planes = {name: laid_out(getattr(value, name), layout) for name in ("masks", "segments", "valid")}
        return dataclasses.replace(value, **planes)
    return layout(value) if isinstance(value, Tensor) and value.dim() > 1 else value


@TYPICAL
def test_strides_change_no_bit(op, case, backend, generator):
    arguments = case(generator)
    expected = op.run(arguments, backend)
    for layout in LAYOUTS if case is first_of(op, backend) else (transposed,):
        strided = {name: laid_out(value, layout) for name, value in arguments.items()}
        results = op.run(arguments | strided, backend)
        assert_same_bits(results, expected)
        if layout is outermost_second and "mask_logits" in op.differentiable:
            assert results["gradient of mask_logits"].stride() == strided["mask_logits"].stride()


@ONE
def test_two_runs_give_the_same_bits_whatever_was_in_memory(op, case, backend, generator):
    arguments = case(generator)
    with threads(1):
        first = op.run(arguments, backend)
    for count in (3, 40):
        with poisoned_memory(), threads(count):
            assert_same_bits(op.run(arguments, backend), first)


@on_backends(lambda op: op.typical[:-1] if op.corrupt else ())
def test_nan_reaches_no_other_result(op, case, backend, generator):
    arguments = case(generator)
    expected = op.run(arguments, backend)
    touched = op.corrupt(arguments)
    results = op.run(arguments, backend)
    for name, mask in touched.items():
        result, mask = results[name].cpu(), mask
        assert result[mask].isnan().any(), name
        assert torch.equal(result[~mask], expected[name].cpu()[~mask]), name


@EACH
def test_only_what_has_a_gradient_carries_one(op, generator):
    arguments = first_of(op)(generator)
    for name in op.logits:
        arguments[name].requires_grad_()
    outputs = op.function(**arguments)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    assert all(output.requires_grad == bool(op.differentiable) for output in outputs)


@pytest.mark.slow
@pytest.mark.parametrize("op", [op for op in OPERATORS if op.operator], ids=str)
def test_opcheck(op, generator):
    """Traces, which take long, of two layouts; schema and fake kernel of all."""
    quick: dict[str, Any] = {"test_utils": ("test_schema", "test_faketensor")}
    first, second = [name for name in op.typical if name in op.cases][:2]
    for name, layout, options in (
        (first, torch.clone, quick), (first, outermost_second, {}), (first, transposed, quick),
        (second, torch.clone, {}),
    ):  # fmt: skip
        arguments = op.cases[name](generator)
        arguments |= {logits: layout(arguments[logits]) for logits in op.logits}
        operands, run = op.operands(arguments), getattr(torch.ops.fastmask, op.operator).default
        if op.differentiable:
            outputs = run(*operands, *op.options)
            backward = getattr(torch.ops.fastmask, f"{op.operator}_backward").default
            torch.library.opcheck(backward, (*op.backward_operands(outputs), *operands), **options)
            for differentiable in op.differentiable:
                arguments[differentiable].requires_grad_()
        torch.library.opcheck(run, (*op.operands(arguments), *op.options), **options)


@EACH
def test_it_compiles_as_one_graph(op, generator):
    arguments = first_of(op)(generator)
    compiled = torch.compile(op.function, fullgraph=True, backend="aot_eager")
    assert_same_bits(op.run(arguments, "auto", compiled), op.run(arguments, "auto"))


@pytest.mark.parametrize(
    ("op", "refused"),
    [pytest.param(op, refused, id=f"{op}-{name}") for op in OPERATORS for name, refused in op.refused.items()],
)
def test_what_does_not_fit_is_named(op, refused, generator):
    change, error, message = refused
    arguments = first_of(op)(generator)
    if "targets" in arguments:
        arguments["targets"].labels[-1, 0] = arguments["targets"].labels.max()
    with pytest.raises(error, match=message):
        op.function(**change(arguments))
