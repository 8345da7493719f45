"""Instance segmentation from class logits, and mask logits or embeddings.

``fastmask::instance_masks`` computes binary masks of chosen queries; ``fastmask::rle_encode`` run-length encodes masks.

Args of ``instance_masks``:
    mask_logits: ``(B, N, rows, w)`` float32, bfloat16 or float16.
    queries: ``(B, R)`` int64, the query of each mask; -1 for padding.
    packed: masks as bits.
    The other arguments are the geometry that all inference operators share.

Returns of ``instance_masks``:
    masks: ``(B, R, out_rows, W)`` bool, whether the resampled logit x exceeds 0 (NaN does not); with ``packed``,
        ``(B, R, out_rows, ceil(W / 8))`` uint8, the first pixel in the lowest bit and bits beyond W zero. Zeros for
        padding. On a GPU, the rows of bool masks are 8 * ceil(W / 8) bytes apart.
    foreground_sum: ``(B, R)`` float32, the sum of sigmoid(x) over the mask.
    area: ``(B, R)`` int32, pixels of the mask.
    boxes: ``(B, R, 4)`` int32, (left, top, right, bottom) of the mask in pixels of the full result, right and bottom
        exclusive; zeros for an empty mask.
    nan_logits: ``(B, R)`` int32, how many of the given logits of the query are NaN.

``resize_masks`` and ``rle_encode`` run on the CPU only, the latter since the host uses the run lengths. Given
``(R, h, w)`` bool masks and a size (H, W), ``resize_masks`` returns ``(R, H, W)`` bool by PyTorch's "nearest" rule.
``rle_encode`` takes ``(R, h, w)`` bool or packed ``(R, h, ceil(w / 8))`` uint8 masks, the width w, and optionally the
size to which they are resized by that rule first. It returns ``(T,)`` uint8, the compressed counts of pycocotools
(column by column) of all masks in turn; ``(R + 1,)`` int64, where each mask's counts begin and the last ones end; and
``(R,)`` int64, the foreground pixels of each result.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmask.ops._checks import check_choice
from fastmask.ops._extension import EXTENSION_ERROR, ops
from fastmask.ops._geometry import GEOMETRY, GeometryArguments, Size, result_size
from fastmask.ops._mask_source import MaskSource, belong_to, prepare
from fastmask.ops._registry import Operator

if TYPE_CHECKING:
    from typing_extensions import Unpack

RULES = ("mask2former", "huggingface", "rf_detr")
OUTPUTS = ("masks", "rle")

# The most bytes of binary masks in memory at a time when the output is run lengths.
MASK_BYTES = {"cpu": 16 << 20, "cuda": 512 << 20}


@torch.no_grad()
def instance_inference(
    class_logits: Tensor,
    mask_logits: Tensor | tuple[Tensor, Tensor],
    size: tuple[int, int],
    *,
    top_k: int = 100,
    rule: str = "mask2former",
    stuff_classes: Collection[int] = (),
    output: str = "masks",
    boxes: bool = False,
    details: bool = False,
    padded_size: tuple[int, int] | None = None,
    valid_size: tuple[int, int] | None = None,
    backend: str = "auto",
) -> list[dict[str, Any]]:
    """The most probable (query, class) pairs of each image, with binary masks and scores.

    score = class probability * mean of sigmoid(x) over the mask x > 0 (Mask2Former, arXiv:2112.01527); for RF-DETR
    (arXiv:2511.09554) it is the class probability alone. Pixels interpolated from a NaN mask logit are background, and
    a query with a NaN class logit has probability 0. With run lengths, only a few masks are in memory at a time.

    Args:
        class_logits: ``(B, N, K+1)`` floating point; the last class is "no object". ``(B, N, K)`` for the rule
            "rf_detr", whose classes are independent: their probabilities are sigmoids.
        mask_logits: ``(B, N, h, w)`` floating point; or a pair ``mask_embed (B, N, C)`` and ``pixel_embed
            (B, C, h, w)`` to multiply over C.
        size: (H, W) of the masks, in pixels.
        top_k: the largest number of pairs per image.
        rule: "mask2former", "huggingface" or "rf_detr"; ``fastmask.reference.instance`` says how they differ.
        stuff_classes: classes that give no instances.
        output: "masks", or "rle" for run lengths in the format of ``pycocotools.mask``.
        boxes: also return the masks' bounding boxes.
        details: also return the query of each mask, how many of its logits are NaN, and how many pixels it has.
        padded_size, valid_size: as in ``semantic_inference``.
        backend: "auto", "reference", "native" or "triton". Run lengths are encoded on the host.

    Returns:
        For each image a dict with R <= top_k pairs, in order of decreasing class probability:
        "scores": ``(R,)`` float32 (float64 for float64 logits, which only the reference reads);
        "labels": ``(R,)`` int64;
        "masks": ``(R, H, W)`` bool, or "rle": a list of R dicts {"size": [H, W], "counts": bytes};
        "boxes" with ``boxes``: ``(R, 4)`` int32, (left, top, right, bottom) in pixels, right and bottom exclusive;
        zeros for an empty mask;
        "queries" ``(R,)`` int64, "nan_logits" ``(R,)`` int32 and "areas" ``(R,)`` int64 with ``details``.

    Raises:
        ValueError: shapes, devices or options that do not fit.
        TypeError: logits that are not floating point.
        RuntimeError: the requested backend cannot run.
    """
    check_choice("rule", rule, RULES)
    check_choice("output", output, OUTPUTS)
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    with_no_object = F.pad(class_logits, (0, 1)) if rule == "rf_detr" else class_logits
    masks, backend, dtype = prepare(INSTANCE_MASKS, with_no_object, mask_logits, size, padded_size, valid_size, backend)
    if output == "rle" and backend != "reference" and EXTENSION_ERROR is not None:
        raise RuntimeError(f"the C++ encoder of run lengths is missing: {EXTENSION_ERROR}")
    options = _Options(top_k, rule, stuff_classes, output, boxes, details)
    if backend == "reference":
        results = _reference(class_logits.to(dtype), masks, dtype, options)
    else:
        results = _results(backend, class_logits, masks, options)
    wanted = {"scores", "labels", output}
    wanted |= {"boxes"} if boxes else set()
    wanted |= {"queries", "nan_logits", "areas"} if details else set()
    return [{name: value for name, value in result.items() if name in wanted} for result in results]


class _Options(NamedTuple):
    """Options of ``instance_inference``."""

    top_k: int
    rule: str
    stuff_classes: Collection[int]
    output: str
    boxes: bool
    details: bool


def _results(backend: str, class_logits: Tensor, masks: MaskSource, options: _Options) -> list[dict[str, Any]]:
    top_k, rule, stuff_classes, output, boxes, details = options
    values, labels, queries, counts = _pick(class_logits, top_k, rule, stuff_classes)
    size = masks.geometry.size
    nearest = rule == "huggingface"
    if nearest:
        grid = masks.geometry.valid_size or masks.geometry.padded_size or masks.geometry.grid
        masks = replace(masks, geometry=replace(masks.geometry, size=grid))
    packed = output == "rle" and not (nearest and boxes)
    chunks = (queries,)
    if output == "rle":
        height, width = masks.geometry.size
        mask_bytes = len(queries) * height * (-(-width // 8) if packed else width)
        chunks = queries.split(max(1, _most_bytes(queries.device) // max(1, mask_bytes)), 1)
    sums: list[Any] = []
    made: list[list[dict[str, Any]]] = [[] for _ in counts]
    first = 0
    for chunk in chunks:
        maps, *sums_of_chunk = _run_bands(backend, masks, chunk, packed)
        sums.append(sums_of_chunk)
        for own, count, results in zip(maps, counts, made, strict=True):
            own = own[: max(0, count - first)]
            result: dict[str, Any] = {}
            if output == "rle":
                result["rle"], areas = _encode(own, masks.geometry.size[1], size)
                if details:
                    result["areas"] = areas.to(own.device)
            elif nearest:
                result["masks"] = _resize(own, size)
                if details:
                    result["areas"] = result["masks"].sum((1, 2))
            else:
                result["masks"] = own
            if nearest and boxes:
                result["boxes"] = _bounding_boxes(own, size)
            results.append(result)
        first += chunk.shape[1]
    foreground, area, extents, nan_logits = (_joined(columns, 1) for columns in zip(*sums, strict=True))
    scores = values if rule == "rf_detr" else values * (foreground / (area + 1e-6))
    columns = {"scores": scores, "labels": labels, "queries": queries, "nan_logits": nan_logits, "boxes": extents}
    if details and output == "masks" and not nearest:
        columns["areas"] = area.long()
    return [
        {name: column[b, :count] for name, column in columns.items()}
        | {name: _joined([of_chunk[name] for of_chunk in made[b]]) for name in made[b][0]}
        for b, count in enumerate(counts)
    ]


def _joined(parts: Sequence[Any], dim: int = 0) -> Any:
    """Tensors, or lists of run lengths, in a row."""
    if isinstance(parts[0], list):
        return list(chain(*parts))
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _most_bytes(device: torch.device) -> int:
    return MASK_BYTES.get(device.type, MASK_BYTES["cuda"])


def _pick(
    class_logits: Tensor, top_k: int, rule: str, stuff_classes: Collection[int]
) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """The best pairs as (class probabilities, classes, queries), each ``(B, R)``, and how many of the R each image has.

    Pairs of ``stuff_classes`` are left out; queries beyond an image's count are -1.
    """
    class_logits = class_logits.float()
    probabilities = class_logits.sigmoid() if rule == "rf_detr" else class_logits.softmax(-1)[..., :-1]
    probabilities = probabilities.nan_to_num(nan=0.0)  # [B, N, K]
    num_queries, num_classes = probabilities.shape[1:]
    best = probabilities.flatten(1).topk(min(top_k, num_queries * num_classes))
    labels = best.indices % num_classes
    queries = best.indices // num_classes
    if not stuff_classes:
        return best.values, labels, queries, [labels.shape[1]] * labels.shape[0]
    stuff = belong_to(labels, stuff_classes)
    counts = (~stuff).sum(1).tolist()
    order = stuff.to(torch.uint8).argsort(dim=1, stable=True)[:, : max(counts, default=0)]
    queries = queries.masked_fill(stuff, -1)
    return best.values.gather(1, order), labels.gather(1, order), queries.gather(1, order), counts


def _run_bands(
    backend: str, masks: MaskSource, queries: Tensor, packed: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The operator's results, combined over bands; NaN logits in rows that two bands read are counted once."""
    num_queries = masks.tensor.shape[1]
    used = torch.zeros(len(queries), num_queries + 1, dtype=torch.bool, device=queries.device)
    used = used.scatter(1, queries.where(queries >= 0, num_queries), True)[:, :-1]
    masks, kept = masks.keep_used(used)
    places = torch.arange(kept.shape[1], device=queries.device).expand_as(kept)
    places = kept.new_full((len(queries), num_queries + 1), -1).scatter(1, kept, places)
    queries = places.gather(1, queries.where(queries >= 0, num_queries))

    bands = []
    for band in masks.bands():
        *sums, nan_logits = INSTANCE_MASKS(backend, band.mask_logits, queries, packed, *band.geometry)
        repeated = F.pad(band.repeated_nan_logits(), (0, 1))  # padding has none
        nan_logits = nan_logits - repeated.gather(1, queries.where(queries >= 0, kept.shape[1]))
        bands.append((*sums, nan_logits))
    if len(bands) == 1:
        return bands[0]
    maps, foreground, *columns, nan_logits = zip(*bands, strict=True)
    areas, boxes = map(torch.stack, columns)  # [bands, B, R] and [bands, B, R, 4]
    least = boxes[..., :2].masked_fill(areas[..., None].eq(0), torch.iinfo(torch.int32).max).amin(0)
    area = areas.sum(0, dtype=torch.int32)
    least = least.masked_fill(area[..., None].eq(0), 0)
    return (
        torch.cat(maps, 2),
        torch.stack(foreground).sum(0),
        area,
        torch.cat([least, boxes[..., 2:].amax(0)], -1),
        torch.stack(nan_logits).sum(0, dtype=torch.int32),
    )


def _resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes masks ``(R, h, w)`` bool by PyTorch's "nearest" rule."""
    if EXTENSION_ERROR is None and maps.device.type == "cpu":
        resized: Tensor = ops.resize_masks(maps, size)
        return resized
    return F.interpolate(maps.view(torch.uint8)[:, None], size, mode="nearest")[:, 0].view(torch.bool)


def run_lengths(masks: Tensor) -> list[dict[str, Any]]:
    """The run lengths of binary masks, in the format of ``pycocotools.mask``.

    Args:
        masks: ``(R, H, W)`` bool.

    Returns:
        R dicts {"size": [H, W], "counts": bytes}.
    """
    if EXTENSION_ERROR is not None:
        from fastmask import reference

        return reference.rle_encode(masks)
    return _encode(masks, masks.shape[2], (masks.shape[1], masks.shape[2]))[0]


def _encode(maps: Tensor, width: int, size: tuple[int, int]) -> tuple[list[dict[str, Any]], Tensor]:
    """Run lengths and areas of masks ``(R, h, w)`` bool, or packed ``(R, h, ceil(w / 8))`` uint8, resized to ``size``.

    Returns:
        R run lengths; ``(R,)`` int64 on the host.
    """
    counts, offsets, areas = ops.rle_encode(maps.cpu(), width, size)
    characters, ends = counts.numpy().tobytes(), offsets.tolist()
    runs = [{"size": list(size), "counts": characters[begin:end]} for begin, end in pairwise(ends)]
    return runs, areas


def _bounding_boxes(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """The bounding boxes ``(R, 4)`` int32 of masks ``(R, h, w)`` bool, resized to ``size`` by the "nearest" rule."""
    rows, columns = (
        _nearest(inputs, outputs, maps.device) for inputs, outputs in zip(maps.shape[1:], size, strict=True)
    )
    sides = []
    for occupied in (maps[:, rows.unique()].any(1)[:, columns], maps[:, :, columns.unique()].any(2)[:, rows]):
        occupied = occupied.to(torch.uint8)
        first, last = occupied.argmax(1), occupied.shape[1] - occupied.flip(1).argmax(1)
        sides.append(torch.stack([first, last], 1) * occupied.amax(1, keepdim=True))
    (left, right), (top, bottom) = (side.unbind(1) for side in sides)
    return torch.stack([left, top, right, bottom], 1).to(torch.int32)


def _nearest(inputs: int, outputs: int, device: torch.device) -> Tensor:
    """``(outputs,)`` int64, the input of each output by PyTorch's "nearest" rule."""
    index = torch.arange(inputs, dtype=torch.float64, device=device)
    return F.interpolate(index[None, None], outputs, mode="nearest")[0, 0].long()


def _reference(class_logits: Tensor, masks: MaskSource, dtype: torch.dtype, options: _Options) -> list[dict[str, Any]]:
    from fastmask import reference

    mask_logits, geometry = masks.full_logits(dtype), masks.geometry
    results: list[dict[str, Any]] = reference.instance_inference(
        class_logits,
        mask_logits,
        geometry.size,
        top_k=options.top_k,
        rule=options.rule,
        stuff_classes=options.stuff_classes,
        padded_size=geometry.padded_size,
        valid_size=geometry.valid_size,
    )
    for b, result in enumerate(results):
        nan_logits = mask_logits[b].isnan().sum((-2, -1), dtype=torch.int32)
        result["nan_logits"] = nan_logits[result["queries"]]
        if options.boxes:
            result["boxes"] = _bounding_boxes(result["masks"], geometry.size)
        result["areas"] = result["masks"].sum((1, 2))
        if options.output == "rle":
            result["rle"] = reference.rle_encode(result["masks"])
    return results


def _fake(
    mask_logits: Tensor,
    queries: Tensor,
    packed: bool,
    *geometry: Unpack[GeometryArguments],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    height, width = result_size(geometry)
    groups = (width + 7) // 8
    if packed:
        masks = queries.new_empty((*queries.shape, height, groups), dtype=torch.uint8)
    else:
        pitch = width if queries.device.type == "cpu" else 8 * groups
        masks = queries.new_empty((*queries.shape, height, pitch), dtype=torch.bool)[..., :width]
    return (
        masks,
        queries.new_empty(queries.shape, dtype=torch.float32),
        queries.new_empty(queries.shape, dtype=torch.int32),
        queries.new_empty((*queries.shape, 4), dtype=torch.int32),
        queries.new_empty(queries.shape, dtype=torch.int32),
    )


def _fake_resize(masks: Tensor, size: Size) -> Tensor:
    return masks.new_empty((masks.shape[0], *size))


def _fake_rle(masks: Tensor, width: int, size: Size | None = None) -> tuple[Tensor, Tensor, Tensor]:
    counts = masks.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.uint8)
    offsets = masks.new_empty(masks.shape[0] + 1, dtype=torch.int64)
    return counts, offsets, masks.new_empty(masks.shape[0], dtype=torch.int64)


INSTANCE_MASKS = Operator(
    "instance_masks",
    f"(Tensor mask_logits, Tensor queries, bool packed, {GEOMETRY}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake,
    native=("cpu",),
    triton="instance",
)
RESIZE_MASKS = Operator(
    "resize_masks", "(Tensor masks, SymInt[] size) -> Tensor", _fake_resize, native=("cpu",), dtypes=(torch.bool,)
)
RLE_ENCODE = Operator(
    "rle_encode",
    "(Tensor masks, int width, SymInt[]? size=None) -> (Tensor, Tensor, Tensor)",
    _fake_rle,
    native=("cpu",),
    dtypes=(torch.bool, torch.uint8),
)
