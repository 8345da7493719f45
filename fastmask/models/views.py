"""Views of an image for evaluation: windows, scales and mirror images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import index

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from fastmask.functional import SemanticView
from fastmask.models.images import Size
from fastmask.models.windows import window_starts


@dataclass(frozen=True)
class ViewPlan:
    """A rectangle of the image, and how the network sees it.

    Args:
        top, left, size: the rectangle, in pixels of the image.
        input_size: (height, width) to which it is resized.
        mirrored: whether left and right are exchanged.
    """

    top: int
    left: int
    size: Size
    input_size: Size
    mirrored: bool


@dataclass(frozen=True)
class EvaluationViews:
    """Which views of an image the network sees.

    Args:
        window: (size, stride) of square windows, in pixels of the image as scaled; None for the whole image. The last
            row and column of windows ends with the image; where the image is smaller, so is the window.
        scales: how much larger than the image the network sees it.
        flip: add the mirror image of every view.
        batch_size: how many views to predict at a time.

    Raises:
        TypeError: a window that is no pair of integers.
        ValueError: a stride out of 1..size, no scale or one that is not positive, or a batch below 1.
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
        """The only view is the image itself."""
        return self.window is None and self.scales == (1.0,) and not self.flip

    def plan(self, size: Size) -> list[ViewPlan]:
        """The views of an image of (height, width) pixels, by rising top."""
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
        """What the network says of each view, made when it is asked for.

        Args:
            image: ``(C, H, W)``, in 0..1.
            size: (height, width) of the result; that of the image if there are windows.
            predict: from pixels ``(n, C, H', W')`` to class logits ``(n, N, K+1)``, mask logits ``(n, N, h, w)`` and
                the padded size of the network's input.

        Raises:
            ValueError: windows, and a result of another size than the image.
        """
        if self.window is not None and tuple(image.shape[1:]) != tuple(size):
            raise ValueError(
                f"with a window the result has the size of the image, {tuple(image.shape[1:])}; got sizes of {size}"
            )
        for input_size, plans in groupby(self.plan(tuple(image.shape[1:])), key=lambda plan: plan.input_size):
            plans = list(plans)
            for first in range(0, len(plans), self.batch_size):
                batch = plans[first : first + self.batch_size]
                class_logits, mask_logits, padded_size = predict(torch.stack([_pixels(image, plan) for plan in batch]))
                for plan, classes, masks in zip(batch, class_logits, mask_logits, strict=True):
                    view_size = size if self.window is None else plan.size
                    yield SemanticView(
                        classes, masks, plan.top, plan.left, view_size, plan.mirrored, padded_size, input_size
                    )


def _pixels(image: Tensor, plan: ViewPlan) -> Tensor:
    height, width = plan.size
    pixels = image[:, plan.top : plan.top + height, plan.left : plan.left + width]
    if plan.input_size != plan.size:
        resized = interpolate(pixels[None], plan.input_size, mode="bilinear", align_corners=False, antialias=True)
        pixels = resized[0].clamp(0, 1)
    return pixels.flip(-1) if plan.mirrored else pixels
