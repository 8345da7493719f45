from __future__ import annotations

import pytest
import torch

import fastmask
from fastmask import reference, uncertain_points
from fastmask.testing import simd_level, simd_levels
from tests.helpers.inputs import SHAPES, at_odd_address, random_assignment, random_logits, random_targets
from tests.helpers.mask_operators import POINT_SHAPES, SMALLER
from tests.helpers.op_info import DTYPES, HALVES


def inputs_of(shape, generator):
    targets = random_targets(shape, generator, "masks")
    return random_logits(shape, generator)[1], random_assignment(shape, targets, generator)


def draw(*arguments, seed=7, **options):
    return uncertain_points(*arguments, generator=torch.Generator().manual_seed(seed), **options)


def seed_of(generator_seed=7):
    """What ``uncertain_points`` draws from a generator of the CPU."""
    return torch.randint(2**63 - 1, (1,), generator=torch.Generator().manual_seed(generator_seed))


def check_choice(
    points, mask_logits, assignment, num_points, oversample_ratio=3.0, importance_sample_ratio=0.75, stream_seed=None
):
    """Candidates and others are those of the reference's stream, and no candidate left out is clearly less certain."""
    candidates, uncertain = int(oversample_ratio * num_points), int(importance_sample_ratio * num_points)
    seed = seed_of() if stream_seed is None else stream_seed
    stream = reference.random_points(seed, assignment.numel(), candidates + num_points - uncertain)
    matched = assignment.flatten() >= 0
    assert points.shape == (*assignment.shape, num_points, 2)
    points = points.view(-1, num_points, 2)
    assert not points[~matched].any()
    assert torch.equal(points[matched, uncertain:], stream[matched, candidates:])
    logits = torch.take_along_dim(mask_logits.double(), assignment.clamp(min=0)[..., None, None], -3).flatten(0, 2)
    certainty = reference.sample_points(logits, stream[:, :candidates].double()).abs()
    rounding = 1e-6 * logits.abs().amax((1, 2))
    for row in matched.nonzero().squeeze(1).tolist():
        chosen = (stream[row, :candidates, None] == points[row, None, :uncertain]).all(-1).any(1)
        assert chosen.sum() == uncertain
        if 0 < uncertain < candidates:
            assert certainty[row, chosen].max() <= certainty[row, ~chosen].min() + rounding[row]


@pytest.mark.parametrize(
    ("shape", "num_points", "backend"),
    [
        *(pytest.param(shape, 101, "native", id=f"native-{name}") for name, shape in SHAPES.items()),
        *(pytest.param(shape, 90, "triton", id=f"triton-{name}") for name, shape in POINT_SHAPES.items()),
        pytest.param(SMALLER, 1, "triton", id="triton-one point"),
    ],
    indirect=["backend"],
)
def test_the_choice(shape, num_points, backend, generator):
    inputs = inputs_of(shape, generator)
    check_choice(draw(*inputs, num_points, backend=backend), *inputs, num_points)


@pytest.mark.parametrize("backend", ["native", "triton"], indirect=True)
@pytest.mark.parametrize("dtype", HALVES)
def test_the_choice_by_half_precision_logits(dtype, backend, generator):
    """Many logits are equally sure, and any of those may be taken."""
    mask_logits, assignment = inputs_of(SMALLER, generator)
    mask_logits = at_odd_address(mask_logits.to(dtype))
    check_choice(draw(mask_logits, assignment, 90, backend=backend), mask_logits, assignment, 90)


@pytest.mark.parametrize(
    ("num_points", "backend"),
    [(1, "native"), (2, "native"), (64, "native"), (500, "native"), (64, "triton")],
    indirect=["backend"],
)
@pytest.mark.parametrize("options", [(1.0, 0.5), (2.5, 1.0), (3.0, 0.0), (7.3, 0.31), (1.0, 1.0), (1.0, 0.0)])
def test_ratios_and_numbers(options, num_points, backend, generator):
    inputs = inputs_of((1, 2, 5, 3, 3, 11, 14, 20, 20), generator)
    ratios = {"oversample_ratio": options[0], "importance_sample_ratio": options[1]}
    check_choice(draw(*inputs, num_points, backend=backend, **ratios), *inputs, num_points, **ratios)


@pytest.mark.parametrize("level", simd_levels())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_simd_level_and_dtype_gives_the_points_of_the_reference(level, dtype, generator):
    mask_logits, assignment = inputs_of(SHAPES["usual"], generator)
    mask_logits = mask_logits.to(dtype)
    with simd_level(level):
        points = draw(mask_logits, assignment, 200, backend="native")
    check_choice(points, mask_logits, assignment, 200)
    # Positions on a grid of powers of two are exact, so that no near tie is decided otherwise.
    assert torch.equal(points, draw(mask_logits.float(), assignment, 200, backend="reference"))


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


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_choice_on_a_gpu(shape, dtype, generator):
    """The seed is drawn by the device's own generator."""
    mask_logits, assignment = inputs_of(shape, generator)
    mask_logits = mask_logits.to(dtype)
    seed = torch.randint(2**63 - 1, (1,), generator=torch.Generator("cuda").manual_seed(7), device="cuda").cpu()
    draws = torch.Generator("cuda").manual_seed(7)
    points = uncertain_points(mask_logits.cuda(), assignment.cuda(), 101, generator=draws)
    check_choice(points.cpu(), mask_logits, assignment, 101, stream_seed=seed)


def test_the_generator_decides(generator):
    inputs = inputs_of(SHAPES["usual"], generator)
    first = draw(*inputs, 50)
    assert torch.equal(first, draw(*inputs, 50))
    assert not torch.equal(first, draw(*inputs, 50, seed=8))
    torch.manual_seed(7)
    assert torch.equal(first, uncertain_points(*inputs, 50))
    assert not torch.equal(first, uncertain_points(*inputs, 50))


def test_the_number_of_threads_does_not_matter(generator):
    inputs = inputs_of(SHAPES["usual"], generator)
    first = draw(*inputs, 300)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(first, draw(*inputs, 300))
    finally:
        torch.set_num_threads(threads)


def test_strides_and_leading_dimensions(generator):
    mask_logits, assignment = inputs_of(SHAPES["usual"], generator)
    expected = draw(mask_logits, assignment, 60)
    for strided in (mask_logits.mT.contiguous().mT, mask_logits.transpose(0, 1).contiguous().transpose(0, 1)):
        assert torch.equal(draw(strided, assignment.mT.contiguous().mT, 60), expected)
    assert torch.equal(draw(mask_logits[0], assignment[0], 60), expected[0])


def test_no_gradient(generator):
    mask_logits, assignment = inputs_of(SHAPES["usual"], generator)
    assert not draw(mask_logits.requires_grad_(), assignment, 10).requires_grad


def test_opcheck(generator):
    mask_logits, assignment = inputs_of((1, 2, 4, 3, 2, 5, 6, 11, 13), generator)
    arguments = mask_logits, assignment, torch.tensor([3]), 20, 60, 15
    torch.library.opcheck(torch.ops.fastmask.uncertain_points.default, arguments)


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
