"""On a GPU: the training operators' battery against the reference in float64, at full pixels and at points.

The first shape runs on the CPU too, so that the battery itself is tried where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmask import MaskTerm, Targets, mask_cost, mask_loss, uncertain_points
from fastmask.testing import assert_within_budget
from tests.helpers import gpu_errors
from tests.helpers.inputs import SHAPES, random_assignment, random_logits, random_points, random_targets
from tests.ops.test_uncertain_points import check_choice

FORMS = ("segments", "masks", "masks+valid")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BCE = {"kind": "bce"}  # at points, unless a test says otherwise
TERMS = (BCE, {"gamma": 0.0}, {"gamma": 1.5}, {"alpha": 0.0}, {"alpha": 1.0}, {"kind": "focal"})
CUDA = pytest.param("cuda", marks=pytest.mark.cuda)
BOTH = pytest.mark.parametrize("device", ["cpu", CUDA])
NUM_POINTS = 400
Results = tuple[Tensor, ...]


class Inputs:
    """What all four operators take, on the CPU, drawn once."""

    def __init__(self, shape: tuple[int, ...], generator: torch.Generator, form: str, **options: Any) -> None:
        self.targets = random_targets(shape, generator, form, **options)
        self.class_logits, self.mask_logits = random_logits(shape, generator)
        self.assignment = random_assignment(shape, self.targets, generator)
        self.shared = random_points(generator, shape[1], NUM_POINTS)
        self.own = random_points(generator, *self.assignment.shape, NUM_POINTS)
        self.weights = torch.randn(2, *self.assignment.shape, generator=generator)

    def change(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """With other logits."""
        self.class_logits, self.mask_logits = change(self.class_logits), change(self.mask_logits)
        return self


def costs(inputs: Inputs, device: str, dtype: torch.dtype, backend: str, **term: Any) -> Results:
    """The matching costs by all pixels and by points."""
    logits = [x.to(device, dtype) for x in (inputs.class_logits, inputs.mask_logits)]
    targets, options = inputs.targets.to(device), {"cost_mask": 20.0, "backend": backend}
    return (
        mask_cost(*logits, targets, term=MaskTerm(**term), **options),
        mask_cost(*logits, targets, inputs.shared.to(device), term=MaskTerm(**BCE | term), **options),
    )


def losses(inputs: Inputs, device: str, dtype: torch.dtype, backend: str, **term: Any) -> Results:
    """The losses of each pair by all pixels and by points, each with the gradient of a weighted sum."""
    targets, assignment = inputs.targets.to(device), inputs.assignment.to(device)
    results: list[Tensor] = []
    for points, default in ((None, {}), (inputs.own.to(device), BCE)):
        logits = inputs.mask_logits.to(device, dtype).detach().requires_grad_()
        options = {"term": MaskTerm(**default | term), "reduction": "none", "backend": backend}
        pairs = mask_loss(logits, targets, assignment, points, **options)
        weights = inputs.weights.to(device, pairs[0].dtype)
        total = sum((loss * weight).sum() for loss, weight in zip(pairs, weights, strict=True))
        results += [*(loss.detach() for loss in pairs), *torch.autograd.grad(total, logits)]
    return tuple(results)


NAMES = {
    costs: ("cost", "cost at points"),
    losses: ("loss_mask", "loss_dice", "gradient", "loss_mask at points", "loss_dice at points", "gradient at points"),
}


def check(run: Callable[..., Results], inputs: Inputs, device: str, dtype: torch.dtype, **options: Any) -> Results:
    """Against the reference on the CPU, on the logits as they are after rounding to ``dtype``."""
    inputs.change(lambda logits: logits.to(dtype).float())
    exact = run(inputs, "cpu", torch.float64, "reference", **options)
    same_dtype = run(inputs, "cpu", torch.float32, "reference", **options)
    actual = run(inputs, device, dtype, "auto", **options)
    gamma = options.get("gamma", 2.0)
    gpu = (gpu_errors.mask_cost(1.0, 20.0, 1.0, gamma),) if run is costs else gpu_errors.mask_loss(gamma)
    for name, *values, error in zip(NAMES[run], actual, same_dtype, exact, gpu * 2, strict=True):
        assert_within_budget(*values, name=name, gpu=error)
    return actual


SHAPES_ON = [
    pytest.param("cpu", SHAPES["odd sizes"], id="cpu-odd sizes"),
    *(pytest.param("cuda", shape, marks=pytest.mark.cuda, id=f"cuda-{name}") for name, shape in SHAPES.items()),
]
RUNS = pytest.mark.parametrize("run", NAMES, ids=lambda run: run.__name__)


@RUNS
@pytest.mark.parametrize(("device", "shape"), SHAPES_ON)
@pytest.mark.parametrize("form", FORMS)
def test_forms_of_targets(run, device, shape, form, generator):
    for ignore_void in (False, True):
        check(run, Inputs(shape, generator, form), device, torch.float32, ignore_void=ignore_void)


@RUNS
@BOTH
@pytest.mark.parametrize("term", TERMS, ids=str)
def test_terms(run, device, term, generator):
    check(run, Inputs(SHAPES["odd sizes"], generator, "segments"), device, torch.float32, **term)


@RUNS
@BOTH
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(run, device, dtype, generator):
    check(run, Inputs(SHAPES["odd sizes"], generator, "masks+valid"), device, dtype, ignore_void=True)


@RUNS
@BOTH
@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
def test_wide_segment_maps(run, device, dtype, generator):
    inputs = Inputs((1, 2, 310, 4, 300, 6, 6, 30, 30), generator, "segments", dtype=dtype)
    check(run, inputs, device, torch.float32, ignore_void=True)


@RUNS
@BOTH
@pytest.mark.parametrize("scale", [30.0, 200.0])
def test_saturated_logits(run, device, scale, generator):
    inputs = Inputs(SHAPES["odd sizes"], generator, "masks").change(lambda logits: logits * scale)
    check(run, inputs, device, torch.float32)


@RUNS
@BOTH
def test_all_void(run, device, generator):
    inputs = Inputs(SHAPES["usual"], generator, "segments")
    of = inputs.targets
    inputs.targets = Targets(of.labels, of.counts, segments=torch.full_like(of.segments, of.void), void=of.void)
    assert all(result.isfinite().all() for result in check(run, inputs, device, torch.float32, ignore_void=True))


@RUNS
@BOTH
def test_strided_logits_give_the_same_bits(run, device, generator):
    inputs = Inputs(SHAPES["odd sizes"], generator, "segments")
    expected = run(inputs, device, torch.float32, "auto")
    for layout in (lambda x: x.mT.contiguous().mT, lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)):
        other = Inputs.__new__(Inputs)
        other.__dict__.update(inputs.__dict__)
        results = run(other.change(layout), device, torch.float32, "auto")
        assert all(torch.equal(x, y) for x, y in zip(results, expected, strict=True))


@BOTH
def test_nan_and_infinite_logits_stay_in_their_row(device, generator):
    """NaN of one query, an infinity of another: all other costs keep their bits."""
    inputs = Inputs(SHAPES["usual"], generator, "segments")
    expected = costs(inputs, device, torch.float32, "auto")
    inputs.mask_logits[0, 1, 3] = float("nan")
    inputs.mask_logits[1, 1, 4] = float("inf")
    results = costs(inputs, device, torch.float32, "auto")
    touched = torch.zeros(expected[0].shape, dtype=torch.bool, device=device)
    touched[0, 1, 3] = touched[1, 1, 4] = True
    for result, value in zip(results, expected, strict=True):
        assert result[0, 1, 3].isnan().all()
        assert torch.equal(result[~touched], value[~touched])


@BOTH
def test_nan_logits_reach_only_their_pair(device, generator):
    inputs = Inputs(SHAPES["usual"], generator, "segments")
    expected = losses(inputs, device, torch.float32, "auto")
    image = inputs.targets.batch_size - 1
    inputs.mask_logits[0, image, inputs.assignment[0, image, 0]] = float("nan")
    results = losses(inputs, device, torch.float32, "auto")
    for i in (0, 1, 3, 4):
        assert results[i][0, image, 0].isnan()
        results[i][0, image, 0] = expected[i][0, image, 0]
        assert torch.equal(results[i], expected[i])


@pytest.mark.parametrize(("device", "shape"), SHAPES_ON)
@pytest.mark.parametrize("dtype", DTYPES)
def test_uncertain_points(device, shape, dtype, generator):
    """Those of the reference's stream, whatever the device. The seed is drawn by the device's own generator."""
    inputs = Inputs(shape, generator, "masks")
    mask_logits = inputs.mask_logits.to(dtype)
    draws = torch.Generator(device).manual_seed(7)
    seed = torch.randint(2**63 - 1, (1,), generator=torch.Generator(device).manual_seed(7), device=device).cpu()
    points = uncertain_points(mask_logits.to(device), inputs.assignment.to(device), 101, generator=draws)
    check_choice(points.cpu(), mask_logits, inputs.assignment, 101, stream_seed=seed)
