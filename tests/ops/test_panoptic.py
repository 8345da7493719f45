"""Panoptic inference: segments from winners, and the public function; the battery of operators checks the winners."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from fastmask import panoptic_inference, reference
from fastmask.measure import peak_memory
from fastmask.ops import _mask_source
from fastmask.ops._geometry import Geometry
from fastmask.ops.panoptic import PANOPTIC_WINNERS, _segments
from tests.helpers.inference_inputs import (
    BAD_LOGITS_AND_SIZES,
    GEOMETRIES,
    SMALL_GEOMETRIES,
    check_refused,
    exact_embeddings,
    make_class_logits,
    make_logits,
    random_masks,
    steps,
)
from tests.helpers.panoptic_operator import OPTIONS, make_scores

RULES = ("maskformer", "mask2former", "eomt", "huggingface")
CPU = torch.device("cpu")
USUAL = SMALL_GEOMETRIES["stride 4"]
BOTH = pytest.mark.parametrize("backend", ["native", "triton"], indirect=True)


def winners(
    scores: Tensor, mask_logits: Tensor, options: tuple[bool, bool, float], geometry: Geometry, backend: str = "native"
) -> tuple[Tensor, Tensor, Tensor]:
    return PANOPTIC_WINNERS(backend, scores, mask_logits, *options, *geometry.arguments())


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


@BOTH
@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_thresholds_at_the_ends(threshold, backend, generator):
    scores, mask_logits = make_scores(generator), random_masks(2, 9, USUAL.grid, generator)
    _, areas, _ = winners(scores, mask_logits, (False, False, threshold), USUAL, backend)
    pixels = USUAL.size[0] * USUAL.size[1]
    assert torch.equal(areas[..., 1], (scores > 0).int() * (pixels if threshold == 0 else 0))


@BOTH
def test_equal_queries_leave_the_pixel_to_the_first(backend, generator):
    scores, mask_logits = torch.full((2, 40), 0.5), random_masks(2, 1, USUAL.grid, generator).repeat(1, 40, 1, 1)
    scores[:, :3] = 0
    winner, areas, _ = winners(scores, mask_logits, OPTIONS["maskformer"], USUAL, backend)
    assert (winner == 3).all() and (areas[:, 3, 0] == winner[0].numel()).all()


@pytest.mark.usefixtures("triton_kernels")
def test_bands_of_staged_logits_change_nothing(generator, monkeypatch):
    geometry = SMALL_GEOMETRIES["both steps"]
    arguments = (make_scores(generator), random_masks(2, 9, geometry.grid, generator), OPTIONS["mask2former"], geometry)
    expected = winners(*arguments, "triton")
    monkeypatch.setattr(sys.modules["fastmask.kernels._stage"], "STAGE_BYTES", 1)
    assert all(map(torch.equal, winners(*arguments, "triton"), expected))


def test_ties_go_to_the_lowest_query():
    """Also where sigmoid saturates, and where all queries are as improbable as can be."""
    geometry = Geometry((4, 4), None, None, (20, 70))
    for value in (0.0, 3.0, 200.0, -200.0, float("inf"), -float("inf")):
        mask_logits = torch.full((1, 4, 4, 4), value)
        scores = torch.tensor([[0.0, 0.7, 0.9, 0.9]])
        for options in (OPTIONS["maskformer"], OPTIONS["huggingface"]):
            assert (winners(scores, mask_logits, options, geometry)[0] == 2).all(), value


def plain_segments(winner, areas, scores, classes, rule, overlap_threshold, stuff_classes):
    """One image by the text of the rule, query by query."""
    segmentation, infos, fused = torch.zeros_like(winner), [], {}
    for n, (won, mask_area, visible) in enumerate(areas.tolist()):
        if scores[n] <= 0 or mask_area == 0 or visible == 0:
            continue
        strict = rule in ("huggingface", "eomt")
        if strict and not won / mask_area > overlap_threshold:
            continue
        if not strict and not won / mask_area >= overlap_threshold:
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


@pytest.mark.parametrize("rule", ["maskformer", "mask2former", "huggingface"])
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_segments_of_triton(rule, backend, generator):
    geometry = SMALL_GEOMETRIES["cropped"]
    class_logits = make_class_logits(generator, queries=18, classes=5)
    mask_logits = random_masks(2, 18, geometry.grid, generator)
    options = {"rule": rule, "threshold": 0.4, "overlap_threshold": 0.3, "stuff_classes": (1, 3), **steps(geometry)}
    actual = panoptic_inference(class_logits, mask_logits, geometry.size, backend=backend, **options)
    expected = reference.panoptic_inference(class_logits, mask_logits, geometry.size, **options)
    for (segmentation, infos), (wanted, wanted_infos) in zip(actual, expected, strict=True):
        assert (segmentation != wanted).double().mean() < 0.01
        assert len(infos) == len(wanted_infos) > 1
        for info, wanted_info in zip(infos, wanted_infos, strict=True):
            assert abs(info.pop("area") - wanted_info.pop("area")) <= 5
            assert info.pop("score") == pytest.approx(wanted_info.pop("score"))
            assert info == wanted_info


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


def test_winners_are_relabeled_by_image(generator):
    winner = torch.randint(-1, 6, (2, 5, 70), dtype=torch.int32, generator=generator)
    table = torch.randint(0, 99, (2, 7), dtype=torch.int32, generator=generator)
    expected = table.gather(1, winner.flatten(1).long() + 1).view_as(winner)
    assert torch.ops.fastmask.relabel_winners(winner, table).equal(expected)
    torch.library.opcheck(torch.ops.fastmask.relabel_winners.default, (winner, table))
    for bad in ((winner[:1], table), (winner, table[0]), (winner.long(), table), (winner, table[:, :0])):
        with pytest.raises(RuntimeError, match="winner|table"):
            torch.ops.fastmask.relabel_winners(*bad)


BAD_ARGUMENTS = {
    "threshold above 1": ({"threshold": 1.5}, ValueError, r"threshold must lie in 0\.\.1, got 1\.5"),
    "negative": ({"overlap_threshold": -0.1}, ValueError, r"overlap_threshold must lie in 0\.\.1"),
    "NaN": ({"mask_threshold": float("nan")}, ValueError, r"mask_threshold must lie in 0\.\.1, got nan"),
    "unknown rule": ({"rule": "detr"}, ValueError, "rule must be one of maskformer"),
    **BAD_LOGITS_AND_SIZES,
}


@pytest.mark.parametrize(("change", "error", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments(change, error, message, generator):
    check_refused(panoptic_inference, generator, change, error, message)
