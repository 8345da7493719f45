"""Panoptic segmentation from class logits, and mask logits or embeddings.

``fastmask::panoptic_winners`` finds the query that wins each pixel, and how many pixels each query has.

Args of the operator:
    scores: ``(B, N)`` float32, the class probability of each kept query; 0 for dropped queries.
    mask_logits: ``(B, N, rows, w)`` float32, bfloat16 or float16.
    resize_probabilities: apply the sigmoid before the second resizing step rather than after it.
    clip_to_mask: the winner only gets pixels where its own mask reaches ``mask_threshold``.
    mask_threshold: the probability at which a pixel belongs to a mask.
    The other arguments are the geometry that all inference operators share.

Returns of the operator:
    winner: ``(B, out_rows, W)`` int32, the kept query of highest score * probability, the lowest index among equals;
        -1 where no query was kept, all kept queries are NaN, or ``clip_to_mask`` took the pixel away.
    areas: ``(B, N, 3)`` int32, pixels that the query wins, pixels of its mask, and pixels where ``winner`` names it.
    nan_logits: ``(B, N)`` int32, how many of the given logits of a kept query are NaN; 0 for dropped queries.

``relabel_winners``, on the CPU only, returns entry n + 1 of an image's row of ``table (B, 1 + N)`` int32 for each pixel
n of ``winner (B, H, W)`` int32.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastmask.ops._checks import check_choice
from fastmask.ops._extension import EXTENSION_ERROR, ops
from fastmask.ops._geometry import GEOMETRY, GeometryArguments, result_size
from fastmask.ops._mask_source import MaskSource, belong_to, prepare
from fastmask.ops._registry import Operator

if TYPE_CHECKING:
    from typing_extensions import Unpack

RULES = ("maskformer", "mask2former", "eomt", "huggingface", "huggingface-exact")

Segments = list[dict[str, int | float | bool]]


class PanopticDetails(NamedTuple):
    """The result of one image, and how many of its logits are NaN.

    Args:
        segmentation: ``(H, W)`` int32.
        segments_info: a dict for each segment.
        nan_logits: ``(N,)`` int32, how many mask logits of each query that passed ``threshold`` are NaN.
    """

    segmentation: Tensor
    segments_info: Segments
    nan_logits: Tensor


@torch.no_grad()
def panoptic_inference(
    class_logits: Tensor,
    mask_logits: Tensor | tuple[Tensor, Tensor],
    size: tuple[int, int],
    *,
    rule: str = "maskformer",
    threshold: float = 0.8,
    overlap_threshold: float = 0.8,
    mask_threshold: float = 0.5,
    stuff_classes: Collection[int] = (),
    details: bool = False,
    padded_size: tuple[int, int] | None = None,
    valid_size: tuple[int, int] | None = None,
    backend: str = "auto",
) -> list[tuple[Tensor, Segments]] | list[PanopticDetails]:
    """Each pixel goes to the confident query that is most probable there; weak and mostly hidden queries are dropped.

    MaskFormer (arXiv:2107.06278), section 3.4, "general inference". ``fastmask.reference.panoptic`` says how the rules
    differ. "huggingface-exact" always runs in the reference: that rule depends on how PyTorch's operators round.

    Only the masks of queries that pass ``threshold`` are read, and nothing of size N * H * W is stored. The host waits
    for the device once, for ``segments_info``. Below a mask logit of -87 all probabilities count as equal. Infinite
    mask logits count as -1e30 and 1e30; a query never wins a pixel that is interpolated from one of its NaN logits.

    Args:
        class_logits: ``(B, N, K+1)`` floating point; the last class is "no object".
        mask_logits: ``(B, N, h, w)`` floating point; or a pair ``mask_embed (B, N, C)`` and ``pixel_embed
            (B, C, h, w)`` to multiply over C.
        size: (H, W) of the result, in pixels.
        rule: "maskformer", "mask2former", "eomt", "huggingface" (corrected) or "huggingface-exact" (as shipped).
        threshold: the class probability, 0..1, that a query must exceed.
        overlap_threshold: the visible share, 0..1, that a query's mask must have.
        mask_threshold: the probability, 0..1, at which a pixel belongs to a mask.
        stuff_classes: the classes whose segments are merged into one; all others are things.
        details: also count NaN logits.
        padded_size, valid_size: as in ``semantic_inference``.
        backend: "auto", "reference", "native" or "triton".

    Returns:
        For each image (segmentation, segments_info): ``(H, W)`` int32 with segment ids from 1 and 0 where there is no
        segment, and a list of {"id", "category_id", "isthing", "score", "area"}; area in pixels. With ``details``, a
        :class:`PanopticDetails` for each image.

    Raises:
        ValueError: shapes, devices or options that do not fit.
        TypeError: logits that are not floating point.
        RuntimeError: the requested backend cannot run.
    """
    check_choice("rule", rule, RULES)
    thresholds = {"threshold": threshold, "overlap_threshold": overlap_threshold, "mask_threshold": mask_threshold}
    for name, value in thresholds.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must lie in 0..1, got {value}")
    exact = rule == "huggingface-exact"
    if exact and backend in ("native", "triton"):
        raise RuntimeError(
            f"backend={backend!r} cannot run {PANOPTIC_WINNERS.name}: only the reference has rule={rule!r}"
        )
    backend = "reference" if exact and backend == "auto" else backend
    masks, backend, dtype = prepare(PANOPTIC_WINNERS, class_logits, mask_logits, size, padded_size, valid_size, backend)
    if backend == "reference":
        from fastmask import reference

        logits = masks.full_logits(dtype)
        results = reference.panoptic_inference(
            class_logits.to(dtype),
            logits,
            size,
            rule=rule,
            **thresholds,
            stuff_classes=stuff_classes,
            padded_size=padded_size,
            valid_size=valid_size,
        )
        if details:
            kept = _kept(class_logits.to(dtype), threshold)[2]
            nan_logits = logits.isnan().sum((-2, -1), dtype=torch.int32) * kept
    else:
        masks, scores, classes, queries = kept_queries(class_logits.to(dtype), masks, threshold)
        winner, areas, nan = pixel_winners(
            backend,
            scores,
            masks,
            resize_probabilities=rule == "huggingface",
            clip_to_mask=rule in ("mask2former", "eomt"),
            mask_threshold=mask_threshold,
        )
        results = _segments(winner, areas, scores, classes, rule, overlap_threshold, stuff_classes)
        nan_logits = nan.new_zeros(class_logits.shape[:2]).scatter(1, queries, nan)
    if not details:
        return results
    return [PanopticDetails(*result, nan) for result, nan in zip(results, nan_logits, strict=True)]


def _kept(class_logits: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """``(B, N)`` each: the probability of the most likely class, that class, and whether the query is kept."""
    scores, classes = class_logits.softmax(-1).max(-1)
    return scores, classes, (classes != class_logits.shape[-1] - 1) & (scores > threshold)


def kept_queries(
    class_logits: Tensor, masks: MaskSource, threshold: float
) -> tuple[MaskSource, Tensor, Tensor, Tensor]:
    """The masks of the U queries to be read; and, ``(B, U)`` each, their scores (0 for dropped queries), their classes
    and their indices.

    A query is kept if its most likely class is not "no object" and is more probable than ``threshold``.
    """
    scores, classes, kept = _kept(class_logits, threshold)
    masks, queries = masks.keep_used(kept)
    return masks, torch.where(kept, scores, 0.0).gather(1, queries), classes.gather(1, queries), queries


def pixel_winners(
    backend: str,
    scores: Tensor,
    masks: MaskSource,
    *,
    resize_probabilities: bool = False,
    clip_to_mask: bool = False,
    mask_threshold: float = 0.5,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator's results, combined over bands; NaN logits in rows that two bands read are counted once."""
    options = (resize_probabilities, clip_to_mask, mask_threshold)
    bands = []
    for band in masks.bands():
        winner, areas, nan_logits = PANOPTIC_WINNERS(backend, scores, band.mask_logits, *options, *band.geometry)
        bands.append((winner, areas, nan_logits - (scores > 0) * band.repeated_nan_logits()))
    if len(bands) == 1:
        return bands[0]
    winners, all_areas, all_nan_logits = zip(*bands, strict=True)
    return torch.cat(winners, 1), sum(all_areas), sum(all_nan_logits)


def _segments(
    winner: Tensor,
    areas: Tensor,
    scores: Tensor,
    classes: Tensor,
    rule: str,
    overlap_threshold: float,
    stuff_classes: Collection[int],
) -> list[tuple[Tensor, Segments]]:
    """Turns the winning queries of pixels into segments, without a loop over queries on the device.

    Args:
        winner: ``(B, H, W)`` int32, -1 for pixels without a winner; overwritten.
        areas: ``(B, N, 3)``, pixels won, pixels of the query's own mask, and pixels where ``winner`` names it.
        scores: ``(B, N)``, 0 for queries that were dropped. classes: ``(B, N)``.
    """
    batch_size, num_queries = scores.shape
    won, mask_area, visible_area = areas.unbind(-1)
    if rule in ("huggingface", "eomt"):
        visible = (won.float() / mask_area.float()).double() > overlap_threshold
    else:
        visible = won.double() / mask_area.double() >= overlap_threshold
    segment = (scores > 0) & (mask_area > 0) & (visible_area > 0) & visible
    stuff = belong_to(classes, stuff_classes)
    fused = segment & stuff
    itself = torch.eye(num_queries, dtype=torch.bool, device=scores.device)
    same = (fused[:, :, None] & fused[:, None] & (classes[:, :, None] == classes[:, None])) | itself  # [B, N, N]
    order = torch.arange(num_queries, device=scores.device)
    first = (same & (same.cumsum(-1) == 1)).mul(order).sum(-1)  # [B, N], the first query of the segment
    listed = segment & (first == order)
    ids = listed.cumsum(-1).gather(1, first) * segment
    areas_of_segments = (same * (visible_area * segment)[:, None]).sum(-1)

    # Pixels without a winner have index -1; an extra first entry of each image serves them.
    table = torch.nn.functional.pad(ids, (1, 0)).to(torch.int32)
    if EXTENSION_ERROR is None and winner.device.type == "cpu":
        segmentation = ops.relabel_winners(winner, table)
    else:
        starts = torch.arange(batch_size, dtype=torch.int32, device=winner.device) * (num_queries + 1) + 1
        index = winner.add_(starts[:, None, None])
        segmentation = table.flatten().index_select(0, index.flatten()).view_as(winner)

    columns = (ids, classes, ~stuff, scores, areas_of_segments, listed)
    rows = torch.stack([column.double() for column in columns], -1).tolist()
    return [
        (
            segmentation[b],
            [
                {"id": int(i), "category_id": int(c), "isthing": bool(thing), "score": score, "area": int(area)}
                for i, c, thing, score, area, is_listed in rows[b]
                if is_listed
            ],
        )
        for b in range(batch_size)
    ]


def _fake(
    scores: Tensor,
    mask_logits: Tensor,
    resize_probabilities: bool,
    clip_to_mask: bool,
    mask_threshold: float,
    *geometry: Unpack[GeometryArguments],
) -> tuple[Tensor, Tensor, Tensor]:
    batch_size, num_queries = scores.shape
    return (
        scores.new_empty((batch_size, *result_size(geometry)), dtype=torch.int32),
        scores.new_empty((batch_size, num_queries, 3), dtype=torch.int32),
        scores.new_empty((batch_size, num_queries), dtype=torch.int32),
    )


RELABEL_WINNERS = Operator(
    "relabel_winners",
    "(Tensor winner, Tensor table) -> Tensor",
    lambda winner, table: winner.new_empty(winner.shape),
    native=("cpu",),
    dtypes=(torch.int32,),
)
PANOPTIC_WINNERS = Operator(
    "panoptic_winners",
    "(Tensor scores, Tensor mask_logits, bool resize_probabilities, bool clip_to_mask, float mask_threshold, "
    f"{GEOMETRY}) -> (Tensor, Tensor, Tensor)",
    _fake,
    native=("cpu",),
    triton="panoptic",
)
