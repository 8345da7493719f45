"""Networks as programs of ``torch.export``."""

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
from fastmask.export.tasks import check_task, check_window, module_of_task
from fastmask.files import replace_file
from fastmask.models._base import PretrainedModel
from fastmask.models._images import Size
from fastmask.modules.attention import MaskedCrossAttention
from fastmask.ops._registry import choose_backend
from fastmask.ops.semantic import SEMANTIC_INFERENCE

METADATA_FILE = "fastmask.json"
# Batch and sides of what open dimensions are traced with, and of what the program is run with afterwards: fewer and
# more, multiples and not. Sides are in units of what the network pads them to a multiple of.
IMAGES = ((2, (4.6, 6.7)), (1, (2.1, 9.0)), (3, (7.0, 3.4)))
CLIPS = ((2, (24.3,)), (1, (31.7,)), (3, (17.0,)))
# They pad to whole windows, by arithmetic on the sides that takes minutes to trace and then holds for one size alone.
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
    """The way of a network from images (or waveforms) to results as a program of ``torch.export``.

    See :mod:`fastmask.export` for its inputs and outputs. ``program.module()(images)`` runs it and returns a dict of
    the outputs. The network itself stays as it is: what is traced is a copy in evaluation mode and float32, on the
    network's device, where the program will run.

    Args:
        model: a network of :mod:`fastmask.models`.
        task: "semantic", "scores" or "logits" of networks that take images (by default "semantic"); "events" of a
            :class:`fastmask.SoundEventDetector`.
        size: (height, width) of all images, or the number of samples of all clips; None for any (a Segmenter's are then
            larger than one patch each way).
        batch_size: how many images or clips there are at a time; None for any number.
        output_size: (height, width) of labels or scores; by default that of the images. Goes with ``size``.
        window: of labels and scores of a Segmenter, (size, stride) of the windows that images are predicted in, as for
            its ``predict``; goes with ``size``. 0 for whole images. By default the configuration's windows where there
            is a ``size``; without one whole images, with a warning, as their labels differ from those of windows.
        portable: True for a program of PyTorch's own operators, which runs where fastmask is not installed. False to
            keep fastmask's operators, with their kernels and without N masks at full size; such a program loads after
            ``import fastmask``.

    Raises:
        TypeError: not one of our networks, or sizes or a window that are none.
        ValueError: an unknown task, sizes below 1, a window that is out of range or goes with nothing else that is
            asked for, or a network that cannot leave open what is None; the message says what to give.
        RuntimeError: ``portable=False`` where fastmask has no kernels for the device, or they were not built.
    """
    task = check_task(model, task)
    _check_sizes(task, size, batch_size, output_size)
    _check_open(model, task, size, batch_size)
    if window is None and size is None and (windows := check_window(model, task, (1, 1), None)):
        warnings.warn(
            f"the program predicts whole images, and predict windows of {windows[0]} pixels: labels differ. "
            "size=(height, width) exports the windows; window=0 says that whole images are meant",
            stacklevel=2,
        )
    window = check_window(model, task, size, window)
    traced = copy.deepcopy(model).eval().float().requires_grad_(False)
    parameter = next(traced.parameters())
    backend = "reference"
    if not portable:
        backend = choose_backend(SEMANTIC_INFERENCE, "triton" if parameter.is_cuda else "native", parameter)
    for module in traced.modules():
        if isinstance(module, MaskedCrossAttention):
            module.backend = backend

    example, *others = _examples(traced, task, size, batch_size)
    names = open_dims(task, size, batch_size)
    program = _trace(module_of_task(traced, task, output_size, backend, window).eval(), example, names)
    if names:
        _check_other_sizes(program, others, names)
    return program


def export_pt2(model: PretrainedModel, path: str | Path, *, overwrite: bool = False, **options: Any) -> Path:
    """Writes the program of a network to a file for ``torch.export.load``, whole or not at all.

    An extra file in it, "fastmask.json", holds a JSON object of strings: "fastmask_version", "model", "task",
    "class_names" (a JSON list), and more of the configuration.

    Args:
        model: as for :func:`export_program`.
        path: ends with ".pt2".
        overwrite: replace a file that exists.
        options: as for :func:`export_program`.

    Raises:
        ValueError: the path ends otherwise.
        FileExistsError: it exists, and ``overwrite`` is False.
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
    """The dimensions of the input that are left open, and their names."""
    names = {} if batch_size is not None else {0: "batch"}
    if size is None:
        names |= {1: "samples"} if task == "events" else {2: "height", 3: "width"}
    return names


def _check_sizes(task: str, size: Size | int | None, batch_size: int | None, output_size: Size | None) -> None:
    kinds = {"size": 1 if task == "events" else 2, "batch_size": 1, "output_size": 2}
    for (name, length), value in zip(kinds.items(), (size, batch_size, output_size), strict=True):
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
    """Refuses what is known not to trace, before minutes of trying."""
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
    """What to trace a program with, and what to run it with afterwards."""
    config, device = model.config, next(model.parameters()).device
    channels = () if task == "events" else (len(config.pixel_mean),)
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
    # One kernel of attention throughout: each lays its result out in memory in its own way, which views of it follow.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        try:
            program = torch.export.export(module, (example,), dynamic_shapes=(dict.fromkeys(names, Dim.DYNAMIC),))
        except Exception as error:
            if not names:
                raise
            raise _not_open(names, error) from error
    # Questions that Python asked of dtypes, which torch.compile refuses.
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
    return program


def _check_other_sizes(program: ExportedProgram, inputs: list[Tensor], names: dict[int, str]) -> None:
    """Runs a program on other sizes than it was traced with."""
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
