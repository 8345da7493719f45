"""Uncertain points: what the battery of operators, which checks the choice, does not ask of every operator."""

from __future__ import annotations

import pytest
import torch

import fastmask
from fastmask import reference, uncertain_points
from fastmask.reference.points import matched_logits
from fastmask.testing import simd_level, simd_levels
from tests.helpers.inputs import SHAPES, random_assignment, random_logits, random_targets
from tests.helpers.levels import ROOT, compile_for, is_foreign, run_for


def inputs_of(shape, generator):
    targets = random_targets(shape, generator, "masks")
    return random_logits(shape, generator)[1], random_assignment(shape, targets, generator)


def draw(mask_logits, *arguments, seed=7, **options):
    draws = torch.Generator(mask_logits.device).manual_seed(seed)
    return uncertain_points(mask_logits, *arguments, generator=draws, **options)


def seed_of(generator_seed=7, device="cpu"):
    """What ``uncertain_points`` draws from a generator of the device."""
    draws = torch.Generator(device).manual_seed(generator_seed)
    return torch.randint(2**63 - 1, (1,), generator=draws, device=device)


@pytest.mark.parametrize("level", simd_levels())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_simd_level_and_dtype_gives_the_points_of_the_reference(level, dtype, generator):
    mask_logits, assignment = inputs_of(SHAPES["usual"], generator)
    mask_logits = mask_logits.to(dtype)
    with simd_level(level):
        points = draw(mask_logits, assignment, 200, backend="native")
    # Positions on a grid of powers of two are exact, so that no near tie is decided otherwise.
    assert torch.equal(points, draw(mask_logits.float(), assignment, 200, backend="reference"))


@pytest.mark.parametrize("level", sorted({"neon", *simd_levels()}))
def test_bound_that_leaves_out_too_many_candidates_changes_nothing(level, tmp_path):
    static = ["-static"] if is_foreign(level) else []
    flags = ["-O1", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
    source = ROOT / "tests" / "helpers" / "candidate_bound.cpp"
    compile_for(level, tmp_path, *flags, *static, source, "-o", "candidate_bound")
    result = run_for(level, [tmp_path / "candidate_bound"])
    assert result.stdout == "0 other points, 3 bounds too low\n"


def test_ties_go_to_the_earlier_candidates():
    mask_logits = torch.zeros(1, 1, 1, 8, 8)
    points = draw(mask_logits, torch.zeros(1, 1, 1, dtype=torch.int64), 40)
    stream = reference.random_points(seed_of(), 1, 130)
    assert torch.equal(points[0, 0, 0], torch.cat([stream[0, :30], stream[0, 120:]]))


@pytest.mark.parametrize("backend", ["native", "triton"], indirect=True)
def test_nan_is_most_uncertain(backend):
    mask_logits = torch.full((1, 1, 1, 16, 16), 3.0)
    mask_logits[..., 8:, :] = float("nan")
    points = draw(
        mask_logits, torch.zeros(1, 1, 1, dtype=torch.int64), 100, importance_sample_ratio=1.0, backend=backend
    )
    assert (points[..., 1] > 7 / 16).all()


@pytest.mark.parametrize("value", [None, 2.5, float("nan")])
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_bounds_that_fail_and_programs_of_several_pairs(value, backend, generator, monkeypatch):
    """Bounds without a margin seldom hold. Without them, a program keeps more candidates than its registers hold; so it
    does where most logits are equal."""
    from fastmask.kernels import uncertain_points as kernels

    config = kernels.UncertainPointsConfig(lanes=32, programs=2, chunk=64, deviations=0.0, num_warps=1)
    monkeypatch.setattr(kernels, "CONFIGS", {None: config})
    mask_logits = random_logits((1, 2, 3, 3, 3, 8, 8, 8, 8), generator)[1]
    if value is not None:
        mask_logits[..., 1:-1, 1:-1] = value
    assignment = torch.tensor([[[0, -1, 2], [1, 0, 2]]])
    points = draw(mask_logits, assignment, 101, backend=backend)
    expected = draw(mask_logits, assignment, 101, backend="reference")
    if value is None:
        assert torch.equal(points.sort(-2).values, expected.sort(-2).values)
    assert torch.equal(points[..., 75:, :], expected[..., 75:, :])
    maps = matched_logits(mask_logits, assignment)
    samples = [reference.sample_points(maps, x).abs().sort(-1).values for x in (points, expected)]
    torch.testing.assert_close(*samples, equal_nan=True)


def test_the_generator_decides(generator):
    inputs = inputs_of(SHAPES["usual"], generator)
    first = draw(*inputs, 50)
    assert torch.equal(first, draw(*inputs, 50))
    assert not torch.equal(first, draw(*inputs, 50, seed=8))
    torch.manual_seed(7)
    assert torch.equal(first, uncertain_points(*inputs, 50))
    assert not torch.equal(first, uncertain_points(*inputs, 50))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize(
    ("options", "counts"),
    [({}, (101, 303, 75)), ({"oversample_ratio": 7.3, "importance_sample_ratio": 0.31}, (64, 467, 19))],
)
def test_the_choice_is_that_of_the_seed(options, counts, device, generator):
    """Of the operator, whose choice the battery checks."""
    mask_logits, assignment = (x.to(device) for x in inputs_of(SHAPES["usual"], generator))
    expected = torch.ops.fastmask.uncertain_points(mask_logits, assignment, seed_of(device=device), *counts)
    assert torch.equal(draw(mask_logits, assignment, counts[0], **options), expected)


def test_leading_dimensions(generator):
    mask_logits, assignment = inputs_of(SHAPES["usual"], generator)
    assert torch.equal(draw(mask_logits[0], assignment[0], 60), draw(mask_logits, assignment, 60)[0])


def test_no_gradient(generator):
    mask_logits, assignment = inputs_of(SHAPES["usual"], generator)
    assert not draw(mask_logits.requires_grad_(), assignment, 10).requires_grad


def test_compiles_to_one_graph(generator):
    mask_logits, assignment = inputs_of(SHAPES["odd sizes"], generator)
    compiled = torch.compile(uncertain_points, fullgraph=True, backend="aot_eager")
    torch.manual_seed(3)
    expected = uncertain_points(mask_logits, assignment, 30)
    torch.manual_seed(3)
    assert torch.equal(compiled(mask_logits, assignment, 30), expected)


BAD_ARGUMENTS = {
    "no points": (lambda m, a: (m, a, 0), {}, ValueError, "num_points must be at least 1"),
    "too few candidates": (lambda m, a: (m, a), {"oversample_ratio": 0.5}, ValueError, "oversample_ratio must be"),
    "more than all": (lambda m, a: (m, a), {"importance_sample_ratio": 1.5}, ValueError, "importance_sample_ratio"),
    "NaN": (lambda m, a: (m, a), {"oversample_ratio": float("nan")}, ValueError, "oversample_ratio must be"),
    "another number of images": (lambda m, a: (m, a[:, :1]), {}, ValueError, "assignment has shape"),
    "an assignment of one number": (lambda m, a: (m, a[0, 0, 0]), {}, ValueError, "assignment has shape"),
    "float assignment": (lambda m, a: (m, a.float()), {}, TypeError, "assignment must have dtype int64"),
    "query beyond N": (lambda m, a: (m, a + 20), {}, ValueError, "assignment holds"),
    "integer logits": (lambda m, a: (m.int(), a), {}, TypeError, "mask_logits must be floating point"),
    "maps without pixels": (lambda m, a: (m[..., :0], a), {}, ValueError, "at least one pixel"),
}


@pytest.mark.parametrize(("change", "options", "error", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments(change, options, error, message, generator):
    with pytest.raises(error, match=message):
        fastmask.uncertain_points(*change(*inputs_of(SHAPES["usual"], generator)), **options)
