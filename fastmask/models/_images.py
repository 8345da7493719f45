"""Pads images of any sizes into one batch, fits targets to it, and warns of images in 0..255, which are all white to a
network that expects 0..1.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from fastmask.ops._tracing import ceil_div, known, same_size
from fastmask.targets import Targets

# By ImageNet's statistics, the maximum of an image lies 2.7 deviations above the mean in 0..1, and hundreds in 0..255.
DEVIATIONS = 20


class PixelRange:
    """Checks the pixels of every batch on the CPU until it has warned, but on a GPU only those of the first batch.

    The host does not wait for a GPU: the maximum of the first batch is copied asynchronously and read at a later batch.
    """

    def __init__(self) -> None:
        self._done = False
        self._pending: tuple[Tensor, torch.cuda.Event] | None = None

    def check(self, pixels: Tensor, limit: float) -> None:
        """Warns, once per process, of pixels above the limit.

        Args:
            pixels: the network's input, before normalization.
            limit: a value that no pixel of an image in 0..1 exceeds.
        """
        # Traced programs cannot read values, and tensor subclasses, such as fake tensors, may have none.
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(pixels) is not Tensor or self._done:
            return
        if pixels.device.type == "cpu":
            self._judge(pixels.detach().amax().item(), limit)
        elif pixels.device.type == "cuda" and self._pending is None:
            if not torch.cuda.is_current_stream_capturing():
                self._pending = _copy_to_host(pixels.detach().amax().float())
        elif self._pending is not None and self._pending[1].query():
            self._done = True
            self._judge(self._pending[0].item(), limit)

    def _judge(self, highest: float, limit: float) -> None:
        if highest > limit:
            self._done = True
            warnings.warn(
                f"images hold {highest:.6g}; expected values in 0..1: divide bytes by 255, and leave the normalization "
                "to the model",
                stacklevel=5,
            )


def _copy_to_host(value: Tensor) -> tuple[Tensor, torch.cuda.Event]:
    """Starts a copy to the host. Returns the host tensor and the event after which it is valid."""
    host = torch.empty((), pin_memory=True)
    host.copy_(value, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(value.device))
    return host, event


PIXEL_RANGE = PixelRange()


Size = tuple[int, int]
Images = Tensor | Sequence[Tensor]


@dataclass(frozen=True)
class ImageBatch:
    """Images padded at the bottom and right to one size.

    Args:
        pixels: ``(B, C, H, W)`` floating point, 0 at padding.
        sizes: (height, width) of each image without padding; a single entry for all images while ``torch.export``
            traces a dynamic batch size.
    """

    pixels: Tensor
    sizes: tuple[Size, ...]

    @property
    def padded_size(self) -> Size:
        return self.pixels.shape[-2], self.pixels.shape[-1]

    @property
    def uniform(self) -> bool:
        """Whether all images have the same size."""
        return all(same_size(size, self.sizes[0]) for size in self.sizes)

    def zero_padding(self, pixels: Tensor) -> Tensor:
        """``pixels (B, C, H, W)`` with 0 wherever this batch has padding."""
        outside = self.outside()
        return pixels if outside is None else pixels.masked_fill(outside[:, None], 0)

    def outside(self) -> Tensor | None:
        """``(B, H, W)`` bool, True at padding; None if there is none."""
        if all(same_size(size, self.padded_size) for size in self.sizes):
            return None
        return ~_inside(self.sizes, self.padded_size, self.pixels.device)

    def padding_mask(self, height: int, width: int) -> Tensor | None:
        """``(B, height, width)`` bool for a feature map of that size: True at cells whose first pixel is padding. None
        if there are none, as with images of the same size and cells of ``divisibility`` pixels.
        """
        padded_height, padded_width = self.padded_size
        cells = [(_cells(h, padded_height, height), _cells(w, padded_width, width)) for h, w in self.sizes]
        if all(same_size(cell, (height, width)) for cell in cells):
            return None
        return ~_inside(cells, (height, width), self.pixels.device).expand(self.pixels.shape[0], -1, -1)


class ImagePreprocessor(nn.Module):
    """Pads and normalizes a network's input images.

    Args:
        mean: the mean of each channel, which is subtracted from images in 0..1.
        std: the standard deviation of each channel, which divides the difference.
        divisibility: height and width of a batch are padded to multiples of this.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], divisibility: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)
        self.divisibility = divisibility
        self._highest_pixel = max(m + DEVIATIONS * s for m, s in zip(mean, std, strict=True))

    def forward(self, images: Images) -> ImageBatch:
        """The images in one padded batch, not yet normalized."""
        batch = pad_images(images, self.divisibility, len(self.mean))
        PIXEL_RANGE.check(batch.pixels, self._highest_pixel)
        return batch

    def normalize(self, batch: ImageBatch) -> Tensor:
        """Normalized pixels, in the model's dtype; padding is 0, as in the original code."""
        pixels = (batch.pixels - self.mean.float()) / self.std.float()
        return batch.zero_padding(pixels).to(self.mean.dtype)


def pad_images(images: Images, divisibility: int, channels: int = 3) -> ImageBatch:
    """The images in one padded batch.

    Args:
        images: ``(B, C, H, W)``, or a list of ``(C, H_b, W_b)`` of any sizes; floating point.
        divisibility: height and width of the result are multiples of this.
        channels: C.

    Raises:
        TypeError: anything else, or tensors that are not floating point.
        ValueError: a wrong shape, no images, an empty image, or images on different devices.
    """
    if isinstance(images, Tensor):
        if images.dim() != 4 or images.shape[1] != channels:
            raise ValueError(f"images has shape {tuple(images.shape)}; expected (B, {channels}, H, W)")
        _check_image("images", images)
        count = images.shape[0] if isinstance(images.shape[0], int) else 1
        sizes = [(images.shape[-2], images.shape[-1])] * count
    else:
        if not isinstance(images, list | tuple):
            raise TypeError(f"images must be a tensor or a list of tensors, got {type(images).__name__}")
        for b, image in enumerate(images):
            if not isinstance(image, Tensor):
                raise TypeError(f"images[{b}] must be a tensor, got {type(image).__name__}")
            if image.dim() != 3 or image.shape[0] != channels:
                raise ValueError(f"images[{b}] has shape {tuple(image.shape)}; expected ({channels}, H, W)")
            _check_image(f"images[{b}]", image)
            if image.device != images[0].device:
                raise ValueError(f"images[{b}] is on {image.device}, images[0] on {images[0].device}")
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
    if len(sizes) == 0:
        raise ValueError("images is empty; expected at least one image")
    height, width = (ceil_div(max(side), divisibility) * divisibility for side in zip(*sizes, strict=True))
    if isinstance(images, Tensor):
        pixels = pad_plane(images, (height, width))
    else:
        pixels = torch.stack([pad_plane(image, (height, width)) for image in images])
    return ImageBatch(pixels, tuple(sizes))


def fit_targets(targets: Targets | Sequence[Mapping[str, Tensor]], images: ImageBatch, num_classes: int) -> Targets:
    """Pads targets to the size of the padded images. Padding belongs to no target and is void.

    Args:
        targets: for each image a dict of ``labels (M_b,)`` and ``masks (M_b, H_b, W_b)`` of the image's size; or
            :class:`fastmask.Targets` of the images' common size, of their largest height and width, or of the padded
            size.
        images: the batch that they belong to.
        num_classes: K.

    Raises:
        TypeError: targets of another type.
        ValueError: the number of images differs, masks differ in size from their image, or (for labels on the CPU) a
            label lies outside ``0..K-1``.
    """
    if isinstance(targets, Targets):
        return _fit_batch(targets, images, num_classes)
    if not isinstance(targets, list | tuple):
        raise TypeError(f"targets must be Targets or a list of dicts, got {type(targets).__name__}")
    if len(targets) != len(images.sizes):
        raise ValueError(f"targets has {len(targets)} images; the model got {len(images.sizes)}")
    for b, (target, size) in enumerate(zip(targets, images.sizes, strict=True)):
        masks = target.get("masks") if isinstance(target, Mapping) else None
        if masks is not None and masks.dim() == 3 and tuple(masks.shape[1:]) != size:
            height, width = masks.shape[1:]
            raise ValueError(f'targets[{b}]["masks"] is {height} x {width} pixels; its image is {size[0]} x {size[1]}')
    return Targets.from_list(targets, num_classes=num_classes, size=images.padded_size, device=images.pixels.device)


def _fit_batch(targets: Targets, images: ImageBatch, num_classes: int) -> Targets:
    if targets.batch_size != len(images.sizes):
        raise ValueError(f"targets has {targets.batch_size} images; the model got {len(images.sizes)}")
    largest = tuple(max(side) for side in zip(*images.sizes, strict=True))
    if targets.size not in (largest, images.padded_size):
        raise ValueError(
            f"the masks of targets are {targets.size[0]} x {targets.size[1]} pixels; "
            f"the images are {largest[0]} x {largest[1]}{'' if images.uniform else ' at most'}"
        )
    if targets.device.type == "cpu" and targets.labels.numel() > 0 and not torch.compiler.is_compiling():
        low, high = int(targets.labels.min()), int(targets.labels.max())
        if low < -1 or high >= num_classes:
            raise ValueError(
                f"targets.labels holds {low if low < -1 else high}; expected 0..{num_classes - 1}, or -1 for padding"
            )
    if targets.device != images.pixels.device:
        targets = targets.to(images.pixels.device, non_blocking=True)
    if all(size == images.padded_size for size in images.sizes):
        return targets
    inside = _inside(images.sizes, images.padded_size, images.pixels.device)
    if targets.segments is not None:
        targets = targets.with_void_value()
        segments = pad_plane(targets.segment_map, images.padded_size, targets.void)
        return replace(targets, segments=segments.masked_fill(~inside, targets.void))
    assert targets.masks is not None
    masks = pad_plane(targets.masks, images.padded_size)
    if not images.uniform:
        masks = masks * inside[:, None]
    if targets.valid is not None:
        inside = inside & pad_plane(targets.valid, images.padded_size, False)
    return replace(targets, masks=masks, valid=inside)


def _cells(length: int, padded_length: int, count: int) -> int:
    """How many of the ``count`` cells along a side begin within its first ``length`` pixels."""
    if known(padded_length % count == 0):  # a simpler expression, which tracing can prove equal to ``count``
        return ceil_div(length, padded_length // count)
    return ceil_div(length * count, padded_length)


def _inside(sizes: Sequence[Size], canvas: Size, device: torch.device) -> Tensor:
    """``(B, *canvas)`` bool: True in a top left rectangle of each size. Built without a copy from the host."""
    rows, columns = (torch.arange(side, device=device) for side in canvas)
    return torch.stack([(rows < height)[:, None] & (columns < width) for height, width in sizes])


def pad_plane(tensor: Tensor, size: Size, value: float | bool = 0) -> Tensor:
    """Pads the last two dimensions to ``size`` at the bottom and right."""
    bottom, right = size[0] - tensor.shape[-2], size[1] - tensor.shape[-1]
    if known(bottom == 0) and known(right == 0):
        return tensor
    return pad(tensor, (0, right, 0, bottom), value=value)


def _check_image(name: str, image: Tensor) -> None:
    if not image.is_floating_point():
        raise TypeError(f"{name} must be floating point with values in 0..1, got {image.dtype}; divide bytes by 255")
    if 0 in image.shape[-2:]:
        raise ValueError(f"{name} has shape {tuple(image.shape)}, without any pixel")
