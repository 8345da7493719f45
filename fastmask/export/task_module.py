"""The modules that are traced for a task, and checks of the export's arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastmask.functional import semantic_inference
from fastmask.models._base import PretrainedModel
from fastmask.models._images import Size
from fastmask.models._pixels import pixel_results
from fastmask.models.sound import frame_probabilities
from fastmask.modules.audio import linear_softmax
from fastmask.modules.resize import resize_bilinear
from fastmask.ops._checks import check_choice
from fastmask.ops._tracing import is_open

EXPORTED_TASKS = ("semantic", "scores", "logits", "events")
RESULTS = {"semantic": "labels", "scores": "scores"}


class ImageTask(nn.Module):
    """Wraps a network as a module from images to a task's named tensors. Programs inherit the names of its arguments.

    Args:
        model: a network that takes images.
        task: the task, as :func:`check_task` returns it.
        size: (height, width) of labels or scores; None for the size of the image.
        backend: the backend of ``fastmask.semantic_inference``.
        window: (size, stride) of windows, as :func:`check_window` returns it; None for whole images.
    """

    def __init__(
        self, model: Any, task: str, size: Size | None, backend: str, window: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        self.model, self.task, self.size, self.backend, self.window = model, task, size, backend, window

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """See :mod:`fastmask.export` for inputs and outputs."""
        if self.task == "logits":
            *logits, _ = self.model.final_logits(images)
            return dict(zip(("logits",) if len(logits) == 1 else ("class_logits", "mask_logits"), logits, strict=True))
        output = RESULTS[self.task]
        height, width = images.shape[-2:]
        return {output: self._result(images, output, (height, width))}

    def _result(self, images: Tensor, output: str, valid_size: Size) -> Tensor:
        """The labels or scores of the images."""
        size = self.size or valid_size
        if self.window is not None:
            return pixel_results(self.model.window_logits(images, self.window), size, output)
        *logits, padded_size = self.model.final_logits(images)
        if len(logits) == 2:
            class_logits, mask_logits = logits
            options: dict[str, Any] = {"output": output, "backend": self.backend}
            result: Any
            if self.backend == "reference" and is_open(valid_size):
                result = semantic_inference(class_logits, mask_logits, padded_size, **options)
                return crop(result, valid_size)
            options |= {"padded_size": padded_size, "valid_size": valid_size}
            result = semantic_inference(class_logits, mask_logits, size, **options)
            return result
        (scores,) = logits
        scores = resize_bilinear(scores.float(), padded_size)
        if is_open(valid_size):
            return crop(pixel_results(scores, padded_size, output), valid_size)
        height, width = valid_size
        return pixel_results(scores[..., :height, :width], size, output)


class Events(nn.Module):
    """Wraps a sound event detector as a module from waveforms to probabilities."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, waveforms: Tensor) -> dict[str, Tensor]:
        """``(B, S)`` to ``(B, K, T)`` and ``(B, K)``."""
        frames = frame_probabilities(*self.model.final_logits(waveforms))
        return {"frame_probabilities": frames, "clip_probabilities": linear_softmax(frames)}


def crop(maps: Tensor, size: Size) -> Tensor:
    """The top left (height, width) part of ``maps (..., h, w)`` with an open size.

    It copies instead of slicing, because ``torch.export`` would fix the memory layout of a slice. Therefore cropping
    comes last, when there is one map of labels instead of N maps of mask logits.
    """
    for dim, length in zip((-2, -1), size, strict=True):
        maps = maps.index_select(dim, torch.arange(length, device=maps.device))
    return maps


def check_task(model: PretrainedModel, task: str | None) -> str:
    """The task to export; by default "semantic", or "events" for a sound event detector.

    Raises:
        TypeError: the model is not a network of fastmask.
        ValueError: the model does not have this task.
    """
    if not isinstance(model, PretrainedModel):
        raise TypeError(f"model must be a network of fastmask.models, got {type(model).__name__}")
    known = EXPORTED_TASKS[3:] if "events" in model.tasks else EXPORTED_TASKS[:3]
    task = known[0] if task is None else task
    check_choice(f"task of a {type(model).__name__}", task, known)
    return task


def check_window(
    model: PretrainedModel, task: str, size: Size | int | None, window: int | tuple[int, int] | None
) -> tuple[int, int] | None:
    """(size, stride) of the windows to export; None for whole images.

    Args:
        model: the network.
        task: the task, as :func:`check_task` returns it.
        size: the size of the images; None if it is open.
        window: as for :func:`fastmask.export.export_program`.

    Raises:
        TypeError: a window of the wrong type.
        ValueError: a window that is out of range or does not fit the network, the task or an open size.
    """
    window_of = getattr(model, "window_of", None)
    if window_of is None or task not in RESULTS:
        if window is not None:
            raise ValueError(
                f"window goes with labels and scores of a Segmenter; got {window!r} for {task!r} of a "
                f"{type(model).__name__}"
            )
        return None
    side, stride = window_of(window)
    if side > 0 and size is None and window is not None:
        raise ValueError(f"window={window!r} goes with a size of the images, from which the number of windows follows")
    return (side, stride) if side > 0 and size is not None else None
