"""Labels of transformers' segmentation models as one map for each image, instead of one mask for each target.

transformers' image processors make a float32 mask of each target. A map takes one byte a pixel instead of four bytes a
pixel and target, and a patched model takes it as ``mask_labels``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmask.integrations._foreign_targets import MAX_BYTE_TARGETS, VOID, pad_and_stack


def segmentation_targets(
    segmentation_map: Tensor | np.ndarray,
    instance_id_to_semantic_id: Mapping[int, int] | None = None,
    *,
    ignore_index: int | None = None,
    do_reduce_labels: bool = False,
) -> dict[str, Tensor]:
    """The labels of one image for a model that ``fastmask.patch`` has changed.

    They are the targets that transformers' image processors make of the same arguments, in the same order; the losses
    are equal.

    Args:
        segmentation_map: ``(H, W)`` integers, the class or the instance of each pixel.
        instance_id_to_semantic_id: the class of each instance; None if the map holds classes.
        ignore_index: the value of pixels without a label, which become void. To a model void is background, unless it
            is patched with ``ignore_void=True``.
        do_reduce_labels: class 0 is no label: it becomes ``ignore_index``, and all other values are lowered by 1.

    Returns:
        "mask_labels" ``(H, W)``, the index of each pixel's target: uint8 with 255 at void pixels, or, for more than 254
        targets, int32 with -1; and "class_labels" ``(M,)`` int64.

    Raises:
        TypeError: a map that holds no integers.
        ValueError: a map of another shape, an instance without a class, or ``do_reduce_labels`` without
            ``ignore_index``.
    """
    ids = torch.as_tensor(segmentation_map)
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"segmentation_map must hold integers, got {ids.dtype}")
    if ids.dim() != 2:
        raise ValueError(f"segmentation_map has shape {tuple(ids.shape)}; expected (H, W)")
    if do_reduce_labels and ignore_index is None:
        raise ValueError("do_reduce_labels needs an ignore_index, to which it changes 0")
    present, inverse = ids.long().unique(return_inverse=True)
    reduced = torch.where(present == 0, ignore_index or 0, present - 1) if do_reduce_labels else present
    labeled = torch.ones_like(reduced, dtype=torch.bool) if ignore_index is None else reduced != ignore_index
    # Reducing moves 0 to a value that may be anywhere in the order.
    order = torch.where(labeled, reduced, torch.iinfo(torch.int64).max).argsort(stable=True)
    targets = order[: int(labeled.sum())]
    dtype, void = (torch.uint8, VOID) if len(targets) <= MAX_BYTE_TARGETS else (torch.int32, -1)
    lookup = torch.full_like(present, void)
    lookup[targets] = torch.arange(len(targets), device=lookup.device)
    labels = reduced[targets]
    if instance_id_to_semantic_id is not None:
        raised = int(do_reduce_labels)
        instances = (labels + raised).tolist()
        if missing := [number for number in instances if number not in instance_id_to_semantic_id]:
            raise ValueError(f"instance_id_to_semantic_id has no class for the instances {missing}")
        classes = [instance_id_to_semantic_id[number] - raised for number in instances]
        labels = torch.tensor(classes, dtype=torch.int64, device=labels.device)
    return {"mask_labels": lookup.to(dtype)[inverse], "class_labels": labels}


def collate_segmentation(examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A batch of examples with the labels of :func:`segmentation_targets`, for a DataLoader or transformers' Trainer.

    Args:
        examples: each has "pixel_values" ``(C, H_b, W_b)``, "mask_labels" ``(H_b, W_b)`` and "class_labels" ``(M_b,)``;
            values of other keys are listed.

    Returns:
        "pixel_values" ``(B, C, H, W)``, padded with 0 at the bottom and right to the largest image; "pixel_mask"
        ``(B, H, W)`` int64, 0 at padding, if there is any; "mask_labels" ``(B, H, W)``, padded with void; and lists of
        the others.

    Raises:
        ValueError: no examples, or a map and an image of different sizes.
    """
    if len(examples) == 0:
        raise ValueError("examples is empty; expected one for each image")
    listed: dict[str, list[Any]] = {name: [example[name] for example in examples] for name in examples[0]}
    images, maps = listed.pop("pixel_values"), listed.pop("mask_labels")
    listed.pop("pixel_mask", None)
    for b, (image, segments) in enumerate(zip(images, maps, strict=True)):
        if image.shape[1:] != segments.shape:
            raise ValueError(
                f"examples[{b}] has an image of {tuple(image.shape[1:])} pixels and mask_labels of "
                f"{tuple(segments.shape)}; expected the same size"
            )
    in_bytes = all(segments.dtype == torch.uint8 for segments in maps)
    if not in_bytes:
        maps = [_widened(segments) for segments in maps]
    channels = range(images[0].shape[0])
    batch = {
        "pixel_values": torch.stack([pad_and_stack([image[c] for image in images], 0) for c in channels], 1),
        "mask_labels": pad_and_stack(maps, VOID if in_bytes else -1),
        **listed,
    }
    if len({image.shape for image in images}) > 1:  # models for one size take no mask
        batch["pixel_mask"] = pad_and_stack([torch.ones_like(image[0], dtype=torch.int64) for image in images], 0)
    return batch


def _widened(segments: Tensor) -> Tensor:
    """A map as int32, whose void value is another than that of a byte."""
    is_byte = segments.dtype == torch.uint8
    return torch.where(segments == VOID, -1, segments.int()) if is_byte else segments.int()
