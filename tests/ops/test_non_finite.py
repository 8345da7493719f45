"""NaN and infinite logits: every backend of every operator follows the reference in float64.

The rules:

- A logit without weight in a resampled pixel or point is not read: not even NaN changes what lies beside it.
- Masked attention: a key that reads NaN or -inf is background, else one that reads +inf is foreground.
- Losses: what counts and is not finite makes its own pair's losses NaN or infinite, and no other's. An infinite logit
  on its pixel's right side costs nothing where the loss is over pixels.
- Costs: a NaN makes its query's costs NaN, an infinite logit may do so; such pairs are assigned last.
- Inference: infinite logits are large, and a query wins nowhere where it reads a NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

import fastmask
from fastmask import MaskTerm, Targets
from fastmask.testing import assert_within_budget
from tests.helpers.attention_operator import attended_keys
from tests.helpers.backends import KERNELS, kernels
from tests.helpers.inputs import random_assignment, random_logits, random_points, random_targets

INF, NAN = torch.inf, torch.nan
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
AT_POINTS = pytest.mark.parametrize("at_points", [False, True], ids=["all pixels", "points"])


def shares(i: int, inputs: int, outputs: int) -> list[tuple[int, Fraction]]:
    """The inputs that output i is made of, and their shares, without rounding."""
    position = max(Fraction((2 * i + 1) * inputs - outputs, 2 * outputs), Fraction(0))
    first = min(int(position), inputs - 1)
    rest = position - first
    return [(first, 1 - rest), (first + 1, rest)] if rest > 0 and first + 1 < inputs else [(first, Fraction(1))]


def resampled(plane: Tensor, size: tuple[int, int]) -> Tensor:
    """One map (h, w), one sum of products at a time."""
    rows, columns = ([shares(i, *sides) for i in range(sides[1])] for sides in zip(plane.shape, size, strict=True))
    values = plane.double().tolist()
    means = torch.zeros(size, dtype=torch.float64)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            means[i, j] = sum(float(a * b) * values[y][x] for y, a in row for x, b in column)
    return means


def sprinkled(shape: tuple[int, ...], generator: torch.Generator, *values: float, share: float = 0.1) -> Tensor:
    """Random logits, a share of them each of the values."""
    logits = 4 * torch.randn(shape, generator=generator)
    for value in values:
        logits[torch.rand(shape, generator=generator) < share] = value
    return logits


def attended(mask_logits: Tensor, grid: tuple[int, int], backend: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """(N, S) bool: with queries of zeros the attended keys weigh the same, and the values are the keys' numbers."""
    v = torch.eye(grid[0] * grid[1], dtype=dtype)[None]
    q = v.new_zeros(1, mask_logits.shape[1], v.shape[2])
    out = fastmask.masked_attention(q, torch.zeros_like(v), v, mask_logits, grid=grid, num_heads=1, backend=backend)
    return out[0] > 0


def attended_bits(mask_logits: Tensor, grid: tuple[int, int], backend: str) -> Tensor:
    """The same; of Triton's kernels only the one that finds them, as all would take the interpreter minutes."""
    if backend == "triton":
        return attended_keys(mask_logits, None, grid, 32)[0][0]
    return attended(mask_logits, grid, backend, torch.float64 if backend == "reference" else torch.float32)


@pytest.mark.parametrize("name", ["reference", *KERNELS])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        ([2, -INF], [True, False]),
        ([2, NAN], [True, False]),
        ([-3, 70000], [False, True]),  # +inf in float16
        ([-3, INF], [False, True]),
        ([INF, INF], [True, True]),
        ([INF, -INF], [True, False]),
        ([NAN, INF], [False, True]),
        ([-INF, NAN], [True, True]),  # nothing is foreground: all keys
    ],
)
def test_an_attended_key_leaves_its_neighbor_alone(logits, expected, dtype, name):
    mask_logits = torch.tensor(logits, dtype=torch.float32).to(dtype)
    for shape, grid in (((1, 1, 1, 2), (1, 2)), ((1, 1, 2, 1), (2, 1))):
        with kernels(name) as backend:
            assert attended_bits(mask_logits.view(shape), grid, backend)[0].tolist() == expected


@pytest.mark.parametrize("name", ["reference", *KERNELS])
@pytest.mark.parametrize(
    ("grid", "size"),
    [
        ((9, 9), (9, 9)),
        ((3, 5), (9, 15)),
        ((6, 10), (3, 5)),
        ((9, 6), (3, 2)),
        ((5, 4), (20, 16)),
        ((7, 9), (3, 5)),
        ((5, 8), (10, 16)),
        ((3, 8), (6, 32)),
        ((2, 8), (16, 64)),
    ],
)
def test_attended_keys_read_what_has_weight(grid, size, name, generator):
    for dtype in DTYPES:
        mask_logits = sprinkled((1, 9, *size), generator, INF, -INF, NAN).to(dtype)
        samples = torch.stack([resampled(plane, grid) for plane in mask_logits[0]]).flatten(1)
        expected = samples >= 0
        expected[~expected.any(-1)] = True
        clear = ~(samples.abs() < 1e-3)
        with kernels(name) as backend:
            actual = attended_bits(mask_logits, grid, backend)
        assert clear.float().mean() > 0.9
        assert torch.equal(actual[clear], expected[clear])


@pytest.mark.parametrize("name", KERNELS)
def test_weights_of_zero_are_exactly_that(name):
    """Sizes whose positions are whole numbers that neither float32 nor float64 computes: 49 of 1 in the middle, ..."""
    for inputs, outputs in ((98, 2), (49, 1), (103, 1), (182, 2), (147, 3), (22, 6)):
        mask_logits = torch.full((1, outputs, 1, inputs), -INF)
        whole = []
        for i in range(outputs):
            read = shares(i, inputs, outputs)
            mask_logits[0, i, 0, [x for x, _ in read]] = 1
            whole += [i] if len(read) == 1 else []
        assert whole
        with kernels(name) as backend:
            for i in whole:
                found = attended_bits(mask_logits[:, i : i + 1], (1, outputs), backend)[0]
                assert found.nonzero().flatten().tolist() == [i]


# (L, B, N, K, M, h, w, H, W)
PIXELS = {
    "three and two times larger": (1, 2, 6, 3, 3, 5, 7, 15, 14),
    "the logits' size": (1, 2, 6, 3, 3, 9, 8, 9, 8),
    "smaller": (1, 2, 6, 3, 3, 15, 14, 5, 7),
}


class Pairs:
    """Logits, targets and the query of each target; corrupted in the first image's first pair, and in a query without
    a target."""

    def __init__(self, shape: tuple[int, ...], generator: torch.Generator, form: str = "masks") -> None:
        self.targets = random_targets(shape, generator, form)
        self.class_logits, self.mask_logits = random_logits(shape, generator)
        self.assignment = random_assignment(shape, self.targets, generator)
        self.points = random_points(generator, *self.assignment.shape, 60)
        self.shared = random_points(generator, shape[1], 60)
        image = shape[1] - 1  # it has all targets
        self.query = int(self.assignment[0, image, 0])
        self.other = next(n for n in range(shape[2]) if n not in self.assignment[0, image])

    def put(self, value: float) -> Pairs:
        self.mask_logits[0, -1, self.query, 1, 2] = value
        self.mask_logits[0, -1, self.other] = value
        return self


def losses(pairs: Pairs, dtype: torch.dtype, backend: str, at_points: bool, **options):
    """Both losses of each pair, and the gradient of each pair's sum in the logits of its query."""
    logits = pairs.mask_logits.to(dtype).requires_grad_()
    options |= {"points": pairs.points if at_points else None, "reduction": "none", "backend": backend}
    results = fastmask.mask_loss(logits, pairs.targets, pairs.assignment, **options)
    (gradient,) = torch.autograd.grad(sum(x.sum() for x in results), logits)
    return *(x.detach() for x in results), gradient


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("shape", PIXELS.values(), ids=PIXELS)
@AT_POINTS
def test_losses(at_points, shape, value, name, generator):
    cases = [("masks", {"kind": "bce"}), ("segments", {}), ("masks+valid", {"gamma": 0.5})]
    if name == "triton":  # one of them for each shape and each value, for the interpreter's sake
        cases = [cases[(list(PIXELS.values()).index(shape) + [NAN, INF, -INF].index(value)) % 3]]
    for form, options in cases:
        pairs = Pairs(shape, generator, form).put(value)
        options = {"term": MaskTerm(**options, ignore_void=True)}
        with kernels(name) as backend:
            actual = losses(pairs, torch.float32, backend, at_points, **options)
        same, exact = (
            losses(pairs, dtype, "reference", at_points, **options) for dtype in (torch.float32, torch.float64)
        )
        finite = exact[0].isfinite() & exact[1].isfinite()
        others = torch.ones_like(finite)
        others[0, -1, 0] = False
        assert finite[others].all()
        for x, y, z, what in zip(actual[:2], same, exact, ("mask", "dice"), strict=False):
            if at_points:  # of t F+ + (v - t) F- rounding decides whether it is NaN or inf
                assert torch.equal(x.isfinite(), z.isfinite())
                x, y, z = (result[z.isfinite()] for result in (x, y, z))
            assert_within_budget(x, y, z, name=what)
        # Queries of pairs whose losses are finite.
        rows = torch.ones(exact[2].shape[:3], dtype=torch.bool)
        if not finite.all():
            rows[0, -1, pairs.query] = False
        assert_within_budget(*(x[2][rows] for x in (actual, same, exact)), name="gradient")


@pytest.mark.parametrize("name", ["reference", *KERNELS])
@pytest.mark.parametrize("term", [MaskTerm("bce"), *(MaskTerm(gamma=gamma) for gamma in (2.0, 0.0, 0.5, 3.0))], ids=str)
@pytest.mark.parametrize("size", [(6, 8), (2, 3), (6, 9)], ids=str)
def test_infinite_logits_on_the_right_side_cost_nothing(size, term, name, generator):
    """The target's upper half: of logits that are infinite but for two rows beside its border."""
    targets = Targets.from_segments(torch.zeros(1, *size, dtype=torch.uint8), [torch.tensor([0])])
    targets.segments[:, size[0] // 2 :] = 255
    logits = torch.cat([torch.full((1, 1, 1, 3), INF), torch.full((1, 1, 1, 3), -INF)], 2)
    if size[0] > 2:  # between an infinity and the other lies NaN
        logits = torch.cat([logits[:, :, :1], torch.randn(1, 1, 2, 3, generator=generator) / 4, logits[:, :, 1:]], 2)
    logits.requires_grad_()
    with kernels(name) as backend:
        loss, dice = fastmask.mask_loss(
            logits, targets, torch.zeros(1, 1, dtype=torch.int64), term=term, backend=backend
        )
        (gradient,) = torch.autograd.grad(loss + dice, logits)
    assert loss.isfinite()
    assert dice.isfinite()
    assert gradient.isfinite().all()
    # Kernels know no exponential below 2^-126.
    assert gradient[logits.isinf()].abs().max() < 1e-37
    if size[0] == 2:
        assert loss.item() < 1e-37
        assert dice.item() == 0


@pytest.mark.parametrize("name", ["reference", *KERNELS])
@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.5, 1.0, 2.0, 3.0])
def test_the_focal_loss_of_saturated_logits(gamma, name, generator):
    """Value and gradient at logits up to 1e4 of either sign, from formulas of x as decimal numbers have them."""
    x = torch.tensor([0.0, 1, 20, 80, 86, 88, 90, 103, 104, 700, 745, 1e3, 1e4])
    x = torch.cat([x, -x])
    mask_logits = x.view(1, 1, 1, -1)
    masks = torch.ones(1, 1, len(x), dtype=torch.uint8)
    assignment = torch.zeros(1, 1, dtype=torch.int64)
    points = (torch.arange(len(x)) + 0.5)[:, None] / len(x) * torch.tensor([1.0, 0.0]) + torch.tensor([0.0, 0.5])
    z = x.double()
    cross_entropy, q = -torch.nn.functional.logsigmoid(z), torch.sigmoid(-z)
    expected = 0.25 * q**gamma * cross_entropy
    slope = -0.25 * q**gamma * (gamma * torch.sigmoid(z) * cross_entropy + q) / len(x)
    targets = Targets.from_list([{"labels": torch.tensor([0]), "masks": masks}])
    for where in (None, points[None, None]):
        for dtype in (torch.float64,) if name == "reference" else (torch.float32,):
            logits = mask_logits.to(dtype).requires_grad_()
            with kernels(name) as backend:
                loss, _ = fastmask.mask_loss(
                    logits, targets, assignment, where, term=MaskTerm(gamma=gamma), backend=backend
                )
                (gradient,) = torch.autograd.grad(loss, logits)
            torch.testing.assert_close(loss.double().item(), expected.mean().item(), rtol=1e-5, atol=0)
            torch.testing.assert_close(gradient.double().flatten(), slope, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@AT_POINTS
def test_costs(at_points, value, name, generator):
    for form, kind in (("masks", "bce"), ("segments", "focal")):
        pairs = Pairs(PIXELS["three and two times larger"], generator, form).put(value)
        pairs.class_logits[0, 0, 2, 1] = value
        inputs = pairs.class_logits, pairs.mask_logits
        rest = pairs.targets, pairs.shared if at_points else None
        with kernels(name) as backend:
            actual = fastmask.mask_cost(*inputs, *rest, backend=backend, term=MaskTerm(kind))
        if value == value:
            touched = torch.zeros(actual.shape[:3], dtype=torch.bool)
            touched[0, -1, [pairs.query, pairs.other]] = True
            touched[0, 0, 2] = value > 0  # of which softmax makes NaN
            assert actual[~touched].isfinite().all()
            # Where a kernel has a number, it is the one that large logits tend to.
            inputs = pairs.class_logits, pairs.mask_logits.clamp(-1e6, 1e6)
        same, exact = (
            fastmask.mask_cost(*(x.to(dtype) for x in inputs), *rest, backend="reference", term=MaskTerm(kind))
            for dtype in (torch.float32, torch.float64)
        )
        judged = torch.ones_like(exact, dtype=torch.bool) if value != value else actual.isfinite()
        assert_within_budget(*(x[judged] for x in (actual, same, exact)))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("function", [fastmask.mask_cost, fastmask.mask_loss], ids=lambda f: f.__name__)
def test_points_on_pixels_read_no_neighbor(function, name, generator):
    """Points on the centers of the logits of every other row and column, the rest of which is NaN or infinite."""
    shape = (1, 1, 3, 2, 2, 8, 8, 8, 8)
    centers = (torch.arange(0, 8, 2) + 0.5) / 8
    points = torch.cartesian_prod(centers, centers)
    for value in (NAN, INF, -INF):
        targets = random_targets(shape, generator, "segments")
        class_logits, mask_logits = random_logits(shape, generator)
        assignment = torch.tensor([[[2, 0]]])
        poisoned = torch.full_like(mask_logits, value)
        poisoned[..., ::2, ::2] = mask_logits[..., ::2, ::2]
        results = []
        for logits in (poisoned, mask_logits):
            for each in (name, "reference"):
                with kernels(each) as backend:
                    options = {"term": MaskTerm("bce"), "backend": backend}
                    if function is fastmask.mask_cost:
                        result = function(class_logits, logits, targets, points[None], **options)
                    else:
                        own = points.expand(1, 1, 2, -1, -1)
                        pairs = function(logits, targets, assignment, own, reduction="none", **options)
                        result = torch.stack(pairs)
                results.append(result)
        assert torch.equal(results[0], results[2])
        assert torch.equal(results[1], results[3])
        assert results[0].isfinite().all()


@pytest.mark.parametrize("name", KERNELS)
def test_uncertain_points(name, generator):
    """NaN is the most uncertain, infinity the least: the choice is the reference's."""
    mask_logits = sprinkled((1, 1, 3, 6, 7), generator, INF, -INF, NAN, share=0.05)
    assignment = torch.tensor([[[1, 2, -1]]])

    def choose(logits: Tensor, backend: str) -> Tensor:
        seed = torch.Generator().manual_seed(7)
        options = {"oversample_ratio": 4.0, "importance_sample_ratio": 0.8, "generator": seed, "backend": backend}
        return fastmask.uncertain_points(logits, assignment, 50, **options)

    with kernels(name) as backend:
        actual = choose(mask_logits, backend)
    exact = choose(mask_logits.double(), "reference")
    for points, wanted in zip(actual.flatten(0, -3).tolist(), exact.flatten(0, -3).tolist(), strict=True):
        assert sorted(points) == sorted(wanted)


def corrupt_class_logits(class_logits: Tensor, mask_logits: Tensor, value: float) -> None:
    class_logits[0, 2, 1] = value


def corrupt_queries(class_logits: Tensor, mask_logits: Tensor, value: float) -> None:
    mask_logits[0, 1] = value


def corrupt_logits(class_logits: Tensor, mask_logits: Tensor, value: float) -> None:
    mask_logits[1, 0, 2, 3] = value
    mask_logits[1, 3, 4:6, 1] = value


INFERENCE = {
    "semantic labels": lambda c, m, size, **o: fastmask.semantic_inference(c, m, size, **o),
    "semantic scores": lambda c, m, size, **o: fastmask.semantic_inference(c, m, size, output="scores", **o),
    "scores first": lambda c, m, size, **o: fastmask.semantic_inference(
        c, m, size, order="scores", output="scores", **o
    ),
    "panoptic": lambda c, m, size, **o: [x for x, _ in fastmask.panoptic_inference(c, m, size, threshold=0.3, **o)],
    "panoptic, huggingface": lambda c, m, size, **o: [
        x for x, _ in fastmask.panoptic_inference(c, m, size, threshold=0.3, rule="huggingface", **o)
    ],
    "general": lambda c, m, size, **o: fastmask.functional.general_inference(c, m, size, **o),
    "instance": lambda c, m, size, **o: [
        x[key].double() for x in fastmask.instance_inference(c, m, size, top_k=6, **o) for key in ("masks", "scores")
    ],
}


def corruptions() -> Iterator[Any]:
    """Each with each value; of Triton's kernels one infinity each is slow."""
    for corrupt, spared in ((corrupt_class_logits, INF), (corrupt_queries, -INF), (corrupt_logits, INF)):
        for value in (NAN, INF, -INF):
            for name in KERNELS:
                marks = [pytest.mark.slow] if name == "triton" and value == spared else []
                yield pytest.param(corrupt, value, name, id=f"{corrupt.__name__}-{value}-{name}", marks=marks)


@pytest.mark.parametrize(("corrupt", "value", "name"), corruptions())
@pytest.mark.parametrize("operator", INFERENCE.values(), ids=INFERENCE)
def test_inference(operator, corrupt, value, name, generator):
    class_logits = 2 * torch.randn(2, 5, 4, generator=generator)
    mask_logits = 3 * torch.randn(2, 5, 6, 7, generator=generator)
    corrupt(class_logits, mask_logits, value)
    sizes = [(18, 14), (6, 7)]
    for size in sizes if name != "triton" else [sizes[value == INF]]:  # one, for the interpreter's sake
        with kernels(name) as backend:
            actual = operator(class_logits, mask_logits, size, backend=backend)
        exact = operator(class_logits.double(), mask_logits.double(), size, backend="reference")
        for x, y in zip(actual, exact, strict=True):
            torch.testing.assert_close(x.double(), y.double(), rtol=0, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
def test_general_inference_of_a_query_without_a_score(value, generator):
    """The reference in float64: a query whose class is NaN takes no pixel from the others."""
    class_logits = 2 * torch.randn(1, 4, 4, generator=generator, dtype=torch.float64)
    mask_logits = torch.randn(1, 4, 6, 7, generator=generator, dtype=torch.float64)
    class_logits[..., -1] = -9
    expected = fastmask.functional.general_inference(class_logits[:, 1:], mask_logits[:, 1:], (12, 14))
    class_logits[0, 0, 0] = NAN
    mask_logits[0, 0] = value
    assert torch.equal(fastmask.functional.general_inference(class_logits, mask_logits, (12, 14)), expected)
    assert (expected != 255).all()


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
def test_assignment(value, generator):
    """A query of such costs gets a target only where there is no other."""
    cost = torch.randn(2, 5, 3, generator=generator)
    cost[0, 1], cost[1, :, 2] = value, value
    for matching in (fastmask.assign(cost), fastmask.assign(cost.double(), backend="reference")):
        assert 1 not in matching[0]
        assert matching[1, 2] >= 0
        pairs = cost[0].gather(0, matching[:1]).sum()
        assert torch.equal(pairs, cost[0].gather(0, fastmask.reference.assign(cost[:1])).sum())


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
def test_class_loss(value, generator):
    pairs = Pairs(PIXELS["smaller"], generator)
    pairs.class_logits[0, 0, 1, 2] = value
    actual = fastmask.class_loss(pairs.class_logits, pairs.targets, pairs.assignment)
    same, exact = (
        fastmask.reference.class_loss(pairs.class_logits.to(dtype), pairs.targets.labels, pairs.assignment)
        for dtype in (torch.float32, torch.float64)
    )
    assert_within_budget(actual, same, exact)
