"""What patched matchers and criteria share: foreign masks, their matching cost, their number, and matched pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, distributed, nn
from torch.nn.functional import pad

from fastmask.functional import mask_cost, mask_loss
from fastmask.integrations._replacement import options_of
from fastmask.mask_term import FOCAL, MaskTerm
from fastmask.modules import Predictions
from fastmask.targets import SEGMENT_DTYPES, Targets, check_binary

Size = tuple[int, int]
TargetList = Sequence[Mapping[str, Tensor]]
Pairs = list[tuple[Tensor, Tensor]]  # queries and targets of each image
MAX_BYTE_TARGETS = 254  # as many as one byte tells apart besides background and void
VOID = 255  # the value of void pixels in mask labels, where ``ignore_void`` is asked for


class Costs(Protocol):
    """The weights of the matching cost, under the original's names."""

    cost_class: float
    cost_mask: float
    cost_dice: float


def sizes_of(mask_labels: Sequence[Tensor]) -> list[Size]:
    """(H_b, W_b) of each image's masks."""
    return [(masks.shape[-2], masks.shape[-1]) for masks in mask_labels]


def mask_term(module: nn.Module, kind: str) -> MaskTerm:
    """How a patched module compares masks."""
    return MaskTerm(kind, ignore_void=options_of(module).ignore_void)


def average_num_masks(targets: Targets) -> Tensor:
    """The number of targets of an average process, at least 1: the original repositories divide mask losses by it."""
    num_masks = targets.counts.sum().float()
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(num_masks)
        num_masks = num_masks / distributed.get_world_size()
    return num_masks.clamp(min=1)


def matching_cost(
    matcher: Costs,
    predictions: Predictions,
    targets: Targets,
    sizes: Sequence[Size],
    points: Tensor | None = None,
    term: MaskTerm = FOCAL,
) -> Tensor:
    """``(L, B, N, M)``: the matching cost, without the padding of masks.

    transformers' models pad masks for the losses only. Where sizes differ, each image has a call of its own.

    Args:
        matcher: has the weights.
        predictions: of L layers.
        targets: of the B images.
        sizes: (H_b, W_b) of each image's masks.
        points: ``(B, P, 2)`` of each image's mask without padding; all pixels if None.
        term: the mask term.
    """
    groups = [(slice(None), targets)]
    if len(set(sizes)) > 1:
        groups = [(slice(b, b + 1), _image_targets(targets, b, size)) for b, size in enumerate(sizes)]
    mask_logits = predictions.detached_mask_logits()
    costs = [
        mask_cost(
            predictions.class_logits[:, images],
            mask_logits[:, images],
            own,
            None if points is None else onto_void(points[images], own, term),
            cost_class=matcher.cost_class,
            cost_mask=matcher.cost_mask,
            cost_dice=matcher.cost_dice,
            term=term,
        )
        for images, own in groups
    ]
    return torch.cat(costs, 1)


def onto_void(points: Tensor, targets: Targets, term: MaskTerm) -> Tensor:
    """Points ``(B, ..., P, 2)`` of which none counts that lies in a void pixel.

    Between the center of an outermost pixel and the edge of the map a point is read partly from beyond the map, where
    nothing is void. Such a point moves to the center if the pixel is void.
    """
    if not term.ignore_void:
        return points
    height, width = targets.size
    lengths = ((0, width), (1, height))
    moved = torch.stack([points[..., axis].clamp(0.5 / length, 1 - 0.5 / length) for axis, length in lengths], -1)
    columns, rows = ((moved[..., axis] * length).long().clamp(max=length - 1) for axis, length in lengths)
    images = torch.arange(targets.batch_size, device=points.device).view(-1, *[1] * (points.dim() - 2))
    void = ~targets.valid_pixels()[images, rows, columns]
    return torch.where(void[..., None], moved, points)


def _image_targets(targets: Targets, image: int, size: Size) -> Targets:
    """The targets of one image, cropped to its size."""
    images, (height, width) = slice(image, image + 1), size
    planes = {
        name: plane[images, ..., :height, :width].contiguous()
        for name in ("masks", "segments", "valid")
        if (plane := getattr(targets, name)) is not None
    }
    return replace(targets, labels=targets.labels[images], counts=targets.counts[images], **planes)


def pad_and_stack(planes: Sequence[Tensor], value: int | bool) -> Tensor:
    """``(B, H, W)``: planes of the largest size, with ``value`` at the bottom and right of smaller ones."""
    height, width = (max(plane.shape[axis] for plane in planes) for axis in (-2, -1))
    return torch.stack(
        [pad(plane, (0, width - plane.shape[1], 0, height - plane.shape[0]), value=value) for plane in planes]
    )


def targets_of_masks(
    names: str,
    mask_labels: Sequence[Tensor],
    class_labels: Sequence[Tensor],
    *,
    num_classes: int,
    device: torch.device,
    ignore_void: bool,
) -> Targets:
    """The container of lists of labels and masks.

    Args:
        names: what the masks of image ``{}`` are called in errors.
        mask_labels: for each image ``(M_b, H_b, W_b)`` that hold 0 and 1 and, with ``ignore_void``, 255 at void pixels.
        class_labels: for each image ``(M_b,)``.
        num_classes: K.
        device: of the result.
        ignore_void: whether 255 marks void pixels. A pixel is void if it is so in any mask of its image.

    Raises:
        ValueError: masks that hold something else, or labels that do not fit.
    """
    void = []
    if ignore_void:
        marks = [masks == VOID for masks in mask_labels]
        void = [marked.any(0).to(device) for marked in marks]
        mask_labels = [masks.masked_fill(marked, 0) for masks, marked in zip(mask_labels, marks, strict=True)]
    for b, masks in enumerate(mask_labels):
        check_binary(names.format(b), masks)
    pairs = zip(class_labels, (masks != 0 for masks in mask_labels), strict=True)
    targets = Targets.from_list(
        [{"labels": labels, "masks": masks} for labels, masks in pairs], num_classes=num_classes, device=device
    )
    return replace(targets, valid=~pad_and_stack(void, True)) if ignore_void else targets


def targets_of_list(module: nn.Module, targets: TargetList, *, num_classes: int, device: torch.device) -> Targets:
    """The container of a list of targets, as the original repositories pass them.

    Args:
        module: the patched matcher or criterion.
        targets: for each image "labels" ``(M_b,)`` and "masks" ``(M_b, H, W)``.
        num_classes: K.
        device: of the result.

    Raises:
        ValueError: masks that are not binary, or of different sizes: the original's callers pad them to the size of
            the batch, and for others its losses are undefined.
    """
    masks = [target["masks"] for target in targets]
    if len(set(sizes_of(masks))) > 1:
        raise ValueError(
            f"the masks of targets are of different sizes, {sizes_of(masks)}; expected all padded to one size"
        )
    return targets_of_masks(
        'targets[{}]["masks"]',
        masks,
        [target["labels"] for target in targets],
        num_classes=num_classes,
        device=device,
        ignore_void=options_of(module).ignore_void,
    )


def targets_of_segments(
    segments: Sequence[Tensor], class_labels: Sequence[Tensor], *, num_classes: int, device: torch.device
) -> Targets:
    """The container of segment maps; see ``fastmask.integrations.transformers.segmentation_targets``.

    Args:
        segments: for each image ``(H_b, W_b)`` uint8, int16 or int32, the index of the target of each pixel. In uint8
            254 is background and 255 void; in the others -2 and -1.
        class_labels: for each image ``(M_b,)``.
        num_classes: K.
        device: of the result.

    Raises:
        TypeError: maps of another dtype.
        ValueError: indices beyond an image's targets, or labels that do not fit.
    """
    dtype = segments[0].dtype
    if dtype not in SEGMENT_DTYPES or any(plane.dtype != dtype for plane in segments):
        raise TypeError(
            f"segment maps must all be uint8, int16 or int32, got {', '.join(str(plane.dtype) for plane in segments)}"
        )
    background, void = (254, VOID) if dtype == torch.uint8 else (-2, -1)
    for b, (plane, labels) in enumerate(zip(segments, class_labels, strict=True)):
        name, count = f"mask_labels[{b}]", len(labels)
        check_labels(f"class_labels[{b}]", labels, num_classes)
        known = ((plane >= 0) & (plane < count)) | (plane == background) | (plane == void)
        if plane.device.type != "cpu":
            torch._assert_async(known.all(), f"{name} holds the index of no target")
        elif not known.all():
            raise ValueError(
                f"{name} holds {plane[~known][0]}; expected the index of one of its {count} targets, {background} for "
                f"background or {void} for void"
            )
    planes = segments if isinstance(segments, Tensor) else pad_and_stack(segments, void)
    return Targets.from_segments(planes.to(device), list(class_labels), void=void)


def check_labels(name: str, labels: Tensor, num_classes: int) -> None:
    """Refuses labels on the CPU that are no class; reading them on a GPU would make the host wait.

    Raises:
        ValueError: a label outside ``0..K-1``.
    """
    if labels.device.type != "cpu":
        return
    wrong = (labels < 0) | (labels >= num_classes)
    if wrong.any():
        raise ValueError(f"{name} holds {labels[wrong][0]}; expected 0..{num_classes - 1} (num_classes={num_classes})")


def device_pairs(assignment: Tensor, counts: Sequence[int], num_queries: int) -> Pairs:
    """The assignment ``(B, M)`` as (queries, targets) of each image, int64 on its device, by ascending query.

    The host does not wait for the device: ``min(counts[b], num_queries)`` targets of image b are matched.
    """
    queries, order = torch.where(assignment < 0, num_queries, assignment).sort(1)
    sizes = [min(count, num_queries) for count in counts]
    return [(queries[b, :size], order[b, :size]) for b, size in enumerate(sizes)]


def pair_losses(
    mask_logits: Tensor, masks: Tensor, points: Tensor | None = None, *, term: MaskTerm, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mask and dice losses of T pairs, ``(T,)`` each.

    Args:
        mask_logits: ``(T, h, w)`` of the matched queries.
        masks: ``(T, H, W)`` uint8 or bool of their targets.
        points: ``(T, P, 2)``; all pixels if None.
        term: the mask term.
        valid: ``(T, H, W)`` bool, False at void pixels.
    """
    num_pairs, zeros = len(masks), torch.zeros(len(masks), 1, dtype=torch.int64, device=masks.device)
    if num_pairs == 0:
        nothing = mask_logits.float().sum((1, 2))
        return nothing, nothing
    targets = Targets(zeros, torch.ones_like(zeros[:, 0]), masks=masks[:, None], valid=valid)
    points = None if points is None else onto_void(points[:, None], targets, term)
    losses = mask_loss(mask_logits[:, None], targets, zeros, points, term=term, reduction="none")
    return losses[0][:, 0], losses[1][:, 0]


def matched_masks(targets: Targets, pairs: Pairs) -> tuple[Tensor, Tensor | None]:
    """The masks ``(T, H, W)`` of the pairs' targets, and the valid pixels of their images."""
    slots = torch.cat([slots for _, slots in pairs]).to(targets.device)
    images = torch.cat([torch.full_like(slots, b) for b, (_, slots) in enumerate(pairs)]).to(targets.device)
    valid = None if targets.valid is None else targets.valid[images]
    if targets.masks is not None:
        return targets.masks[images, slots], valid
    return targets.segment_map[images] == slots[:, None, None], targets.valid_pixels()[images]
