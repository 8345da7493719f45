"""Semantic segmentation from class logits, and mask logits or embeddings.

``fastmask::semantic_inference`` takes class probabilities and mask logits. It returns labels or scores of pixels, the
winning score, its margin over the next class, and the number of NaN logits of each query; score and margin are empty
without ``details``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastmask.ops._checks import check_choice
from fastmask.ops._extension import add_op_namespace_prefix, ops
from fastmask.ops._geometry import GEOMETRY, GeometryArguments, result_size
from fastmask.ops._mask_source import MaskSource, prepare
from fastmask.ops._registry import Operator
from fastmask.targets import label_dtype

if TYPE_CHECKING:
    from typing_extensions import Unpack

ORDERS = ("masks", "scores")
OUTPUTS = ("labels", "scores")


class SemanticDetails(NamedTuple):
    """Labels with their scores and margins.

    Args:
        labels: ``(B, H, W)``.
        score: ``(B, H, W)`` float32, the score of the winning class.
        margin: ``(B, H, W)`` float32, the winning score minus that of the next class, or the winning score if K is 1.
        nan_logits: ``(B, N)`` int32, how many mask logits of each query are NaN.
    """

    labels: Tensor
    score: Tensor
    margin: Tensor
    nan_logits: Tensor


@torch.no_grad()
def semantic_inference(
    class_logits: Tensor,
    mask_logits: Tensor | tuple[Tensor, Tensor],
    size: tuple[int, int],
    *,
    order: str = "masks",
    output: str = "labels",
    details: bool = False,
    padded_size: tuple[int, int] | None = None,
    valid_size: tuple[int, int] | None = None,
    backend: str = "auto",
) -> Tensor | SemanticDetails:
    """score[k] = sum_n softmax(class_logits[n])[k] sigmoid(mask_logits[n]); label = argmax_k score[k].

    MaskFormer (arXiv:2107.06278), section 3.4, "semantic inference". Resizing is bilinear (align_corners=False).
    Nothing of size N * H * W is stored, nor of K * H * W unless the output is scores; mask logits from embeddings are
    computed for one band of rows at a time.

    Infinite mask logits count as -1e30 and 1e30, NaN as -1e30: a query never wins where it reads a NaN.

    Args:
        class_logits: ``(B, N, K+1)`` floating point; the last class is "no object".
        mask_logits: ``(B, N, h, w)`` floating point; or a pair ``mask_embed (B, N, C)`` and ``pixel_embed
            (B, C, h, w)`` to multiply over C.
        size: (H, W) of the result, in pixels.
        order: "masks" resizes the mask logits and then scores them, as the original code does when it also computes
            panoptic results; "scores" scores the logits and resizes the scores, as Hugging Face's code does.
        output: "labels" or "scores".
        details: return labels with their scores, their margins and the number of NaN logits.
        padded_size: (height, width) of the padded network input, to which the logits are upsampled first.
        valid_size: (height, width) of the image within it, at its top left, to which they are then cropped.
        backend: "auto", "reference", "native" or "triton".

    Returns:
        "labels": ``(B, H, W)`` in the smallest of uint8, int16 and int32 that holds ``0..K-1``; ties take the lowest
        class. With ``details`` a :class:`SemanticDetails`. "scores": ``(B, K, H, W)`` float32 (float64 for float64
        logits, which only the reference reads). Carries no gradient.

    Raises:
        ValueError: shapes, devices or options that do not fit.
        TypeError: logits that are not floating point.
        RuntimeError: the requested backend cannot run.
    """
    check_choice("order", order, ORDERS)
    check_choice("output", output, OUTPUTS)
    if details and output != "labels":
        raise ValueError(f'details needs output="labels", got {output!r}')
    masks, backend, dtype = prepare(
        SEMANTIC_INFERENCE, class_logits, mask_logits, size, padded_size, valid_size, backend
    )
    if backend == "reference":
        return _reference(class_logits.to(dtype), masks, dtype, order, output, details)
    probabilities = class_logits.float().softmax(-1)[..., :-1].contiguous()
    results = _run_bands(backend, probabilities, masks, order, output, details)
    return SemanticDetails(*results) if details else results[0]


def _run_bands(
    backend: str, probabilities: Tensor, masks: MaskSource, order: str, output: str, details: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator's results, combined over bands; NaN logits in rows that two bands read are counted once."""
    bands = []
    for band in masks.bands():
        *maps, nan_logits = SEMANTIC_INFERENCE(
            backend, probabilities, band.mask_logits, order, output, details, *band.geometry
        )
        if band.repeated:
            nan_logits = nan_logits - band.repeated_nan_logits()
        bands.append((*maps, nan_logits))
    if len(bands) == 1:
        return bands[0]
    results, scores, margins, nan_logits = zip(*bands, strict=True)
    score, margin = (torch.cat(parts, -2) if details else parts[0] for parts in (scores, margins))
    return torch.cat(results, -2), score, margin, torch.stack(nan_logits).sum(0, dtype=torch.int32)


def _reference(
    class_logits: Tensor, masks: MaskSource, dtype: torch.dtype, order: str, output: str, details: bool
) -> Tensor | SemanticDetails:
    from fastmask import reference

    mask_logits, geometry = masks.full_logits(dtype), masks.geometry
    result = reference.semantic_inference(
        class_logits,
        mask_logits,
        geometry.size,
        order=order,
        output="scores" if details else output,
        padded_size=geometry.padded_size,
        valid_size=geometry.valid_size,
    )
    if not details:
        return result
    best = result.topk(min(2, result.shape[1]), dim=1).values
    margin = best[:, 0] - best[:, 1] if result.shape[1] > 1 else best[:, 0]
    nan_logits = mask_logits.isnan().sum((-2, -1), dtype=torch.int32)
    return SemanticDetails(result.argmax(1).to(label_dtype(result.shape[1])), best[:, 0], margin, nan_logits)


def _fake(
    probabilities: Tensor,
    mask_logits: Tensor,
    order: str,
    output: str,
    details: bool,
    *geometry: Unpack[GeometryArguments],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch_size, num_queries, num_classes = probabilities.shape
    pixels = (batch_size, *result_size(geometry))
    if output == "labels":
        result = mask_logits.new_empty(pixels, dtype=label_dtype(num_classes))
    else:
        result = mask_logits.new_empty((batch_size, num_classes, *pixels[1:]), dtype=torch.float32)
    score = mask_logits.new_empty(pixels if details else 0, dtype=torch.float32)
    return result, score, torch.empty_like(score), mask_logits.new_empty((batch_size, num_queries), dtype=torch.int32)


SEMANTIC_INFERENCE = Operator(
    "semantic_inference",
    f"(Tensor probabilities, Tensor mask_logits, str order, str output, bool details, {GEOMETRY}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
    native=("cpu",),
    triton="semantic",
)

torch.library.define(add_op_namespace_prefix("_set_query_skipping"), "(bool on) -> bool")


def set_query_skipping(on: bool) -> bool:
    """Sets whether the C++ kernel skips queries that cannot change a label, for tests; labels are the same either way.

    Returns the previous setting.
    """
    return ops._set_query_skipping(on)
