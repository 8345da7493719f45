"""Per-pixel classification: class maps as targets, the loss, and results of any size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fastmask.models._images import ImageBatch, Size, fit_targets, pad_plane
from fastmask.modules.across_processes import across_processes
from fastmask.modules.resize import resize_bilinear
from fastmask.ops._checks import check_choice
from fastmask.targets import Targets, check_class_map

PixelTargets = Tensor | Targets | Sequence[Tensor] | Sequence[Mapping[str, Tensor]]
OUTPUTS = ("labels", "scores")


def fit_class_map(targets: PixelTargets, images: ImageBatch, num_classes: int, ignore_index: int) -> Tensor:
    """The class of each pixel of the padded images; padding is ignored.

    Args:
        targets: ``(B, H, W)`` integers in ``0..K-1`` or ``ignore_index``, of the images' common size, of their largest
            height and width, or of the padded size; or a list of ``(H_b, W_b)``, each of its image's size; or the
            targets of :class:`fastmask.MaskFormer`, where void pixels and pixels without a target are ignored.
        images: the batch that the targets belong to.
        num_classes: K.
        ignore_index: the value of pixels without a class.

    Returns:
        ``(B, H, W)`` int64 on the images' device.

    Raises:
        TypeError: targets of another type, or class maps that are not integers.
        ValueError: the number or size of the images differs, or (for targets on the CPU) a class lies outside
            ``0..K-1``.
    """
    if isinstance(targets, Tensor):
        check_class_map("targets", targets, 3, num_classes, ignore_index)
        largest = tuple(max(side) for side in zip(*images.sizes, strict=True))
        if len(targets) != len(images.sizes):
            raise ValueError(f"targets has {len(targets)} images; the model got {len(images.sizes)}")
        if tuple(targets.shape[1:]) not in (largest, images.padded_size):
            raise ValueError(
                f"targets is {targets.shape[1]} x {targets.shape[2]} pixels; "
                f"the images are {largest[0]} x {largest[1]}{'' if images.uniform else ' at most'}"
            )
        classes = targets.to(images.pixels.device, torch.int64, non_blocking=True)
        classes = pad_plane(classes, images.padded_size, ignore_index)
        outside = images.outside()
        return classes if outside is None else classes.masked_fill(outside, ignore_index)
    if isinstance(targets, list | tuple) and any(isinstance(target, Tensor) for target in targets):
        if len(targets) != len(images.sizes):
            raise ValueError(f"targets has {len(targets)} images; the model got {len(images.sizes)}")
        for b, (target, size) in enumerate(zip(targets, images.sizes, strict=True)):
            check_class_map(f"targets[{b}]", target, 2, num_classes, ignore_index)
            if tuple(target.shape) != size:
                height, width = target.shape
                raise ValueError(f"targets[{b}] is {height} x {width} pixels; its image is {size[0]} x {size[1]}")
        maps = [target.to(images.pixels.device, torch.int64, non_blocking=True) for target in targets]
        return torch.stack([pad_plane(target, images.padded_size, ignore_index) for target in maps])
    if isinstance(targets, Targets | list | tuple):
        return fit_targets(targets, images, num_classes).class_map(ignore_index)
    raise TypeError(f"targets must be class maps, Targets or a list of dicts, got {type(targets).__name__}")


def per_pixel_loss(logits: Tensor, classes: Tensor, ignore_index: int) -> Tensor:
    """The loss of one layer; see :func:`per_pixel_losses`.

    Args:
        logits: ``(B, K, h, w)`` floating point.
        classes, ignore_index: as for :func:`per_pixel_losses`.
    """
    return per_pixel_losses([logits], classes, ignore_index)[0]


def per_pixel_losses(layers: Iterable[Tensor], classes: Tensor, ignore_index: int) -> list[Tensor]:
    """Cross-entropy of bilinearly upsampled logits, averaged over the pixels that have a class; 0 if none has.

    With several processes the average is over the pixels of all processes: see :func:`across_processes`.

    Args:
        layers: the logits of each layer, ``(B, K, h, w)`` floating point.
        classes: ``(B, H, W)`` int64 in ``0..K-1`` or ``ignore_index``.
        ignore_index: the value of ignored pixels.

    Returns:
        a scalar for each layer, float32 (float64 for float64 logits).
    """
    (num_pixels,) = across_processes([(classes != ignore_index).sum()], least=(1,))
    flat_classes = classes.flatten()
    losses = []
    for logits in layers:
        # With the classes of a pixel side by side, a CPU resizes and normalizes twice as fast.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32), memory_format=torch.channels_last)
        rows = resize_bilinear(logits, classes.shape[1:]).permute(0, 2, 3, 1).flatten(0, 2)
        losses.append(cross_entropy(rows, flat_classes, ignore_index=ignore_index, reduction="sum") / num_pixels)
    return losses


def pixel_results(logits: Tensor, size: Size, output: str) -> Tensor:
    """Labels or scores of images that share one result size.

    Args:
        logits: ``(B, K, H, W)``.
        size: (height, width) of the result, to which the logits are resized.
        output: "labels" or "scores".

    Returns:
        "labels": ``(B, *size)``, the smallest of uint8, int16 and int32 that holds ``0..K-1``. "scores":
        ``(B, K, *size)``, the softmax over classes.
    """
    logits = resize_bilinear(logits, size)
    if output == "scores":
        return logits.softmax(1)
    highest = logits.shape[1] - 1
    dtype = next(dtype for dtype in (torch.uint8, torch.int16, torch.int32) if highest <= torch.iinfo(dtype).max)
    return logits.argmax(1).to(dtype)


def check_output(output: str) -> None:
    """Raises a ValueError for anything but "labels" and "scores"."""
    check_choice("output", output, OUTPUTS)
