"""Semantic segmentation of one image from several views of it: windows, scales and mirror images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmask.ops._checks import check_choice
from fastmask.ops._mask_source import Band, MaskSource, prepare
from fastmask.ops.semantic import ORDERS, OUTPUTS, SEMANTIC_INFERENCE
from fastmask.targets import label_dtype

# The bytes of one band of scores: rows of the result. The scores of one view of the band take as much again.
BAND_BYTES = 64 << 20


@dataclass(frozen=True)
class SemanticView:
    """A network's prediction for a rectangle of an image.

    Args:
        class_logits: ``(N, K+1)`` floating point; the last class is "no object".
        mask_logits: ``(N, h, w)`` floating point; or a pair of ``mask_embed (N, C)`` and ``pixel_embed (C, h, w)``.
        top, left: the rectangle's first pixel in the result.
        size: (height, width) of the rectangle, in pixels of the result.
        mirrored: the network saw the rectangle with left and right exchanged.
        padded_size, valid_size: as in ``fastmask.semantic_inference``.
    """

    class_logits: Tensor
    mask_logits: Tensor | tuple[Tensor, Tensor]
    top: int
    left: int
    size: tuple[int, int]
    mirrored: bool = False
    padded_size: tuple[int, int] | None = None
    valid_size: tuple[int, int] | None = None

    @property
    def end(self) -> int:
        """The first row below the rectangle."""
        return self.top + self.size[0]


@torch.no_grad()
def merge_views(
    views: Iterable[SemanticView],
    size: tuple[int, int],
    *,
    order: str = "masks",
    output: str = "labels",
    backend: str = "auto",
) -> Tensor:
    """Averages the scores of the views that cover each pixel, and takes the class with the largest average.

    This is the evaluation of MaskFormer (arXiv:2107.06278: the scores of all scales and of their mirror images are
    averaged at the image's size) and, with windows, that of Segmenter (arXiv:2105.05633, section 4.2).

    Scores exist for one band of rows at a time. A view is taken from the iterable when the band reaches it, and dropped
    when the band has passed: with a generator, only the views of two rows of windows are in memory.

    Args:
        views: views of one image with the same K classes, in order of ``top``; together they cover every pixel.
        size: (H, W) of the result, in pixels.
        order: "masks" or "scores", as in ``fastmask.semantic_inference``.
        output: "labels" or "scores".
        backend: "auto", "reference", "native" or "triton".

    Returns:
        "labels": ``(H, W)``, in the smallest of uint8, int16 and int32 that holds ``0..K-1``. "scores": ``(K, H, W)``
        float32 (float64 for float64 logits, which only the reference reads).

    Raises:
        ValueError: no views, views out of order or beyond the image, pixels that no view covers, or shapes, devices or
            options that do not fit.
        TypeError: logits that are not floating point.
        RuntimeError: the requested backend cannot run.
    """
    check_choice("order", order, ORDERS)
    check_choice("output", output, OUTPUTS)
    height, width = size
    active_views = _ActiveViews(views, size, order, backend)
    first = active_views.covering(0)[0]
    num_classes, dtype = first.num_classes, first.dtype
    rows = min(height, max(1, BAND_BYTES // (num_classes * width * dtype.itemsize)))
    memory = torch.empty(num_classes * rows * width, dtype=dtype, device=first.device)
    shape = (height, width) if output == "labels" else (num_classes, height, width)
    result = memory.new_empty(shape, dtype=label_dtype(num_classes) if output == "labels" else dtype)
    top = 0
    while top < height:
        active = active_views.covering(top)
        # A band ends where a view begins or ends, so that every view of it covers all of its rows.
        end = min(top + rows, height, active_views.next_top, *(scores.view.end for scores in active))
        total = memory[: num_classes * (end - top) * width].view(num_classes, end - top, width)
        coverage = _add_scores(active, top, total)
        if output == "labels":
            result[top:end] = _largest(total, result.dtype)
        else:
            torch.div(total, coverage, out=result[:, top:end])
        top = end
    return result


class _Scores:
    """Computes the scores of any rows of a view."""

    def __init__(self, view: SemanticView, order: str, backend: str) -> None:
        masks: Tensor | tuple[Tensor, Tensor]
        if isinstance(view.mask_logits, Tensor):
            masks = view.mask_logits[None]
        else:
            mask_embed, pixel_embed = view.mask_logits
            masks = mask_embed[None], pixel_embed[None]
        class_logits = view.class_logits[None]
        self.view = view
        self.order = order
        self.masks, self.backend, reference_dtype = prepare(
            SEMANTIC_INFERENCE, class_logits, masks, view.size, view.padded_size, view.valid_size, backend
        )
        self.num_classes = class_logits.shape[-1] - 1
        self.device = class_logits.device
        self.dtype = reference_dtype if self.backend == "reference" else torch.float32
        if self.backend == "reference":
            self.whole = self._reference(class_logits)
        else:
            self.probabilities = class_logits.float().softmax(-1)[..., :-1].contiguous()

    def rows(self, top: int, end: int) -> Tensor:
        """``(K, end - top, width)`` of the rectangle's rows from ``top`` to ``end``."""
        if self.backend == "reference":
            scores = self.whole[:, top:end]
        else:
            band = _rows_of(self.masks, top, end)
            scores = SEMANTIC_INFERENCE(
                self.backend, self.probabilities, band.mask_logits, self.order, "scores", False, *band.geometry
            )[0][0]
        return scores.flip(-1) if self.view.mirrored else scores

    def _reference(self, class_logits: Tensor) -> Tensor:
        from fastmask import reference

        geometry = self.masks.geometry
        return reference.semantic_inference(
            class_logits.to(self.dtype),
            self.masks.full_logits(self.dtype),
            geometry.size,
            order=self.order,
            output="scores",
            padded_size=geometry.padded_size,
            valid_size=geometry.valid_size,
        )[0]


def _rows_of(masks: MaskSource, top: int, end: int) -> Band:
    first, last = masks.geometry.input_rows(top, end - top)
    return Band(masks.logits_of_rows(first, last), slice(top, end), 0, masks.geometry.arguments(first, top, end - top))


class _ActiveViews:
    """The views that a band needs, each taken from the iterable once."""

    def __init__(self, views: Iterable[SemanticView], size: tuple[int, int], order: str, backend: str) -> None:
        self.views: Iterator[SemanticView] = iter(views)
        self.size, self.order, self.backend = size, order, backend
        self.active: list[_Scores] = []
        self.following = next(self.views, None)

    @property
    def next_top(self) -> int:
        return self.size[0] if self.following is None else self.following.top

    def covering(self, row: int) -> list[_Scores]:
        """The views that cover this row."""
        self.active = [scores for scores in self.active if scores.view.end > row]
        while self.following is not None and self.following.top <= row:
            view = self.following
            height, width = view.size
            if not (min(view.left, view.top) >= 0 and view.left + width <= self.size[1] and view.end <= self.size[0]):
                raise ValueError(
                    f"views holds {height} x {width} pixels at ({view.top}, {view.left}); "
                    f"expected views to lie within {self.size[0]} x {self.size[1]}"
                )
            self.active.append(_Scores(view, self.order, self.backend))
            self.following = next(self.views, None)
            if self.following is not None and self.following.top < view.top:
                raise ValueError(f"views must be sorted by top, got {self.following.top} after {view.top}")
        if not self.active:
            raise ValueError(f"views leave row {row} uncovered")
        return self.active


def _add_scores(active: list[_Scores], top: int, total: Tensor) -> Tensor:
    """Sums the views' scores of the rows from ``top`` into ``total (K, rows, W)``; counts the views per column."""
    total.zero_()
    coverage = total.new_zeros(total.shape[2])
    end = top + total.shape[1]
    for scores in active:
        view = scores.view
        if scores.num_classes != total.shape[0]:
            raise ValueError(f"views have {total.shape[0]} and {scores.num_classes} classes; expected one number")
        columns = slice(view.left, view.left + view.size[1])
        total[..., columns] += scores.rows(top - view.top, end - view.top)
        coverage[columns] += 1
    if not bool(coverage.all()):
        raise ValueError(f"views leave columns of rows {top}..{end} uncovered")
    return coverage


@torch.no_grad()
def labels_of_scores(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """The class of the largest score of each pixel, after bilinear resizing (align_corners=False) a band of rows at a
    time.

    Args:
        scores: ``(K, h, w)`` floating point.
        size: (H, W) of the result, in pixels.

    Returns:
        ``(H, W)``, in the smallest of uint8, int16 and int32 that holds ``0..K-1``.
    """
    (num_classes, rows, _), (height, width) = scores.shape, size
    labels = torch.empty(size, dtype=label_dtype(num_classes), device=scores.device)
    position = ((torch.arange(height, dtype=torch.float64) + 0.5) * (rows / height) - 0.5).clamp(0, rows - 1)
    first = position.long()
    share = (position - first).to(scores).view(-1, 1)
    first = first.to(scores.device)
    step = max(1, BAND_BYTES // (num_classes * width * scores.element_size()))
    for top in range(0, height, step):
        band = slice(top, top + step)
        following = (first[band] + 1).clamp(max=rows - 1)
        lines = scores[:, first[band]].lerp(scores[:, following], share[band])  # [K, band, w]
        lines = F.interpolate(lines[None], (lines.shape[1], width), mode="bilinear", align_corners=False)[0]
        labels[band] = _largest(lines, labels.dtype)
    return labels


def _largest(scores: Tensor, dtype: torch.dtype) -> Tensor:
    """The class of the largest of ``scores (K, ...)``, the lowest among equals; overwrites ``scores``."""
    if scores.device.type != "cpu":
        return scores.argmax(0).to(dtype)
    # PyTorch's argmax over the first dimension takes ten times as long on a CPU.
    best, labels = scores[0], torch.zeros(scores.shape[1:], dtype=dtype)
    for k in range(1, len(scores)):
        labels.masked_fill_(scores[k] > best, k)
        torch.maximum(best, scores[k], out=best)
    return labels
