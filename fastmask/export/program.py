"""Exports networks as programs of ``torch.export``."""

from __future__ import annotations

import copy
import json
import warnings
from operator import index
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastmask.export.description import check_path, describe
from fastmask.export.task_module import RESULTS, Events, ImageTask, check_task, check_window
from fastmask.files import replace_file
from fastmask.models._base import PretrainedModel
from fastmask.models._images import Size
from fastmask.models.eomt import EoMT
from fastmask.modules.attention import MaskedCrossAttention
from fastmask.modules.deformable_attention import MultiScaleDeformableAttention
from fastmask.modules.dino import MaskedSelfAttention
from fastmask.ops._registry import choose_backend
from fastmask.ops.semantic import SEMANTIC_INFERENCE

METADATA_FILE = "fastmask.json"
# (batch size, (height, width)) of the input to trace with, then of inputs to try the program on: smaller and larger
# ones, with sides that are multiples of the network's padding, the unit here, and sides that are not.
IMAGES = ((2, (4.6, 6.7)), (1, (2.1, 9.0)), (3, (7.0, 3.4)))
CLIPS = ((2, (24.3,)), (1, (31.7,)), (3, (17.0,)))
# For open sizes, their padding to whole windows takes minutes to trace, and the program then works for only one size.
FIXED_SIZE_BACKBONES = ("swin", "swinv2", "maskformer-swin", "donut-swin")


def export_program(
    model: PretrainedModel,
    *,
    task: str | None = None,
    size: Size | int | None = None,
    batch_size: int | None = None,
    output_size: Size | None = None,
    window: int | tuple[int, int] | None = None,
    portable: bool = True,
) -> ExportedProgram:
    """Exports a network, from images (or waveforms) to results, as a program of ``torch.export``.

    See :mod:`fastmask.export` for its inputs and outputs. ``program.module()(images)`` runs it and returns a dict of
    the outputs. The network does not change: a copy of it, in evaluation mode and float32, is traced on the network's
    device, which is also the program's.

    Args:
        model: a network of :mod:`fastmask.models`.
        task: "semantic" (the default), "scores" or "logits" of networks that take images; "events" of a
            :class:`fastmask.SoundEventDetector`.
        size: (height, width) of all images, or the number of samples of all clips; None for any size (a Segmenter's
            images must then be larger than one patch in both directions).
        batch_size: the number of images or clips at a time; None for any number.
        output_size: (height, width) of labels or scores; by default that of the images. It requires ``size``.
        window: (size, stride) of the windows of a Segmenter's labels and scores, as for its ``predict``; it requires
            ``size``. 0 predicts whole images. By default, the configured windows if there is a ``size``; otherwise
            whole images, with a warning, because their labels differ.
        portable: True uses PyTorch's operators only, so that the program runs without fastmask. False keeps fastmask's
            operators, which need not store N masks at full size; such a program loads after ``import fastmask``.

    Raises:
        TypeError: the model is not a network of fastmask, or sizes or a window have the wrong type.
        ValueError: an unknown task, sizes below 1, a window that is out of range or does not fit the other arguments,
            or a network that must have fixed sizes where they are None; the message says which to give.
        RuntimeError: with ``portable=False``, fastmask has no kernels for the device, or they were not built.
    """
    task = check_task(model, task)
    _check_sizes(task, size, batch_size, output_size)
    _check_open(model, task, size, batch_size)
    if window is None and size is None and (windows := check_window(model, task, (1, 1), None)):
        warnings.warn(
            f"the program predicts whole images, but predict uses windows of {windows[0]} pixels, so labels differ. "
            "size=(height, width) exports the windows; window=0 says that whole images are meant",
            stacklevel=2,
        )
    side = model.config.image_size if isinstance(model, EoMT) and task in RESULTS else None
    if side is not None and size != (side, side):
        warnings.warn(
            "the program predicts whole images at their own size, but an EoMT's predict resizes them and uses windows "
            f"of {side} pixels, so labels differ. size=({side}, {side}) gives its labels for images of that size",
            stacklevel=2,
        )
    window = check_window(model, task, size, window)
    traced = copy.deepcopy(model).eval().float().requires_grad_(False)
    parameter = next(traced.parameters())
    backend = "reference"
    if not portable:
        backend = choose_backend(SEMANTIC_INFERENCE, "triton" if parameter.is_cuda else "native", parameter)
    for module in traced.modules():
        if isinstance(module, MaskedCrossAttention | MaskedSelfAttention | MultiScaleDeformableAttention):
            module.backend = backend

    example, *others = _examples(traced, task, size, batch_size)
    names = open_dims(task, size, batch_size)
    module = Events(traced) if task == "events" else ImageTask(traced, task, output_size, backend, window)
    program = _trace(module.eval(), example, names)
    if names:
        _check_other_sizes(program, others, names)
    return program


def export_pt2(model: PretrainedModel, path: str | Path, *, overwrite: bool = False, **options: Any) -> Path:
    """Writes a network's program to a file for ``torch.export.load``, atomically.

    The extra file "fastmask.json" inside it holds a JSON object of strings: "fastmask_version", "model", "task",
    "class_names" (a JSON list), and more of the configuration.

    Args:
        model: as for :func:`export_program`.
        path: ends with ".pt2".
        overwrite: replace an existing file.
        options: as for :func:`export_program`.

    Raises:
        ValueError: the path has another ending.
        FileExistsError: the file exists, and ``overwrite`` is False.
        TypeError, ValueError, RuntimeError: as for :func:`export_program`.
    """
    path = check_path(path, ".pt2", overwrite)
    program = export_program(model, **options)
    task = check_task(model, options.get("task"))
    window = check_window(model, task, options.get("size"), options.get("window"))
    extra = {METADATA_FILE: json.dumps(describe(model, task, window))}

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            torch.export.save(program, file, extra_files=extra)

    replace_file(path, write)
    return path


def open_dims(task: str, size: Size | int | None, batch_size: int | None) -> dict[int, str]:
    """The open dimensions of the input, with their names."""
    names = {} if batch_size is not None else {0: "batch"}
    if size is None:
        names |= {1: "samples"} if task == "events" else {2: "height", 3: "width"}
    return names


def _check_sizes(task: str, size: Size | int | None, batch_size: int | None, output_size: Size | None) -> None:
    given: tuple[tuple[str, int, Any], ...] = (
        ("size", 1 if task == "events" else 2, size),
        ("batch_size", 1, batch_size),
        ("output_size", 2, output_size),
    )
    for name, length, value in given:
        if value is None:
            continue
        expected = "an integer" if length == 1 else "(height, width)"
        try:
            sides = [index(value)] if length == 1 else [index(side) for side in value]
        except TypeError as error:
            raise TypeError(f"{name} must be {expected} or None, got {value!r}") from error
        if len(sides) != length or min(sides) < 1:
            raise ValueError(f"{name} must be {expected}, at least 1, got {value!r}")
    if output_size is not None and (size is None or task not in ("semantic", "scores")):
        raise ValueError("output_size goes with a size of the images, and with labels or scores")


def _check_open(model: PretrainedModel, task: str, size: Size | int | None, batch_size: int | None) -> None:
    """Raises for combinations that are known to fail, before minutes of tracing."""
    backbone = getattr(getattr(getattr(model, "backbone", None), "config", None), "model_type", None)
    if size is None and backbone in FIXED_SIZE_BACKBONES:
        raise ValueError(
            f"a network with backbone {backbone!r} can be exported for images of one size only, as torch.export traces "
            "its window padding for one size; give size=(height, width)"
        )
    if size is None and batch_size is None and task == "events":
        raise ValueError(
            f"a {type(model).__name__} can be exported for any number of clips or for clips of any length, not both, "
            "as torch.export traces its transformer for one of them; give size or batch_size"
        )


def _examples(model: PretrainedModel, task: str, size: Size | int | None, batch_size: int | None) -> list[Tensor]:
    """The input to trace with, followed by the inputs to try the program on."""
    config, device = model.config, next(model.parameters()).device
    pixel_mean = getattr(config, "pixel_mean", ())
    channels = (len(pixel_mean),) if pixel_mean else ()
    multiple = next(
        getattr(config, name) for name in ("size_divisibility", "patch_size", "frame_samples") if hasattr(config, name)
    )
    given = (size,) if isinstance(size, int) else size
    examples = []
    for batch, sides in CLIPS if task == "events" else IMAGES:
        shape = given or [max(round(side * multiple), 1) for side in sides]
        examples.append(torch.zeros(batch_size or batch, *channels, *shape, device=device))
    return examples


def _trace(module: torch.nn.Module, example: Tensor, names: dict[int, str]) -> ExportedProgram:
    # Always the same attention kernel, because the memory layout of results, on which traced views depend, varies.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        try:
            program = torch.export.export(module, (example,), dynamic_shapes=(dict.fromkeys(names, Dim.DYNAMIC),))
        except Exception as error:
            if not names:
                raise
            raise _not_open(names, error) from error
    # Remove unused queries of dtypes, which torch.compile refuses.
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
    return program


def _check_other_sizes(program: ExportedProgram, inputs: list[Tensor], names: dict[int, str]) -> None:
    """Runs a program on sizes other than the traced one."""
    run = program.module()
    try:
        with torch.no_grad():
            for example in inputs:
                run(example)
    except Exception as error:
        raise _not_open(names, error) from error


def _not_open(names: dict[int, str], error: Exception) -> ValueError:
    reason = str(error).strip().partition("\n")[0]
    return ValueError(
        f"the network cannot be exported with {', '.join(names.values())} left open, give size and batch_size: {reason}"
    )
