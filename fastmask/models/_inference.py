"""Turns a model's logits into results of any size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import index
from typing import Any

from torch import Tensor

from fastmask.functional import general_inference, instance_inference, panoptic_inference, semantic_inference
from fastmask.models._images import ImageBatch, Size

INFERENCE_BY_TASK: dict[str, Callable[..., Iterable[Any]]] = {
    "semantic": semantic_inference,
    "general": general_inference,
    "panoptic": panoptic_inference,
    "instance": instance_inference,
}


def check_sizes(sizes: Size | Sequence[Size] | None, images: Sequence[Size]) -> tuple[Size, ...]:
    """The (height, width) of each result: the image's size if ``sizes`` is None; a single pair applies to all images.

    Raises:
        TypeError: anything but pairs of integers.
        ValueError: the number of pairs is not that of the images, or a side is below 1.
    """
    if sizes is None:
        return tuple(images)
    entries: Any = sizes
    try:
        if isinstance(entries, Tensor):
            entries = entries.tolist()
        if len(entries) == 2 and isinstance(entries[0], int):
            entries = [entries] * len(images)
        pairs = [(index(height), index(width)) for height, width in entries]
    except (TypeError, ValueError, IndexError) as error:
        raise TypeError(f"sizes must be (height, width), or a list of one for each image; got {entries!r}") from error
    if len(pairs) != len(images):
        raise ValueError(f"sizes has {len(pairs)} entries; the model got {len(images)} images")
    if min(map(min, pairs)) < 1:
        raise ValueError(f"sizes holds {min(pairs, key=min)}; expected at least 1 pixel each way")
    return tuple(pairs)


def infer(
    task: str,
    class_logits: Tensor,
    mask_logits: Tensor | tuple[Tensor, Tensor],
    images: ImageBatch,
    sizes: Sequence[Size],
    **options: Any,
) -> list[Any]:
    """The result of one task for each image. If all images have the same sizes, one call computes all.

    As in the original code, masks are upsampled to the padded size, cropped to the image and resized to ``sizes``, in
    this order.

    Args:
        task: one of ``INFERENCE_BY_TASK``.
        class_logits: ``(B, N, K+1)``.
        mask_logits: ``(B, N, h, w)``; or ``mask_embed (B, N, C)`` and ``pixel_embed (B, C, h, w)``.
        images: the batch that the logits were computed from.
        sizes: (height, width) of each result.
        options: further arguments of the task's function, such as ``fastmask.semantic_inference``.
    """
    function = INFERENCE_BY_TASK[task]
    together = images.uniform and len(set(sizes)) == 1
    groups = [slice(None)] if together else [slice(b, b + 1) for b in range(len(sizes))]
    results: list[Any] = []
    for group in groups:
        size, valid_size = sizes[group][0], images.sizes[group][0]
        steps = {"padded_size": images.padded_size, "valid_size": valid_size}
        if size == valid_size == images.padded_size:
            steps = {}
        masks = mask_logits[group] if isinstance(mask_logits, Tensor) else tuple(x[group] for x in mask_logits)
        results.extend(function(class_logits[group], masks, size, **steps, **options))
    return results
