"""Images in overlapping windows of one size, and the average of what a network says of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fastmask.models.per_pixel import upsample


def windowed_logits(
    images: Sequence[Tensor],
    segment: Callable[[Tensor], Tensor],
    size: int,
    stride: int,
    batch_size: int,
) -> Iterator[Tensor]:
    """The logits of each image, averaged over the windows that cover a pixel.

    Windows start every ``stride`` pixels, and the last row and column of them ends with the image, as in Segmenter's
    code (arXiv:2105.05633, section 4.2). An image with a side smaller than a window is enlarged first, its smaller side
    to the window's. One image's logits are in memory at a time, besides those of one batch of windows.

    Args:
        images: ``(C, H_b, W_b)``, normalised.
        segment: from windows ``(n, C, size, size)`` to their logits, an iterable of n ``(K, size, size)``.
        size: side of a window.
        stride: pixels from one window to the next.
        batch_size: how many windows, of one or more images, to segment at a time.

    Yields:
        ``(K, H, W)`` float32 (float64 for such logits), of the size of the image or of its enlargement.
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
    """What :func:`windowed_logits` yields for images of one size, in operations that ``torch.export`` traces for any
    number of images: without a loop over them, and without writing into slices. All windows are segmented at once.

    Args:
        images: ``(B, C, H, W)``, normalised; H and W are known.
        segment: from windows ``(n, C, size, size)`` to logits ``(n, K, h, w)`` that cover them, of any size.
        size, stride: as for :func:`windowed_logits`.

    Returns:
        ``(B, K, H, W)``, of the size of the images or of their enlargement.
    """
    images = _enlarged(images, size)
    height, width = images.shape[-2:]
    tops, lefts = window_starts(height, size, stride), window_starts(width, size, stride)
    windows = [images[..., top : top + size, left : left + size] for top in tops for left in lefts]
    logits = segment(torch.cat(windows)).unflatten(0, (len(windows), -1))
    rows = [
        _averaged([upsample(window, (size, size)) for window in row], lefts, size, -1)
        for row in logits.unflatten(0, (len(tops), len(lefts)))
    ]
    return _averaged(rows, tops, size, -2)


def _averaged(parts: Sequence[Tensor], starts: Sequence[int], size: int, dim: int) -> Tensor:
    """Overlapping parts joined along a dimension: between two borders of parts, the mean of those that lie there."""
    borders = sorted({*starts, *(start + size for start in starts)})
    pieces = []
    for begin, end in pairwise(borders):
        there = [
            part.narrow(dim, begin - start, end - begin)
            for part, start in zip(parts, starts, strict=True)
            if start <= begin and end <= start + size
        ]
        pieces.append(sum(there) / len(there))
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
    return upsample(images, (height * size // smaller, width * size // smaller))
