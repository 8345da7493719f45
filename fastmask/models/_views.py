"""Predicts several views of an image (overlapping windows, scales and mirror images) and averages the predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from operator import index
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from fastmask.functional import SemanticView
from fastmask.models._images import Size
from fastmask.modules.resize import resize_bilinear
from fastmask.ops._tracing import ceil_div

if TYPE_CHECKING:
    from fastmask.models._base import PretrainedModel


def windowed_logits(
    images: Sequence[Tensor],
    segment: Callable[[Tensor], Iterable[Tensor]],
    size: int,
    stride: int,
    batch_size: int,
) -> Iterator[Tensor]:
    """The logits of each image, averaged over the windows that cover a pixel.

    Windows start every ``stride`` pixels, and the last row and column of windows ends with the image, as in Segmenter's
    code (arXiv:2105.05633, section 4.2). An image with a side smaller than a window is first enlarged until its smaller
    side equals the window's. Only one image's logits and those of one batch of windows are in memory at a time.

    Args:
        images: ``(C, H_b, W_b)``, normalized.
        segment: maps windows ``(n, C, size, size)`` to their logits, an iterable of n ``(K, size, size)``.
        size: side of a window in pixels.
        stride: pixels from one window to the next.
        batch_size: number of windows, from one or more images, to segment at a time.

    Yields:
        ``(K, H, W)`` float32 (float64 for float64 logits), of the size of the image or of the enlarged image.
    """
    images = [_enlarged(image[None], size)[0] for image in images]
    windows = [
        (b, top, left)
        for b, image in enumerate(images)
        for top in window_starts(image.shape[1], size, stride)
        for left in window_starts(image.shape[2], size, stride)
    ]
    total = None
    for first in range(0, len(windows), batch_size):
        batch = windows[first : first + batch_size]
        pixels = torch.stack([images[b][:, top : top + size, left : left + size] for b, top, left in batch])
        for i, logits in enumerate(segment(pixels), start=first):
            b, top, left = windows[i]
            if total is None:
                dtype = torch.promote_types(logits.dtype, torch.float32)
                total = logits.new_zeros((len(logits), *images[b].shape[1:]), dtype=dtype)
            total[:, top : top + size, left : left + size] += logits
            if i + 1 == len(windows) or windows[i + 1][0] != b:
                height, width = total.shape[1:]
                total /= _coverage(height, size, stride, total)[:, None]
                total /= _coverage(width, size, stride, total)
                yield total
                total = None


def windowed_batch(images: Tensor, segment: Callable[[Tensor], Tensor], size: int, stride: int) -> Tensor:
    """:func:`windowed_logits` for images of the same size, in operations that ``torch.export`` can trace for any number
    of images: no loop over images, no writes into slices. All windows are segmented at once.

    Args:
        images: ``(B, C, H, W)``, normalized; H and W must be static.
        segment: maps windows ``(n, C, size, size)`` to logits ``(n, K, h, w)`` of any size that cover them.
        size, stride: as for :func:`windowed_logits`.

    Returns:
        ``(B, K, H, W)``, of the size of the images or of the enlarged images.
    """
    images = _enlarged(images, size)
    height, width = images.shape[-2:]
    tops, lefts = window_starts(height, size, stride), window_starts(width, size, stride)
    windows = [images[..., top : top + size, left : left + size] for top in tops for left in lefts]
    logits = segment(torch.cat(windows)).unflatten(0, (len(windows), -1))
    rows = [
        _averaged([resize_bilinear(window, (size, size)) for window in row], lefts, size, -1)
        for row in logits.unflatten(0, (len(tops), len(lefts)))
    ]
    return _averaged(rows, tops, size, -2)


def _averaged(parts: Sequence[Tensor], starts: Sequence[int], size: int, dim: int) -> Tensor:
    """Joins parts along a dimension and averages them where they overlap."""
    borders = sorted({*starts, *(start + size for start in starts)})
    pieces = []
    for begin, end in pairwise(borders):
        there = [
            part.narrow(dim, begin - start, end - begin)
            for part, start in zip(parts, starts, strict=True)
            if start <= begin and end <= start + size
        ]
        pieces.append(sum(there[1:], there[0]) / len(there))
    return torch.cat(pieces, dim)


def window_starts(length: int, size: int, stride: int) -> list[int]:
    """Where the windows along one side of an image start; the last one ends with the image."""
    return [*range(0, length - size, stride), length - size]


def _coverage(length: int, size: int, stride: int, like: Tensor) -> Tensor:
    """``(length,)``: how many windows cover each pixel of one side."""
    coverage = like.new_zeros(length)
    for start in window_starts(length, size, stride):
        coverage[start : start + size] += 1
    return coverage


def _enlarged(images: Tensor, size: int) -> Tensor:
    height, width = images.shape[-2:]
    smaller = min(height, width)
    if smaller >= size:
        return images
    return resize_bilinear(images, (height * size // smaller, width * size // smaller))


@dataclass(frozen=True)
class ViewPlan:
    """A rectangle of the image, and how it is transformed for the network.

    Args:
        top, left, size: the rectangle, in pixels of the image.
        input_size: (height, width) to which the rectangle is resized.
        mirrored: whether left and right are exchanged.
    """

    top: int
    left: int
    size: Size
    input_size: Size
    mirrored: bool


def view_options(
    model: PretrainedModel,
    tasks: Sequence[str],
    window: int | tuple[int, int] | None,
    scales: Sequence[float],
    flip: bool,
) -> dict[str, Any]:
    """The arguments of the model's ``predict`` that ask for more than a single view of the whole image.

    Args:
        model: the model that predicts.
        tasks: the results to predict.
        window: (size, stride) in pixels, or a size that is also the stride.
        scales, flip: as for :class:`EvaluationViews`.

    Raises:
        ValueError: the model does not support these views, or none of the tasks averages several views.
    """
    views: dict[str, Any] = {}
    if window is not None:
        views["window"] = (window, window) if isinstance(window, int) else window
    if tuple(scales) != (1.0,):
        views["scales"] = tuple(scales)
    if flip:
        views["flip"] = True
    name = type(model).__name__
    if unknown := sorted(views.keys() - set(model.views)):
        known = ", ".join(model.views) or "whole images only"
        raise ValueError(f"a {name} does not predict with {', '.join(unknown)}; it does with {known}")
    if views and "semantic" not in tasks:
        raise ValueError(f"{', '.join(views)} goes with the task 'semantic' only, got {', '.join(map(repr, tasks))}")
    return views


@dataclass(frozen=True)
class EvaluationViews:
    """The views of an image that the network sees.

    Args:
        window: (size, stride) of square windows, in pixels of the scaled image; None for the whole image. The last row
            and column of windows ends with the image; windows are no larger than the image.
        scales: the factors by which the image is resized for the network.
        flip: add the mirror image of every view.
        batch_size: number of views to predict at a time.

    Raises:
        TypeError: a window that is not a pair of integers.
        ValueError: a stride outside 1..size, no scale, a scale that is not positive, or a batch size below 1.
    """

    window: tuple[int, int] | None
    scales: tuple[float, ...]
    flip: bool
    batch_size: int

    def __post_init__(self) -> None:
        if self.window is not None:
            try:
                size, stride = map(index, self.window)
            except (TypeError, ValueError) as error:
                raise TypeError(f"window must be (size, stride) in pixels, got {self.window!r}") from error
            if not 1 <= stride <= size:
                raise ValueError(f"window must have a stride of 1 to its size, got {(size, stride)}")
        if not self.scales or not min(self.scales) > 0:
            raise ValueError(f"scales must be positive, at least one, got {self.scales}")
        if self.batch_size < 1:
            raise ValueError(f"view_batch must be at least 1, got {self.batch_size}")

    @property
    def single(self) -> bool:
        """Whether the only view is the image itself."""
        return self.window is None and self.scales == (1.0,) and not self.flip

    def plan(self, size: Size) -> list[ViewPlan]:
        """The views of an image of (height, width) pixels, ordered by their top."""
        plans = []
        for scale in self.scales:
            side, stride = (max(1, round(x / scale)) for x in self.window or (scale * max(size), scale * max(size)))
            height, width = min(side, size[0]), min(side, size[1])
            input_size = (max(1, round(height * scale)), max(1, round(width * scale)))
            plans += [
                ViewPlan(top, left, (height, width), input_size, mirrored)
                for top in window_starts(size[0], height, stride)
                for left in window_starts(size[1], width, stride)
                for mirrored in ([False, True] if self.flip else [False])
            ]
        return sorted(plans, key=lambda plan: plan.top)

    def of(
        self, image: Tensor, size: Size, predict: Callable[[Tensor], tuple[Tensor, Tensor, Size]]
    ) -> Iterator[SemanticView]:
        """The network's predictions for each view, one batch at a time.

        Args:
            image: ``(C, H, W)``, in 0..1.
            size: (height, width) of the result; with windows, the size of the image.
            predict: maps pixels ``(n, C, H', W')`` to class logits ``(n, N, K+1)``, mask logits ``(n, N, h, w)`` and
                the padded size of the network's input.

        Raises:
            ValueError: there are windows, and ``size`` is not that of the image.
        """
        if self.window is not None and tuple(image.shape[1:]) != tuple(size):
            raise ValueError(
                f"with a window the result has the size of the image, {tuple(image.shape[1:])}; got sizes of {size}"
            )
        plan_of_image = self.plan((image.shape[1], image.shape[2]))
        for input_size, group in groupby(plan_of_image, key=lambda plan: plan.input_size):
            plans = list(group)
            for first in range(0, len(plans), self.batch_size):
                batch = plans[first : first + self.batch_size]
                class_logits, mask_logits, padded_size = predict(torch.stack([_pixels(image, plan) for plan in batch]))
                for plan, classes, masks in zip(batch, class_logits, mask_logits, strict=True):
                    view_size = size if plan.size == tuple(image.shape[1:]) else plan.size
                    yield SemanticView(
                        classes, masks, plan.top, plan.left, view_size, plan.mirrored, padded_size, input_size
                    )


@dataclass(frozen=True)
class ShortSideWindows(EvaluationViews):
    """Square windows as wide as the image's shorter side, at even distances along its longer one, as few as cover it
    (EoMT, arXiv:2503.19108).

    Args:
        side: the pixels of a side to which each window is resized.
    """

    side: int

    def plan(self, size: Size) -> list[ViewPlan]:
        shorter, longer = min(size), max(size)
        count = ceil_div(longer, shorter)
        starts = [round(i * (longer - shorter) / max(count - 1, 1)) for i in range(count)]
        corners = [(start, 0) if size[0] == longer else (0, start) for start in starts]
        return [ViewPlan(*corner, (shorter, shorter), (self.side, self.side), False) for corner in corners]


def _pixels(image: Tensor, plan: ViewPlan) -> Tensor:
    height, width = plan.size
    pixels = image[:, plan.top : plan.top + height, plan.left : plan.left + width]
    if plan.input_size != plan.size:
        resized = interpolate(pixels[None], plan.input_size, mode="bilinear", align_corners=False, antialias=True)
        pixels = resized[0].clamp(0, 1)
    return pixels.flip(-1) if plan.mirrored else pixels
