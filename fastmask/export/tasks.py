"""What is exported of a network: a module from tensors to named tensors for each family and task."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastmask.functional import semantic_inference
from fastmask.models import MaskFormer, PerPixelBaseline, Segmenter, SoundEventDetector
from fastmask.models._base import PretrainedModel, SegmentationModel
from fastmask.models._images import Size
from fastmask.models._pixels import pixel_results
from fastmask.models.sound import frame_probabilities
from fastmask.modules.audio import linear_softmax
from fastmask.modules.resize import resize_bilinear
from fastmask.ops._checks import check_choice
from fastmask.ops._tracing import is_open

TASKS = ("semantic", "scores", "logits", "events")
RESULTS = {"semantic": "labels", "scores": "scores"}


class MaskResults(nn.Module):
    """Labels or scores of a MaskFormer.

    Args:
        model: the network.
        output: "labels" or "scores".
        size: (height, width) of the result; None for the image's own.
        backend: of ``fastmask.semantic_inference``.
    """

    def __init__(self, model: MaskFormer, output: str, size: Size | None, backend: str) -> None:
        super().__init__()
        self.model = model
        self.output = output
        self.size = size
        self.backend = backend

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """``(B, C, H, W)`` to ``(B, H, W)`` or ``(B, K, H, W)``."""
        class_logits, mask_logits, padded_size = self.model.final_logits(images)
        valid_size = images.shape[-2:]
        options = {"output": self.output, "backend": self.backend}
        if self.backend == "reference" and is_open(valid_size):
            return {
                self.output: crop(semantic_inference(class_logits, mask_logits, padded_size, **options), valid_size)
            }
        options |= {"padded_size": padded_size, "valid_size": valid_size}
        return {self.output: semantic_inference(class_logits, mask_logits, self.size or valid_size, **options)}


class PixelResults(nn.Module):
    """Labels or scores of a network that classifies pixels or patches.

    Args:
        model, output, size: as for :class:`MaskResults`.
        window: (size, stride) of the windows of a Segmenter; None for whole images.
    """

    def __init__(
        self, model: PerPixelBaseline | Segmenter, output: str, size: Size | None, window: tuple[int, int] | None
    ) -> None:
        super().__init__()
        self.model = model
        self.output = output
        self.size = size
        self.window = window

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """``(B, C, H, W)`` to ``(B, H, W)`` or ``(B, K, H, W)``."""
        if self.window is not None:
            logits = self.model.window_logits(images, self.window)
            return {self.output: pixel_results(logits, self.size or images.shape[-2:], self.output)}
        logits, padded_size = self.model.final_logits(images)
        valid_size = images.shape[-2:]
        logits = resize_bilinear(logits.float(), padded_size)
        if is_open(valid_size):
            return {self.output: crop(pixel_results(logits, padded_size, self.output), valid_size)}
        height, width = valid_size
        return {self.output: pixel_results(logits[..., :height, :width], self.size or valid_size, self.output)}


class Logits(nn.Module):
    """The logits of a network that takes images.

    Args:
        model: the network.
    """

    def __init__(self, model: SegmentationModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """``(B, C, H, W)`` to what ``final_logits`` gives, without the padded size."""
        *logits, _ = self.model.final_logits(images)
        return dict(zip(("logits",) if len(logits) == 1 else ("class_logits", "mask_logits"), logits, strict=True))


class Events(nn.Module):
    """The probabilities of a sound event detector.

    Args:
        model: the network.
    """

    def __init__(self, model: SoundEventDetector) -> None:
        super().__init__()
        self.model = model

    def forward(self, waveforms: Tensor) -> dict[str, Tensor]:
        """``(B, S)`` to ``(B, K, T)`` and ``(B, K)``."""
        frames = frame_probabilities(*self.model.final_logits(waveforms))
        return {"frame_probabilities": frames, "clip_probabilities": linear_softmax(frames)}


def crop(maps: Tensor, size: Size) -> Tensor:
    """The top left (height, width) of ``maps (..., h, w)`` whose size is open.

    Slices would do, but ``torch.export`` asks how a slice lies in memory, and holds the program to the answer. As this
    copies, it comes last, when there is one map of labels left instead of N of mask logits.
    """
    for dim, length in zip((-2, -1), size, strict=True):
        maps = maps.index_select(dim, torch.arange(length, device=maps.device))
    return maps


def check_task(model: PretrainedModel, task: str | None) -> str:
    """The task to export; by default "semantic", of a sound event detector "events".

    Raises:
        TypeError: not one of our networks.
        ValueError: an unknown task, or one of another kind of network.
    """
    if not isinstance(model, SegmentationModel | SoundEventDetector):
        raise TypeError(f"model must be a network of fastmask.models, got {type(model).__name__}")
    known = TASKS[3:] if isinstance(model, SoundEventDetector) else TASKS[:3]
    task = known[0] if task is None else task
    check_choice(f"task of a {type(model).__name__}", task, known)
    return task


def check_window(
    model: PretrainedModel, task: str, size: Size | int | None, window: int | tuple[int, int] | None
) -> tuple[int, int] | None:
    """(size, stride) of the windows to export; None for whole images.

    Args:
        model: the network.
        task: as :func:`check_task` gives it.
        size: of the images, if it is known.
        window: as for :func:`fastmask.export.export_program`.

    Raises:
        TypeError: a window that is none.
        ValueError: one that is out of range, or goes with neither the network, the task nor images of any size.
    """
    if not isinstance(model, Segmenter) or task not in RESULTS:
        if window is not None:
            raise ValueError(
                f"window goes with labels and scores of a Segmenter; got {window!r} for {task!r} of a "
                f"{type(model).__name__}"
            )
        return None
    side, stride = model.window_of(window)
    if side > 0 and size is None and window is not None:
        raise ValueError(f"window={window!r} goes with a size of the images, from which the number of windows follows")
    return (side, stride) if side > 0 and size is not None else None


def module_of_task(
    model: PretrainedModel, task: str, size: Size | None, backend: str, window: tuple[int, int] | None = None
) -> nn.Module:
    """What to trace; ``task`` as :func:`check_task` gives it, ``window`` as :func:`check_window` does, the other
    arguments as for :class:`MaskResults`.
    """
    if task == "events":
        return Events(model)
    if task == "logits":
        return Logits(model)
    if isinstance(model, MaskFormer):
        return MaskResults(model, RESULTS[task], size, backend)
    return PixelResults(model, RESULTS[task], size, window)
