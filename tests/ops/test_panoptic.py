"""Panoptic inference: the operator against the reference in float64, segments from winners, and the public function."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastmask
from fastmask import panoptic_inference, reference
from fastmask.measure import peak_memory
from fastmask.ops import _mask_source
from fastmask.ops._geometry import Geometry
from fastmask.ops.panoptic import _segments
from fastmask.reference._common import image_logits, reads_nan, resize_bilinear
from fastmask.testing import simd_level, simd_levels
from tests.helpers.inference_inputs import (
    GEOMETRIES,
    KINDS,
    exact_embeddings,
    layouts,
    make_class_logits,
    make_logits,
)
from tests.helpers.op_info import poisoned_memory

# (resize_probabilities, clip_to_mask, mask_threshold); the last two take all pixels and none.
OPTIONS = {
    "maskformer": (False, False, 0.5),
    "mask2former": (False, True, 0.45),
    "huggingface": (True, False, 0.5),
    "huggingface, clipped": (True, True, 0.3),
    "threshold 0": (False, True, 0.0),
    "threshold 1": (True, True, 1.0),
}
RULES = ("maskformer", "mask2former", "huggingface")
CPU = torch.device("cpu")


def make_scores(generator: torch.Generator, batch: int = 2, queries: int = 9) -> Tensor:
    """``(B, N)``, a third of them dropped."""
    scores = torch.rand(batch, queries, generator=generator) * 0.5 + 0.5
    return scores * (torch.rand(batch, queries, generator=generator) > 0.3)


def winners(scores: Tensor, mask_logits: Tensor, options: tuple[bool, bool, float], geometry: Geometry) -> list[Tensor]:
    return torch.ops.fastmask.panoptic_winners(scores, mask_logits, *options, *geometry.arguments())


def check_against_reference(
    scores: Tensor, mask_logits: Tensor, options: tuple[bool, bool, float], geometry: Geometry
) -> tuple[Tensor, Tensor]:
    """Winners and areas equal the reference's in float64 wherever its margins exceed what rounding can move."""
    winner, areas, nan_logits = winners(scores, mask_logits, options, geometry)
    resize_probabilities, clip, threshold = options
    steps = (geometry.padded_size, geometry.valid_size)
    nan = reads_nan(mask_logits, *steps, geometry.size)
    logits = image_logits(mask_logits.double(), *steps)
    if resize_probabilities:
        probabilities = resize_bilinear(logits.sigmoid(), geometry.size)
    else:
        probabilities = resize_bilinear(logits, geometry.size).sigmoid()
    kept = (scores > 0)[:, :, None, None] & ~nan
    weighted = (probabilities * scores[:, :, None, None].double()).masked_fill(~kept, -1)
    best, expected = weighted.max(1)
    expected = expected.masked_fill(best < 0, -1)
    # A logit moves by a dozen roundings of the largest that it is made of; so does its sigmoid, relatively.
    finite = mask_logits[mask_logits.abs() < 1e4]
    rounding = 16 * torch.finfo(torch.float32).eps * (1 + (finite.abs().max().item() if len(finite) else 0))
    second = weighted.scatter(1, expected.clamp(min=0)[:, None], -1).amax(1)
    sure = best - second > rounding * best
    assert sure.float().mean() > 0.9 or best.numel() < 100

    inside = (probabilities >= threshold) & kept
    near = ((probabilities - threshold).abs() <= rounding) & kept
    if clip:
        index = expected.clamp(min=0)[:, None]
        expected = expected.where(inside.gather(1, index)[:, 0], -1)
        sure &= ~near.gather(1, index)[:, 0]
    assert (winner == expected)[sure].all()

    won, mask_area, visible = areas.unbind(-1)
    assert ((mask_area - inside.sum((2, 3))).abs() <= near.sum((2, 3))).all()
    queries = torch.arange(scores.shape[1])
    assert visible.equal((winner[:, None] == queries[:, None, None]).sum((2, 3), dtype=torch.int32))
    assert won.sum(1).equal((best >= 0).sum((1, 2), dtype=torch.int32))
    assert clip or won.equal(visible)
    assert nan_logits.equal(mask_logits.isnan().sum((2, 3), dtype=torch.int32) * (scores > 0))
    return winner, areas


@pytest.mark.parametrize("level", simd_levels())
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_winners_and_areas(geometry, options, kind, level, generator):
    with simd_level(level):
        check_against_reference(
            make_scores(generator), make_logits(generator, geometry.grid, kind=kind), options, geometry
        )


@pytest.mark.parametrize("queries", [1, 2, 16, 17, 40])
def test_numbers_of_queries(queries, generator):
    scores = make_scores(generator, queries=queries)
    mask_logits = make_logits(generator, (25, 38), queries=queries)
    check_against_reference(scores, mask_logits, OPTIONS["maskformer"], GEOMETRIES["four times larger"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("level", simd_levels())
def test_half_precision_logits_are_read_as_they_are(dtype, level, generator):
    geometry = GEOMETRIES["two steps up"]
    scores, mask_logits = make_scores(generator), make_logits(generator, geometry.grid).to(dtype)
    with simd_level(level):
        for options in OPTIONS.values():
            results = winners(scores, mask_logits, options, geometry)
            assert all(map(torch.equal, results, winners(scores, mask_logits.float(), options, geometry)))


def test_layouts(generator):
    geometry = GEOMETRIES["odd sizes"]
    scores, mask_logits = make_scores(generator), make_logits(generator, geometry.grid)
    expected = winners(scores, mask_logits, OPTIONS["mask2former"], geometry)
    for layout in layouts(mask_logits).values():
        assert all(map(torch.equal, winners(scores, layout, OPTIONS["mask2former"], geometry), expected))
    apart = scores.repeat_interleave(2, 1)[:, ::2]
    assert all(map(torch.equal, winners(apart, mask_logits, OPTIONS["mask2former"], geometry), expected))


@pytest.mark.parametrize("kind", KINDS)
def test_bits_do_not_depend_on_threads_or_runs(kind, generator):
    geometry = GEOMETRIES["two steps up"]
    scores, mask_logits = make_scores(generator), make_logits(generator, geometry.grid, kind=kind)
    threads = torch.get_num_threads()
    try:
        for options in OPTIONS.values():
            results = []
            for count in (1, 1, 2, 5):
                torch.set_num_threads(count)
                results.append(winners(scores, mask_logits, options, geometry))
            assert all(all(map(torch.equal, result, results[0])) for result in results)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_bands_equal_the_whole(geometry, options, generator):
    scores, mask_logits = make_scores(generator), make_logits(generator, geometry.grid)
    mask_logits[:, 1, ::2, ::3] = float("nan")
    expected, expected_areas, _ = winners(scores, mask_logits, options, geometry)
    parts, areas = [], 0
    height = geometry.size[0]
    for top in range(0, height, 23):
        count = min(23, height - top)
        first, end = geometry.input_rows(top, count)
        winner, part_areas, nan_logits = torch.ops.fastmask.panoptic_winners(
            scores, mask_logits[:, :, first:end], *options, *geometry.arguments(first, top, count)
        )
        assert nan_logits.equal(mask_logits[:, :, first:end].isnan().sum((2, 3), dtype=torch.int32) * (scores > 0))
        parts.append(winner)
        areas = areas + part_areas
    assert torch.cat(parts, 1).equal(expected)
    assert areas.equal(expected_areas)


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_outputs_are_written_whole(geometry, generator):
    scores, mask_logits = make_scores(generator), make_logits(generator, geometry.grid)
    scores[1] = 0
    for options in OPTIONS.values():
        expected = winners(scores, mask_logits, options, geometry)
        with poisoned_memory():
            assert all(map(torch.equal, winners(scores, mask_logits, options, geometry), expected))


def test_ties_go_to_the_lowest_query():
    """Also where sigmoid saturates, and where all queries are as improbable as can be."""
    geometry = Geometry((4, 4), None, None, (20, 70))
    for value in (0.0, 3.0, 200.0, -200.0, float("inf"), -float("inf")):
        mask_logits = torch.full((1, 4, 4, 4), value)
        scores = torch.tensor([[0.0, 0.7, 0.9, 0.9]])
        for options in (OPTIONS["maskformer"], OPTIONS["huggingface"]):
            assert (winners(scores, mask_logits, options, geometry)[0] == 2).all(), value


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_nan_and_infinite_logits(options, generator):
    geometry = GEOMETRIES["odd sizes"]
    scores, mask_logits = make_scores(generator) + 0.1, make_logits(generator, geometry.grid)
    mask_logits[0, 0, 3:5, 7] = float("nan")
    mask_logits[0, 1] = float("nan")
    mask_logits[0, 2, 2, :9] = float("inf")
    mask_logits[0, 3, :, 20:] = -float("inf")
    mask_logits[1, :, 5:9, 6:12] = float("nan")
    winner, areas = check_against_reference(scores, mask_logits, options, geometry)
    assert not areas[0, 1].any()
    assert (winner[1, 24:30, 32:40] == -1).all()


def test_extreme_probabilities(generator):
    """Logits whose sigmoid all but underflows: what differs by more than rounding is still told apart."""
    geometry = GEOMETRIES["odd sizes"]
    mask_logits = make_logits(generator, geometry.grid) * 3 - 40
    mask_logits = mask_logits.clamp(-85, 85)
    check_against_reference(make_scores(generator), mask_logits, OPTIONS["maskformer"], geometry)


def plain_segments(winner, areas, scores, classes, rule, overlap_threshold, stuff_classes):
    """One image by the text of the rule, query by query."""
    segmentation, infos, fused = torch.zeros_like(winner), [], {}
    for n, (won, mask_area, visible) in enumerate(areas.tolist()):
        if scores[n] <= 0 or mask_area == 0 or visible == 0:
            continue
        if rule == "huggingface" and not won / mask_area > overlap_threshold:
            continue
        if rule != "huggingface" and not won / mask_area >= overlap_threshold:
            continue
        category = int(classes[n])
        if category in fused:
            info = fused[category]
        else:
            info = {"id": len(infos) + 1, "category_id": category, "isthing": category not in stuff_classes}
            info |= {"score": scores[n].item(), "area": 0}
            infos.append(info)
        if category in stuff_classes:
            fused[category] = info
        info["area"] += int((winner == n).sum())
        segmentation[winner == n] = info["id"]
    return segmentation, infos


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("stuff_classes", [(), (0, 2), tuple(range(6))])
def test_segments_from_winners(rule, stuff_classes, generator):
    """Many queries of few classes, some hidden; the share 1/2 occurs, where strictness matters."""
    batch, queries = 5, 30
    winner = torch.randint(-1, queries, (batch, 20, 30), generator=generator, dtype=torch.int32)
    won = (winner[:, None] == torch.arange(queries)[:, None, None]).sum((2, 3), dtype=torch.int32)
    mask_area = won * torch.randint(0, 5, won.shape, generator=generator, dtype=torch.int32)
    areas = torch.stack([won, mask_area, won], -1)
    scores = torch.rand(batch, queries, generator=generator) * (torch.rand(batch, queries, generator=generator) > 0.2)
    scores[4] = 0
    classes = torch.randint(0, 6, (batch, queries), generator=generator)
    results = _segments(winner.clone(), areas, scores, classes, rule, 0.5, stuff_classes)
    for b, (segmentation, infos) in enumerate(results):
        expected, expected_infos = plain_segments(winner[b], areas[b], scores[b], classes[b], rule, 0.5, stuff_classes)
        assert segmentation.dtype == torch.int32
        assert segmentation.equal(expected)
        assert infos == expected_infos
    assert results[4][1] == []


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("stuff_classes", [(), {1, 3}])
def test_public_results_equal_the_reference(geometry, rule, stuff_classes, generator):
    class_logits, mask_logits = make_class_logits(generator, batch=3), make_logits(generator, geometry.grid, batch=3)
    class_logits[2, :, -1] = 40
    options = {"rule": rule, "threshold": 0.4, "overlap_threshold": 0.37, "mask_threshold": 0.45}
    options |= {"stuff_classes": stuff_classes, "padded_size": geometry.padded_size, "valid_size": geometry.valid_size}
    results = panoptic_inference(class_logits, mask_logits, geometry.size, **options)
    expected = reference.panoptic_inference(class_logits.double(), mask_logits.double(), geometry.size, **options)
    for (segmentation, infos), (wanted, wanted_infos) in zip(results, expected, strict=True):
        assert segmentation.dtype == torch.int32
        assert [i["category_id"] for i in infos] == [i["category_id"] for i in wanted_infos]
        assert [i["score"] for i in infos] == pytest.approx([i["score"] for i in wanted_infos], rel=1e-6)
        assert [(i["id"], i["isthing"]) for i in infos] == [(i["id"], i["isthing"]) for i in wanted_infos]
        assert [i["area"] for i in infos] == [int((segmentation == i["id"]).sum()) for i in infos]
        assert (segmentation != wanted).float().mean() < 0.002


def test_the_exact_rule_stays_with_the_reference(generator):
    class_logits, mask_logits = make_class_logits(generator), make_logits(generator, (9, 11))
    options = {"rule": "huggingface-exact", "threshold": 0.4, "stuff_classes": (1, 2)}
    results = panoptic_inference(class_logits, mask_logits, (21, 34), **options)
    expected = reference.panoptic_inference(class_logits, mask_logits, (21, 34), **options)
    assert all(a[0].equal(b[0]) and a[1] == b[1] for a, b in zip(results, expected, strict=True))
    for backend in ("native", "triton"):
        with pytest.raises(RuntimeError, match="only the reference has rule='huggingface-exact'"):
            panoptic_inference(class_logits, mask_logits, (21, 34), **options, backend=backend)


@pytest.mark.parametrize(
    ("rule", "backend"),
    [*((rule, "native") for rule in RULES), *((rule, "reference") for rule in (*RULES, "huggingface-exact"))],
)
def test_nan_is_counted_and_wins_nothing(rule, backend, generator):
    class_logits, mask_logits = make_class_logits(generator), make_logits(generator, (9, 11))
    class_logits[:, 0] = torch.tensor([9.0, 0, 0, 0, 0])
    class_logits[:, 1] = float("nan")
    mask_logits[:, 0] = float("nan")
    mask_logits[1, 1, 2, 2] = float("nan")
    options = {"rule": rule, "threshold": 0.4, "overlap_threshold": 0.0, "backend": backend}
    results = panoptic_inference(class_logits, mask_logits, (21, 34), **options, details=True)
    for b, result in enumerate(results):
        segmentation, infos, nan_logits = result
        assert nan_logits.dtype == torch.int32
        assert nan_logits[0] == 99
        assert not nan_logits[1:].any()
        without = panoptic_inference(class_logits[b : b + 1, 2:], mask_logits[b : b + 1, 2:], (21, 34), **options)
        assert segmentation.equal(without[0][0])
        assert infos == without[0][1]
        assert result.segments_info is infos


@pytest.mark.parametrize("rule", RULES)
def test_nothing_kept(rule, generator):
    mask_logits = make_logits(generator, (9, 11))
    class_logits = torch.zeros(2, 9, 5)
    class_logits[..., -1] = 30
    for logits, masks in ((class_logits, mask_logits), (class_logits[:, :0], mask_logits[:, :0])):
        results = panoptic_inference(logits, masks, (21, 34), rule=rule)
        assert [infos for _, infos in results] == [[], []]
        assert not any(segmentation.any() for segmentation, _ in results)
    assert panoptic_inference(class_logits[:0], mask_logits[:0], (21, 34), rule=rule) == []


def test_one_class(generator):
    class_logits, mask_logits = make_class_logits(generator, classes=1), make_logits(generator, (9, 11))
    for stuff_classes in ((), (0,)):
        options = {"threshold": 0.3, "overlap_threshold": 0.2, "stuff_classes": stuff_classes}
        results = panoptic_inference(class_logits, mask_logits, (21, 34), **options)
        expected = reference.panoptic_inference(class_logits, mask_logits, (21, 34), **options)
        for (segmentation, infos), (wanted, wanted_infos) in zip(results, expected, strict=True):
            assert segmentation.equal(wanted)
            assert [i["area"] for i in infos] == [i["area"] for i in wanted_infos]
            assert {i["category_id"] for i in infos} <= {0}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["four times larger", "two steps up", "smaller than the logits"])
def test_embeddings_equal_their_product(rule, name, generator, monkeypatch):
    """In bands of a few rows, with NaN in rows that two bands read."""
    geometry = GEOMETRIES[name]
    class_logits = make_class_logits(generator)
    mask_embed, pixel_embed = exact_embeddings(generator, geometry.grid)
    pixel_embed[1, 2, ::4] = float("nan")
    mask_logits = torch.einsum("bnc,bchw->bnhw", mask_embed, pixel_embed)
    options = {"rule": rule, "threshold": 0.4, "overlap_threshold": 0.1, "stuff_classes": (1,), "details": True}
    options |= {"padded_size": geometry.padded_size, "valid_size": geometry.valid_size}
    expected = panoptic_inference(class_logits, mask_logits, geometry.size, **options)
    monkeypatch.setitem(_mask_source.BAND_BYTES, "cpu", 6000)
    results = panoptic_inference(class_logits, (mask_embed, pixel_embed), geometry.size, **options)
    for result, wanted in zip(results, expected, strict=True):
        assert result.segmentation.equal(wanted.segmentation)
        assert result.segments_info == wanted.segments_info
        assert result.nan_logits.equal(wanted.nan_logits)


@pytest.mark.parametrize("rule", RULES)
def test_memory_does_not_grow_with_the_queries(rule, generator):
    """40 masks of this size take 25 MB; the result takes 0.6 MB, and so do the winners that it is made of."""
    class_logits = make_class_logits(generator, batch=1, queries=40)
    mask_logits = make_logits(generator, (80, 120), batch=1, queries=40)
    options = {"rule": rule, "threshold": 0.0}
    _, memory = peak_memory(lambda: panoptic_inference(class_logits, mask_logits, (320, 480), **options), CPU)
    assert memory["allocator"] < 2e6


def test_opcheck(generator):
    geometry = Geometry((5, 7), (10, 14), (9, 11), (13, 17))
    mask_logits = make_logits(generator, geometry.grid)
    for layout in (mask_logits, mask_logits.mT.contiguous().mT):
        arguments = (make_scores(generator), layout, True, True, 0.5, *geometry.arguments())
        torch.library.opcheck(torch.ops.fastmask.panoptic_winners.default, arguments)


def test_compiles_to_one_graph(generator):
    geometry = GEOMETRIES["odd sizes"]
    scores, mask_logits = make_scores(generator), make_logits(generator, geometry.grid)

    def total(scores, mask_logits):
        winner, areas, nan_logits = winners(scores, mask_logits, OPTIONS["mask2former"], geometry)
        return winner + 1, areas.sum(0), nan_logits

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(scores, mask_logits), total(scores, mask_logits)))


BAD_ARGUMENTS = {
    "threshold above 1": ({"threshold": 1.5}, ValueError, r"threshold must lie in 0\.\.1, got 1\.5"),
    "negative": ({"overlap_threshold": -0.1}, ValueError, r"overlap_threshold must lie in 0\.\.1"),
    "NaN": ({"mask_threshold": float("nan")}, ValueError, r"mask_threshold must lie in 0\.\.1, got nan"),
    "unknown rule": ({"rule": "detr"}, ValueError, "rule must be one of maskformer"),
    "no size": ({"size": (0, 4)}, ValueError, "size must be"),
    "crop beyond the map": ({"valid_size": (10, 4)}, ValueError, "valid_size"),
    "integer logits": ({"mask_logits": torch.zeros(2, 9, 9, 11).int()}, TypeError, "mask_logits must be floating"),
    "other queries": ({"mask_logits": torch.zeros(2, 8, 9, 11)}, ValueError, "mask_logits"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments(change, error, message, generator):
    arguments = {"mask_logits": make_logits(generator, (9, 11)), "size": (21, 34)} | change
    with pytest.raises(error, match=message):
        fastmask.panoptic_inference(make_class_logits(generator), **arguments)


BAD_OPERANDS = {
    "scores of another dtype": (lambda s, m, o, g: (s.double(), m, *o, *g), "scores must be"),
    "scores of other queries": (lambda s, m, o, g: (s[:, 1:], m, *o, *g), "scores must be"),
    "threshold": (lambda s, m, o, g: (s, m, *o[:2], 2.0, *g), "mask_threshold"),
    "float64 logits": (lambda s, m, o, g: (s, m.double(), *o, *g), "mask_logits must be float32"),
    "rows that are missing": (lambda s, m, o, g: (s, m[:, :, :4], *o, *g), "rows"),
    "rows beyond the result": (lambda s, m, o, g: (s, m, *o, *g[:-2], 1, g[-1]), "out_rows"),
    "another grid": (lambda s, m, o, g: (s, m[..., 1:], *o, *g), "grid"),
}


@pytest.mark.parametrize(("change", "message"), BAD_OPERANDS.values(), ids=BAD_OPERANDS)
def test_the_operator_reads_nothing_out_of_bounds(change, message, generator):
    geometry = Geometry((9, 11), None, None, (21, 34))
    arguments = change(
        make_scores(generator), make_logits(generator, (9, 11)), OPTIONS["maskformer"], geometry.arguments()
    )
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastmask.panoptic_winners(*arguments)
