"""The truth of one image in the forms that data sets and batches have it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastmask.targets import Targets, foreground, label_dtype

# The most pixels of a map that are widened to int64 at a time.
BAND_PIXELS = 1 << 20


class Truth(NamedTuple):
    """The segments or masks of one image.

    Attributes:
        labels: ``(M,)`` integers, the class of each segment or mask; the first -1 begins the padding.
        segments: ``(H, W)`` integers, the index ``0..M-1`` of each pixel's segment; other values are void.
        masks: ``(M, H, W)`` bool, or 0 and 1, if ``segments`` is None; they may overlap.
        crowd: ``(M,)`` bool, which of them are crowd regions.
        areas: ``(M,)``, the areas that the annotation states.
        valid: ``(H, W)`` bool, False at unlabeled pixels, which masks alone do not mark.
    """

    labels: Tensor
    segments: Tensor | None = None
    masks: Tensor | None = None
    crowd: Tensor | None = None
    areas: Tensor | None = None
    valid: Tensor | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        plane = self.masks if self.segments is None else self.segments
        assert plane is not None
        return plane.shape[-2], plane.shape[-1]

    def cropped(self, size: tuple[int, int]) -> Truth:
        """The top left ``size`` of the planes."""
        planes = {name: getattr(self, name) for name in ("segments", "masks", "valid")}
        return self._replace(
            **{name: plane[..., : size[0], : size[1]] for name, plane in planes.items() if plane is not None}
        )

    def planes(self, index: Tensor) -> tuple[Tensor] | tuple[Tensor, Tensor]:
        """The masks with these indices; or the segment map, and the values that the segments have there."""
        if self.segments is None:
            assert self.masks is not None
            return (self.masks[index.to(self.masks.device)],)
        segments = self.segments
        if len(self.labels) - 1 > torch.iinfo(segments.dtype).max:  # in which PyTorch would wrap the indices
            segments = segments.long()
        return segments, index.to(segments.device, segments.dtype)

    def segment_map(self, name: str) -> Tensor:
        """``(H, W)`` integers: ``segments``, or the index of the last mask that owns a pixel and -1 where none does;
        errors call the masks ``name``."""
        if self.segments is not None:
            return self.segments
        assert self.masks is not None
        segments = torch.full(self.size, -1, dtype=torch.int32, device=self.masks.device)
        for m, mask in enumerate(self.masks):
            segments.masked_fill_(foreground(name, mask), m)
        return segments if self.valid is None else segments.masked_fill_(~self.valid, -1)

    def class_map(self, name: str, ignore_index: int) -> Tensor:
        """``(H, W)`` integers, the class of each pixel; ``ignore_index`` for void and padding."""
        segments = self.segment_map(name)
        labels = self.labels.long()
        labels = torch.cat([labels.masked_fill(labels < 0, ignore_index), labels.new_tensor([ignore_index])])
        dtype = torch.int64
        if 0 <= int(labels.min()) <= int(labels.max()) < 2**15:
            dtype = label_dtype(int(labels.max()) + 1)
        lookup, count = labels.to(dtype), len(self.labels)
        classes = segments.new_empty(segments.shape, dtype=dtype)
        for band in bands_of_rows(segments):
            index = segments[band].long()
            classes[band] = lookup[index.masked_fill_((index < 0) | (index >= count), count)]
        return classes


def bands_of_rows(plane: Tensor | np.ndarray) -> Iterator[slice]:
    """Bands of the rows of ``(H, W)`` with at most ``BAND_PIXELS`` pixels each."""
    rows = max(1, BAND_PIXELS // max(1, plane.shape[1]))
    return (slice(top, top + rows) for top in range(0, plane.shape[0], rows))


def truths(targets: Any, sizes: Sequence[tuple[int, int]] | None, count: int) -> list[Truth]:
    """The truth of each of ``count`` images.

    Args:
        targets: :class:`fastmask.Targets`, whose planes may be padded at the bottom and right; or for each image a
            mapping or an object, such as :class:`fastmask.data.Sample`, with "labels" (or "class_labels") and either
            "segments" or "masks" (or "mask_labels", in which a plane of two dimensions holds segments), and possibly
            "crowd", "areas" and "valid".
        sizes: the (height, width) to which each image's planes are cropped; None leaves them as they are.

    Raises:
        TypeError: targets in another form.
        ValueError: numbers of images that differ, a plane that is smaller than its size, or labels and masks whose
            numbers differ.
    """
    if isinstance(targets, Targets):
        every = [_of_batch(targets, b) for b in range(targets.batch_size)]
    elif isinstance(targets, Sequence):
        every = [_of_image(b, target) for b, target in enumerate(targets)]
    else:
        raise TypeError(f"targets must be fastmask.Targets or a sequence of one for each image, got {type(targets)}")
    if len(every) != count:
        raise ValueError(f"targets has {len(every)} images, outputs {count}")
    if sizes is None:
        return every
    return [truth.cropped(size) for truth, size in zip(every, sizes_of(sizes, [t.size for t in every]), strict=True)]


def class_maps(
    targets: Any, sizes: Sequence[tuple[int, int]] | None, count: int, ignore_index: int
) -> Iterator[Tensor]:
    """The class map ``(H, W)`` of each of ``count`` images. ``targets`` are class maps ``(B, H, W)`` or a sequence of
    ``(H_b, W_b)``, or targets as for :func:`truths`."""
    are_maps = isinstance(targets, Sequence) and any(isinstance(target, Tensor) for target in targets)
    if not (are_maps or isinstance(targets, Tensor)):
        for b, truth in enumerate(truths(targets, sizes, count)):
            yield truth.class_map(f"targets[{b}]", ignore_index)
        return
    if len(targets) != count:
        raise ValueError(f"targets has {len(targets)} images, outputs {count}")
    shapes = [(target.shape[-2], target.shape[-1]) for target in targets]
    for target, (height, width) in zip(targets, shapes if sizes is None else sizes_of(sizes, shapes), strict=True):
        yield target[:height, :width]


def sizes_of(sizes: Sequence[tuple[int, int]], available: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """``sizes`` as pairs of integers; raises unless each lies within the one ``available``."""
    pairs = [(int(height), int(width)) for height, width in sizes]
    if len(pairs) != len(available):
        raise ValueError(f"sizes has {len(pairs)} entries for {len(available)} images")
    for b, (size, most) in enumerate(zip(pairs, available, strict=True)):
        if min(size) < 1 or size[0] > most[0] or size[1] > most[1]:
            raise ValueError(f"sizes[{b}] is {size}, the image's truth has {most}; expected at most that, at least 1")
    return pairs


def _of_batch(targets: Targets, b: int) -> Truth:
    segments, masks, valid = (None if x is None else x[b] for x in (targets.segments, targets.masks, targets.valid))
    labels = targets.labels[b]
    if masks is None:
        return Truth(labels, segments)
    real = labels >= 0
    return Truth(labels[real], masks=masks[real], valid=valid)


def _of_image(b: int, target: Any) -> Truth:
    def value(*names: str) -> Any:
        found = (target.get(n) if isinstance(target, Mapping) else getattr(target, n, None) for n in names)
        return next((one for one in found if one is not None), None)

    labels, segments, masks = value("labels", "class_labels"), value("segments"), value("masks", "mask_labels")
    if segments is None and isinstance(masks, Tensor) and masks.dim() == 2:
        segments, masks = masks, None
    plane = masks if segments is None else segments
    if not isinstance(labels, Tensor) or not isinstance(plane, Tensor):
        raise TypeError(f"targets[{b}] must hold the tensors labels, and segments or masks; got {type(target)}")
    if labels.dim() != 1 or plane.dim() != (3 if segments is None else 2):
        raise ValueError(
            f"targets[{b}] has labels {tuple(labels.shape)} and a plane {tuple(plane.shape)}; "
            "expected (M,), and segments (H, W) or masks (M, H, W)"
        )
    if segments is None and len(plane) != len(labels):
        raise ValueError(f"targets[{b}] has {len(plane)} masks and {len(labels)} labels")
    return Truth(labels, segments, masks if segments is None else None, value("crowd"), value("areas"), value("valid"))
