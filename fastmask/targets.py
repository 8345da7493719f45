"""The container of training targets: padded, on the device, and built without host syncs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

PADDING_LABEL = -1
SEGMENT_DTYPES = (torch.uint8, torch.int16, torch.int32)
MASK_DTYPES = (torch.uint8, torch.bool)
# int64 holds the values of all of these, but not those of uint64.
CLASS_DTYPES = (
    *(torch.uint8, torch.uint16, torch.uint32),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
)


@dataclass(frozen=True)
class Targets:
    """Ground truth of a batch of B images with at most M targets each, on an H x W grid.

    Exactly one of ``masks`` and ``segments`` is given. A segment map takes one byte per pixel
    instead of M, and is the better form if masks do not overlap.

    Args:
        labels: ``(B, M)`` int64, the class of each target in ``0..K-1``; -1 is padding, which follows an image's
            targets.
        counts: ``(B,)`` int64, how many targets each image has.
        masks: ``(B, M, H, W)`` uint8 or bool, nonzero where the pixel belongs to the target; may overlap.
        segments: ``(B, H, W)`` uint8, int16 or int32, the index ``0..M-1`` of the target that owns the pixel.
            ``void`` marks an unlabeled pixel; any other value is background, which belongs to no target.
        valid: ``(B, H, W)`` bool, False at unlabeled pixels; only with ``masks`` (a segment map has ``void``).
        void: the value of unlabeled pixels in ``segments``; a value outside their dtype means that there are none.

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: a tensor has the wrong shape or device, or both or neither form is given.
    """

    labels: Tensor
    counts: Tensor
    masks: Tensor | None = None
    segments: Tensor | None = None
    valid: Tensor | None = None
    void: int = 255

    def __post_init__(self) -> None:
        if (self.masks is None) == (self.segments is None):
            raise ValueError("Targets takes exactly one of masks and segments")
        _check("labels", self.labels, (torch.int64,), 2)
        batch_size, num_targets = self.labels.shape
        _check("counts", self.counts, (torch.int64,), 1, (batch_size,))
        if self.masks is not None:
            _check("masks", self.masks, MASK_DTYPES, 4, (batch_size, num_targets))
        if self.segments is not None:
            _check("segments", self.segments, SEGMENT_DTYPES, 3, (batch_size,))
            if self.valid is not None:
                raise ValueError("valid goes with masks; a segment map marks unlabeled pixels with its void value")
            if self.segments.dtype == torch.uint8 and num_targets > 255:
                raise ValueError(f"segments of dtype uint8 cannot index {num_targets} targets; use int16 or int32")
            if 0 <= self.void < num_targets:
                raise ValueError(f"void={self.void} is also the index of one of the {num_targets} targets")
        if self.valid is not None:
            _check("valid", self.valid, (torch.bool,), 3, (batch_size, *self.size))
        for name, tensor in self._tensors():
            if tensor.device != self.labels.device:
                raise ValueError(f"{name} is on {tensor.device}, labels on {self.labels.device}")

    @property
    def batch_size(self) -> int:
        """B, the number of images."""
        return self.labels.shape[0]

    @property
    def num_targets(self) -> int:
        """M, the number of targets per image including padding."""
        return self.labels.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the masks, in pixels."""
        plane = self.segment_map if self.masks is None else self.masks
        return plane.shape[-2], plane.shape[-1]

    @property
    def segment_map(self) -> Tensor:
        """``segments`` of targets that have a segment map, for type checkers."""
        assert self.segments is not None
        return self.segments

    @property
    def device(self) -> torch.device:
        return self.labels.device

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Targets:
        """The same targets on another device."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Targets:
        """The same targets in page-locked host memory."""
        return self._with(Tensor.pin_memory)

    def dense_masks(self) -> Tensor:
        """``(B, M, H, W)`` bool: the binary mask of each target, all False for padding."""
        if self.masks is not None:
            masks = self.masks.bool()
        else:
            indices = torch.arange(self.num_targets, device=self.device)
            masks = self.segment_map[:, None] == indices[None, :, None, None]
        return masks & (self.labels >= 0)[:, :, None, None]

    def valid_pixels(self) -> Tensor:
        """``(B, H, W)`` bool: False at unlabeled pixels."""
        if self.segments is not None:
            return self.segments.long() != self.void  # widened: void may be a value that the dtype does not hold
        if self.valid is not None:
            return self.valid
        return torch.ones((self.batch_size, *self.size), dtype=torch.bool, device=self.device)

    def with_void_value(self) -> Targets:
        """The same targets in a segment map whose dtype holds ``void``."""
        limits = torch.iinfo(self.segment_map.dtype)
        if limits.min <= self.void <= limits.max:
            return self
        segments = self.segment_map.int()
        owned = (segments >= 0) & (segments < self.num_targets)
        return replace(self, segments=segments.masked_fill(~owned, -2), void=-1)

    def merged_by_class(self) -> Targets:
        """The same pixels with one target for each class of an image, as in semantic segmentation.

        Targets keep the order in which their classes first appear. M does not change; the host does not wait.
        """
        if self.num_targets == 0:
            return self
        indices = torch.arange(self.num_targets, device=self.device)
        same_class = (self.labels[:, :, None] == self.labels[:, None]) & (self.labels >= 0)[:, None]
        # argmax gives the first of equal values: for each target the first one of its class. Padding maps to itself.
        first = torch.where(self.labels >= 0, same_class.int().argmax(2), indices)
        is_first = (first == indices) & (self.labels >= 0)
        slots = (is_first.cumsum(1) - 1).gather(1, first).masked_fill(self.labels < 0, self.num_targets)
        labels = self.labels.new_full((self.batch_size, self.num_targets + 1), PADDING_LABEL)
        labels = labels.scatter(1, slots, self.labels)[:, :-1].contiguous()
        merged = replace(self, labels=labels, counts=is_first.sum(1))
        if self.masks is not None:
            masks = self.masks.new_zeros(self.batch_size, self.num_targets + 1, *self.size, dtype=torch.uint8)
            owners = slots[:, :, None, None].expand_as(self.masks)
            masks.scatter_reduce_(1, owners, self.masks.to(torch.uint8), "amax")
            return replace(merged, masks=masks[:, :-1].to(self.masks.dtype))
        # Values that index no target are background or void and do not change; nor do those that index padding.
        segments = self.segment_map
        values = segments.flatten(1).long()
        owned = (values >= 0) & (values < self.num_targets)
        lookup = torch.where(self.labels >= 0, slots, indices)
        owners = lookup.gather(1, values.clamp(0, self.num_targets - 1)).to(segments.dtype)
        return replace(merged, segments=torch.where(owned, owners, segments.flatten(1)).view_as(segments))

    def class_map(self, ignore_index: int = 255) -> Tensor:
        """``(B, H, W)`` int64: the class of each pixel, the inverse of :meth:`from_segmentation`.

        Unlabeled pixels and pixels without a target become ``ignore_index``. Where masks overlap, the last target wins.
        """
        if self.masks is not None:
            classes = self.labels.new_full((self.batch_size, *self.size), ignore_index)
            for m in range(self.num_targets):
                label = self.labels[:, m, None, None]
                classes = torch.where(self.masks[:, m].bool() & (label >= 0), label, classes)
            return classes if self.valid is None else classes.masked_fill(~self.valid, ignore_index)
        unowned = self.labels.new_full((self.batch_size, 1), PADDING_LABEL)
        lookup = torch.cat([self.labels, unowned], 1)
        owners = self.segment_map.long()
        owners = owners.masked_fill((owners < 0) | (owners >= self.num_targets), self.num_targets)
        classes = lookup.gather(1, owners.flatten(1)).view_as(owners)
        return classes.masked_fill(classes < 0, ignore_index)

    def to_list(self) -> list[dict[str, Tensor]]:
        """A list of ``{"labels": (M_b,), "masks": (M_b, H, W) bool}``, one per image. Reads ``counts`` on the host."""
        masks = self.dense_masks()
        return [
            {"labels": self.labels[b, :count], "masks": masks[b, :count]}
            for b, count in enumerate(self.counts.tolist())
        ]

    @staticmethod
    def from_list(
        targets: Sequence[Mapping[str, Tensor]],
        *,
        num_classes: int | None = None,
        size: tuple[int, int] | None = None,
        device: torch.device | str | None = None,
    ) -> Targets:
        """Pads a list of ``{"labels", "masks"}`` dicts, one per image, the form that the original repository uses.

        Args:
            targets: each has ``labels (M_b,)`` of any integer dtype and ``masks (M_b, H_b, W_b)`` that are bool,
                integers (any value but 0, such as 255 in files, is foreground), or floating point, only 0 and 1. An
                image without objects has ``M_b = 0``.
            num_classes: K; if given, labels on the CPU are checked against ``0..K-1``.
            size: (H, W) to pad to, at the bottom and right; by default the largest height and width of the batch.
                Pixels added by padding belong to no target and are not ``valid``.
            device: the device of the result; by default that of the labels.

        Raises:
            TypeError: masks of complex numbers.
            ValueError: an empty list, a missing key, different numbers of labels and masks, a label out of range, a
                mask larger than ``size``, or floating-point masks with values other than 0 and 1 (on a GPU a
                device-side assertion, so that the host need not wait).
        """
        if len(targets) == 0:
            raise ValueError("targets is an empty list; expected one dict for each image")
        for b, target in enumerate(targets):
            _check_target(b, target, num_classes)
        heights, widths = zip(*(target["masks"].shape[-2:] for target in targets), strict=True)
        height, width = size or (max(heights), max(widths))
        if max(heights) > height or max(widths) > width:
            raise ValueError(f"a mask of {max(heights)} x {max(widths)} pixels does not fit size={height} x {width}")
        device = device or targets[0]["labels"].device
        labels = pad_sequence(
            [target["labels"].to(device, torch.int64) for target in targets],
            batch_first=True,
            padding_value=PADDING_LABEL,
        )
        masks = torch.zeros((len(targets), labels.shape[1], height, width), dtype=torch.uint8, device=device)
        for b, target in enumerate(targets):
            image_masks = target["masks"]
            owned = foreground(f'targets[{b}]["masks"]', image_masks)
            masks[b, : image_masks.shape[0], : heights[b], : widths[b]] = owned.to(device)
        valid = None
        if min(heights) < height or min(widths) < width:
            valid = torch.stack(
                [
                    pad(torch.ones(h, w, dtype=torch.bool, device=device), (0, width - w, 0, height - h))
                    for h, w in zip(heights, widths, strict=True)
                ]
            )
        return Targets(labels, (labels >= 0).sum(1), masks=masks, valid=valid)

    @staticmethod
    def from_segmentation(
        segmentation: Tensor, num_classes: int, *, ignore_index: int = 255, max_targets: int | None = None
    ) -> Targets:
        """One target for each class in an image, as used to train mask classification for semantic segmentation.

        Args:
            segmentation: ``(B, H, W)`` integers, the class of each pixel in ``0..K-1``, or ``ignore_index``.
            num_classes: K.
            ignore_index: the class of unlabeled pixels, which become void; may lie outside the dtype.
            max_targets: M of the result; ``num_classes`` by default, so that no host sync is needed to count. Classes
                beyond the first ``max_targets`` of an image become background.

        Raises:
            TypeError: ``segmentation`` is not a tensor of integers.
            ValueError: a wrong shape, or (for CPU tensors) a class outside ``0..K-1`` that is not ``ignore_index``.
        """
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        check_class_map("segmentation", segmentation, 3, num_classes, ignore_index)
        # Widened before the comparison, in which PyTorch would turn -100 into 156 for uint8.
        classes = segmentation.long()
        batch_size = segmentation.shape[0]
        num_targets = num_classes if max_targets is None else max_targets
        slots = classes.masked_fill(classes == ignore_index, num_classes)
        present = torch.zeros(batch_size, num_classes + 1, dtype=torch.int64, device=segmentation.device)
        present.scatter_(1, slots.flatten(1), 1)
        present = present[:, :num_classes]
        rank = (present.cumsum(1) - 1).masked_fill((present == 0), num_targets).clamp(max=num_targets)
        all_classes = torch.arange(num_classes, device=segmentation.device).expand(batch_size, -1)
        labels = torch.full((batch_size, num_targets + 1), PADDING_LABEL, device=segmentation.device)
        labels.scatter_(1, rank, all_classes)
        labels = labels[:, :num_targets].contiguous()
        dtype, void = _segment_dtype(num_targets)
        background = 254 if void == 255 else -2
        rank = rank.masked_fill(rank == num_targets, background)
        lookup = torch.cat([rank, rank.new_full((batch_size, 1), void)], 1).to(dtype)
        segments = lookup.gather(1, slots.flatten(1)).view_as(segmentation)
        return Targets(labels, (labels >= 0).sum(1), segments=segments, void=void)

    @staticmethod
    def from_segments(segments: Tensor, labels: Sequence[Tensor], *, void: int | None = None) -> Targets:
        """Targets from a panoptic segment map and the class of each of its segments.

        Args:
            segments: ``(B, H, W)`` uint8, int16 or int32; pixel value m belongs to segment m of its image.
            labels: for each image, ``(M_b,)`` integer classes in the order of the segments.
            void: the value of unlabeled pixels; 255 for uint8 and -1 for the signed types by default.
        """
        if len(labels) != segments.shape[0]:
            raise ValueError(f"labels has {len(labels)} images, segments {segments.shape[0]}")
        if void is None:
            void = 255 if segments.dtype == torch.uint8 else -1
        padded = pad_sequence(
            [image_labels.to(segments.device, torch.int64) for image_labels in labels],
            batch_first=True,
            padding_value=PADDING_LABEL,
        )
        return Targets(padded, (padded >= 0).sum(1), segments=segments, void=void)

    def _with(self, change: Callable[[Tensor], Tensor]) -> Targets:
        changed: dict[str, Any] = {name: change(tensor) for name, tensor in self._tensors()}
        return replace(self, **changed)

    def _tensors(self) -> list[tuple[str, Tensor]]:
        return [(f.name, getattr(self, f.name)) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)]


def label_dtype(num_classes: int) -> torch.dtype:
    """The smallest of uint8, int16 and int32 that holds the classes ``0..num_classes-1``."""
    if num_classes <= 2**8:
        return torch.uint8
    return torch.int16 if num_classes <= 2**15 else torch.int32


def check_class_map(name: str, classes: Tensor, dim: int, num_classes: int, ignore_index: int) -> None:
    """Checks that a tensor is a map of classes.

    Args:
        name: the argument's name, for errors.
        classes: ``(H, W)`` or ``(B, H, W)``, as ``dim`` says; integers in ``0..K-1`` or ``ignore_index``.
        num_classes: K.

    Raises:
        TypeError: ``classes`` is not a tensor of integers.
        ValueError: a wrong shape, or (for CPU tensors) a class outside ``0..K-1`` that is not ``ignore_index``.
    """
    shape = {2: "(H, W)", 3: "(B, H, W)"}[dim]
    if not isinstance(classes, Tensor):
        raise TypeError(f"{name} must be a tensor of shape {shape}, got {type(classes).__name__}")
    if classes.dtype not in CLASS_DTYPES:
        raise TypeError(f"{name} must hold integer classes, got {classes.dtype}")
    if classes.dim() != dim:
        raise ValueError(f"{name} has shape {tuple(classes.shape)}; expected {shape}")
    # Reading values from a GPU would make the host wait; there, indexing with a wrong class fails.
    if classes.device.type == "cpu" and not torch.compiler.is_compiling():
        classes = classes.long()
        wrong = (classes != ignore_index) & ((classes < 0) | (classes >= num_classes))
        if wrong.any():
            value = int(classes[wrong][0])
            raise ValueError(f"{name} holds class {value}; expected 0..{num_classes - 1} or {ignore_index}")


def foreground(name: str, masks: Tensor) -> Tensor:
    """Masks as bool. Integers other than 0 are foreground; floating-point masks must hold only 0 and 1, because values
    in between have no agreed meaning.

    Raises:
        TypeError, ValueError: as in :func:`check_binary`, for masks that are not integers.
    """
    if masks.is_floating_point() or masks.is_complex():
        check_binary(name, masks)
    return masks if masks.dtype == torch.bool else masks != 0


def check_binary(name: str, masks: Tensor) -> None:
    """Checks that masks hold only 0 and 1; of any other value, kernels would read one bit.

    On a GPU the host does not wait: a failure shows as a device-side assertion.

    Raises:
        TypeError: ``masks``, the argument ``name``, hold complex numbers.
        ValueError: ``masks`` are on the CPU and hold values other than 0 and 1.
    """
    if masks.dtype == torch.bool:
        return
    if masks.is_complex():
        raise TypeError(f"{name} must hold 0 and 1, got {masks.dtype}")
    binary = ((masks == 0) | (masks == 1)).all()
    if masks.device.type != "cpu":
        torch._assert_async(binary, f"{name} must hold 0 and 1 only")
    elif not torch.compiler.is_compiling() and not binary:
        value = masks[(masks != 0) & (masks != 1)][0].item()
        raise ValueError(f"{name} holds {value}; expected binary masks, 0 and 1 only")


def _segment_dtype(num_targets: int) -> tuple[torch.dtype, int]:
    """The smallest dtype that can index the targets and also mark void and background, and its void value."""
    if num_targets <= 254:
        return torch.uint8, 255
    return (torch.int16, -1) if num_targets <= 2**15 else (torch.int32, -1)


def _check(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], dim: int, leading: tuple[int, ...] = ()) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must have dtype {names}, got {tensor.dtype}")
    if tensor.dim() != dim or tuple(tensor.shape[: len(leading)]) != leading:
        expected = (*map(str, leading), *"?" * (dim - len(leading)))
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected ({', '.join(expected)})")


def _check_target(b: int, target: Mapping[str, Tensor], num_classes: int | None) -> None:
    for key in ("labels", "masks"):
        if key not in target:
            raise ValueError(f'targets[{b}] has no "{key}"; expected the keys "labels" and "masks"')
    labels, masks = target["labels"], target["masks"]
    # torch.tensor([]) is a float tensor.
    if labels.dim() != 1 or (labels.is_floating_point() and labels.numel() > 0):
        raise ValueError(f'targets[{b}]["labels"] must be 1-D integers, got {labels.dtype} {tuple(labels.shape)}')
    if masks.dim() != 3 or masks.shape[0] != labels.shape[0]:
        raise ValueError(
            f'targets[{b}]["masks"] has shape {tuple(masks.shape)}; expected ({labels.shape[0]}, H, W) for its labels'
        )
    if num_classes is not None and labels.device.type == "cpu" and labels.numel() > 0:
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= num_classes:
            raise ValueError(
                f'targets[{b}]["labels"] holds {low if low < 0 else high}; expected 0..{num_classes - 1} '
                f"(num_classes={num_classes})"
            )
