from __future__ import annotations

import pytest
import torch

import fastmask
from fastmask import MaskTerm, Targets, mask_cost
from fastmask.testing import assert_within_budget, simd_level, simd_levels
from tests.helpers.inputs import SHAPES, TERMS, random_logits, random_targets

FORMS = ("segments", "masks", "masks+valid")
WEIGHTS = {"cost_class": 1.0, "cost_mask": 20.0, "cost_dice": 1.0}


def check_against_reference(class_logits, mask_logits, targets, **options):
    rounded = class_logits.float(), mask_logits.float()
    exact = mask_cost(rounded[0].double(), rounded[1].double(), targets, backend="reference", **options)
    same_dtype = mask_cost(*rounded, targets, backend="reference", **options)
    actual = mask_cost(class_logits, mask_logits, targets, backend="native", **options)
    assert actual.dtype == torch.float32
    assert_within_budget(actual, same_dtype, exact, name="cost")
    return actual


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("ignore_void", [False, True])
def test_equals_the_reference(shape, form, ignore_void, generator):
    class_logits, mask_logits = random_logits(shape, generator)
    targets = random_targets(shape, generator, form)
    check_against_reference(class_logits, mask_logits, targets, term=MaskTerm(ignore_void=ignore_void), **WEIGHTS)


@pytest.mark.parametrize("term", TERMS, ids=str)
def test_terms(term, generator):
    class_logits, mask_logits = random_logits(SHAPES["odd sizes"], generator)
    targets = random_targets(SHAPES["odd sizes"], generator, "segments")
    check_against_reference(class_logits, mask_logits, targets, **WEIGHTS, term=term)


@pytest.mark.parametrize("only", ["cost_class", "cost_mask", "cost_dice"])
def test_each_term_alone(only, generator):
    class_logits, mask_logits = random_logits(SHAPES["usual"], generator)
    targets = random_targets(SHAPES["usual"], generator, "masks")
    weights = {name: float(name == only) for name in WEIGHTS}
    check_against_reference(class_logits, mask_logits, targets, **weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits(dtype, generator):
    class_logits, mask_logits = random_logits(SHAPES["odd sizes"], generator)
    targets = random_targets(SHAPES["odd sizes"], generator, "segments")
    check_against_reference(class_logits.to(dtype), mask_logits.to(dtype), targets, **WEIGHTS)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
def test_wide_segment_maps(dtype, generator):
    shape = (1, 2, 5, 4, 300, 20, 20, 40, 40)
    class_logits, mask_logits = random_logits(shape, generator)
    targets = random_targets(shape, generator, "segments", dtype=dtype)
    check_against_reference(class_logits, mask_logits, targets, term=MaskTerm(ignore_void=True), **WEIGHTS)


@pytest.mark.parametrize("scale", [30.0, 200.0])
def test_saturated_logits(scale, generator):
    class_logits, mask_logits = random_logits(SHAPES["odd sizes"], generator, scale=scale)
    targets = random_targets(SHAPES["odd sizes"], generator, "masks")
    check_against_reference(class_logits * scale, mask_logits, targets, **WEIGHTS)


@pytest.mark.parametrize("level", simd_levels())
def test_every_simd_level(level, generator):
    class_logits, mask_logits = random_logits(SHAPES["odd sizes"], generator)
    targets = random_targets(SHAPES["odd sizes"], generator, "masks+valid")
    with simd_level(level):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            check_against_reference(
                class_logits.to(dtype), mask_logits.to(dtype), targets, term=MaskTerm(ignore_void=True), **WEIGHTS
            )


def test_non_contiguous_inputs(generator):
    class_logits, mask_logits = random_logits(SHAPES["odd sizes"], generator)
    targets = random_targets(SHAPES["odd sizes"], generator, "segments")
    expected = mask_cost(class_logits, mask_logits, targets, backend="native")
    transposed = mask_logits.transpose(-1, -2).contiguous().transpose(-1, -2)
    strided = class_logits.repeat_interleave(2, -1)[..., ::2]
    flipped = Targets(targets.labels, targets.counts, segments=targets.segments.mT.contiguous().mT, void=targets.void)
    assert not transposed.is_contiguous()
    assert not strided.is_contiguous()
    assert torch.equal(mask_cost(strided, transposed, flipped, backend="native"), expected)


def test_layers_inside_images_are_read_in_place(generator):
    """As a model lays them out that makes all layers' masks of an image in one product."""
    class_logits, mask_logits = random_logits(SHAPES["usual"], generator)
    targets = random_targets(SHAPES["usual"], generator, "segments")
    strided = mask_logits.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    assert torch.equal(mask_cost(class_logits, strided, targets), mask_cost(class_logits, mask_logits, targets))
    some = slice(1, None, 2)
    assert torch.equal(
        mask_cost(class_logits[:, :, some], strided[:, :, some], targets),
        mask_cost(class_logits, mask_logits, targets)[:, :, some],
    )


def test_leading_dimensions(generator):
    class_logits, mask_logits = random_logits(SHAPES["usual"], generator)
    targets = random_targets(SHAPES["usual"], generator, "segments")
    cost = mask_cost(class_logits, mask_logits, targets)
    assert torch.equal(mask_cost(class_logits[1], mask_logits[1], targets), cost[1])
    assert torch.equal(mask_cost(class_logits[None], mask_logits[None], targets)[0], cost)


def test_two_runs_give_the_same_bits(generator):
    class_logits, mask_logits = random_logits(SHAPES["usual"], generator)
    targets = random_targets(SHAPES["usual"], generator, "masks")
    first = mask_cost(class_logits, mask_logits, targets)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(mask_cost(class_logits, mask_logits, targets), first)
    finally:
        torch.set_num_threads(threads)


def test_void_pixels_do_not_count_whatever_their_logits(generator):
    shape = SHAPES["targets at the logits' size"]
    class_logits, mask_logits = random_logits(shape, generator)
    targets = random_targets(shape, generator, "segments")
    expected = mask_cost(class_logits, mask_logits, targets, term=MaskTerm(ignore_void=True))
    poisoned = mask_logits.masked_fill((targets.segments == targets.void)[None, :, None], float("nan"))
    assert torch.equal(mask_cost(class_logits, poisoned, targets, term=MaskTerm(ignore_void=True)), expected)


def test_all_void(generator):
    shape = SHAPES["usual"]
    class_logits, mask_logits = random_logits(shape, generator)
    targets = random_targets(shape, generator, "segments")
    void = Targets(targets.labels, targets.counts, segments=torch.full_like(targets.segments, 255))
    cost = check_against_reference(class_logits, mask_logits, void, term=MaskTerm(ignore_void=True), **WEIGHTS)
    assert cost.isfinite().all()


def test_nan_logits_stay_in_their_row(generator):
    shape = SHAPES["usual"]
    class_logits, mask_logits = random_logits(shape, generator)
    targets = random_targets(shape, generator, "segments")
    expected = mask_cost(class_logits, mask_logits, targets)
    mask_logits[0, 1, 3, 5, 5] = float("nan")
    class_logits[1, 1, 4, 0] = float("nan")
    cost = mask_cost(class_logits, mask_logits, targets)
    poisoned = torch.zeros_like(cost, dtype=torch.bool)
    poisoned[0, 1, 3] = poisoned[1, 1, 4] = True
    assert cost[poisoned].isnan().all()
    assert torch.equal(cost[~poisoned], expected[~poisoned])


def test_large_half_precision_logits_do_not_overflow():
    mask_logits = torch.tensor([[6e4, -6e4], [6e4, 6e4]], dtype=torch.float16).expand(1, 1, 1, 2, 2)
    targets = Targets.from_segments(torch.zeros(1, 2, 2, dtype=torch.uint8), [torch.tensor([0])])
    cost = mask_cost(torch.zeros(1, 1, 1, 2, dtype=torch.float16), mask_logits, targets)
    assert cost.isfinite().all()


def test_carries_no_gradient(generator):
    class_logits, mask_logits = random_logits(SHAPES["usual"], generator)
    targets = random_targets(SHAPES["usual"], generator, "segments")
    assert not mask_cost(class_logits.requires_grad_(), mask_logits.requires_grad_(), targets).requires_grad


@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form, generator):
    class_logits, mask_logits = random_logits(SHAPES["odd sizes"], generator)
    targets = random_targets(SHAPES["odd sizes"], generator, form)
    arguments = (
        class_logits, mask_logits, targets.labels, targets.masks, targets.segments, targets.valid, targets.void,
        True, 1.0, 20.0, 1.0, "focal", 0.25, 2.0,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.fastmask.mask_cost.default, arguments)


def test_compiles_to_one_graph(generator):
    class_logits, mask_logits = random_logits(SHAPES["odd sizes"], generator)
    targets = random_targets(SHAPES["odd sizes"], generator, "segments")
    compiled = torch.compile(mask_cost, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(class_logits, mask_logits, targets), mask_cost(class_logits, mask_logits, targets))


BAD_ARGUMENTS = {
    "integer logits": (lambda c, m, t: (c, m.long(), t), {}, TypeError, "mask_logits must be floating point"),
    "too few dimensions": (lambda c, m, t: (c, m[0, 0, 0], t), {}, ValueError, "mask_logits has shape"),
    "no pixels": (lambda c, m, t: (c, m[..., :0], t), {}, ValueError, "at least one pixel"),
    "another batch": (lambda c, m, t: (c[:, :1], m[:, :1], t), {}, ValueError, "targets has 2 images"),
    "queries differ": (lambda c, m, t: (c[:, :, :3], m, t), {}, ValueError, "equal \\(..., B, N\\)"),
    "label beyond the classes": (lambda c, m, t: (c[..., :2], m, t), {}, ValueError, "targets.labels holds"),
    "only no-object": (lambda c, m, t: (c[..., :1], m, t), {}, ValueError, "at least one class"),
    "targets as a list": (lambda c, m, t: (c, m, [t]), {}, TypeError, "targets must be a fastmask.Targets"),
    "no term": (lambda c, m, t: (c, m, t), {"term": "bce"}, TypeError, "term must be a fastmask.MaskTerm, got str"),
    "unknown backend": (lambda c, m, t: (c, m, t), {"backend": "cpu"}, ValueError, "backend must be one of"),
    "no such kernel": (lambda c, m, t: (c.double(), m.double(), t), {"backend": "native"}, RuntimeError, "float64"),
}


@pytest.mark.parametrize(("change", "options", "error", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments(change, options, error, message, generator):
    class_logits, mask_logits = random_logits(SHAPES["usual"], generator)
    targets = random_targets(SHAPES["usual"], generator, "segments")
    targets.labels[0, 0] = 4
    with pytest.raises(error, match=message):
        fastmask.mask_cost(*change(class_logits, mask_logits, targets), **options)
