"""Networks as ONNX files."""

from __future__ import annotations

import copy
import importlib
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastmask.export.description import check_path, describe
from fastmask.export.program import export_program, open_dims
from fastmask.export.task_module import check_task, check_window
from fastmask.extras import extra
from fastmask.files import replace_file
from fastmask.models._base import PretrainedModel
from fastmask.models._images import Size

OPSET = 18  # PyTorch's exporter writes this opset without conversion
MAX_BYTES = 2**31 - 2**24  # of weights: protobuf's limit, less room for the graph
LOUD = ("torch.onnx", "onnxscript", "onnx_ir")


def export_onnx(
    model: PretrainedModel,
    path: str | Path,
    *,
    task: str | None = None,
    size: Size | int | None = None,
    batch_size: int | None = None,
    output_size: Size | None = None,
    window: int | tuple[int, int] | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a network as an ONNX file of opset 18, atomically.

    The input images are float32 in 0..1; images in 0..255 give wrong labels without an error. The file contains only
    standard operators and all weights, in float32 whatever the dtype of the network. Inputs and outputs have the names
    that :mod:`fastmask.export` lists; open dimensions are called "batch", "height", "width" and "samples".
    ``metadata_props`` has "fastmask_version", "model", "task", "class_names" (a JSON list), and more of the
    configuration. The network does not change.

    For labels and scores, a MaskFormer takes N * H * W floats per image for its masks at the size of the image, and
    K * H * W for the scores: 100 queries at 1024 x 2048 are 840 MB. If that is too much, export "logits".

    Args:
        model: a network of :mod:`fastmask.models`.
        path: ends with ".onnx".
        task, size, batch_size, output_size, window: as for :func:`fastmask.export.export_program`.
        overwrite: replace an existing file.

    Raises:
        ImportError: onnx or onnxscript is not installed.
        ValueError: the path has another ending, or the weights exceed the 2 GB that a file holds.
        FileExistsError: the file exists, and ``overwrite`` is False.
        TypeError, ValueError: as for :func:`fastmask.export.export_program`.
    """
    path = check_path(path, ".onnx", overwrite)
    for package in ("onnx", "onnxscript"):
        _require(package)
    task = check_task(model, task)
    nbytes = 4 * sum(value.numel() for value in model.state_dict().values())
    if nbytes > MAX_BYTES:
        raise ValueError(f"the weights take {nbytes / 1e9:.1f} GB; an ONNX file holds 2 GB")
    on_cpu = model if next(model.parameters()).device.type == "cpu" else copy.deepcopy(model).cpu()
    program = export_program(
        on_cpu, task=task, size=size, batch_size=batch_size, output_size=output_size, window=window
    )
    proto = _convert(program, open_dims(task, size, batch_size))
    for key, value in describe(model, task, check_window(model, task, size, window)).items():
        proto.metadata_props.add(key=key, value=value)
    _require("onnx").checker.check_model(proto)
    replace_file(path, lambda temporary: temporary.write_bytes(proto.SerializeToString()))
    return path


def _convert(program: ExportedProgram, dims: dict[int, str]) -> Any:
    """The ``onnx.ModelProto`` of a program, with names of open dimensions."""
    example = program.example_inputs[0][0]
    name = program.graph_signature.user_inputs[0]
    node = next(node for node in program.graph.nodes if node.name == name)
    symbols = {str(node.meta["val"].shape[dim]): dim_name for dim, dim_name in dims.items()}
    outputs = list(program.call_spec.out_spec.unflatten(list(program.graph_signature.user_outputs)))
    with _quiet(), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        exported = torch.onnx.export(
            program,
            (example,),
            input_names=[name],
            output_names=outputs,
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
        )
    assert exported is not None  # it is None only with dynamo=False
    proto = exported.model_proto
    _rename_dims(proto, symbols)
    return proto


def _rename_dims(proto: Any, names: dict[str, str]) -> None:
    """Replaces the symbols of open dimensions by their names."""
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(r"\w+", lambda symbol: names.get(symbol[0], symbol[0]), dim.dim_param)


def _require(package: str) -> Any:
    with extra("export"):
        return importlib.import_module(package)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides the exporter's notes on optional packages and on constants that it does not fold."""
    loggers = [logging.getLogger(name) for name in LOUD]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
