"""Weights from files of other libraries. Nothing in a file is executed."""

from __future__ import annotations

import collections
import importlib
import pickle
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmask.models.weight_files import load_weights, without_prefix

SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin", ".pkl")


def read_weights(path: str | Path, prefix: str = "") -> dict[str, Tensor]:
    """The weights in a file of safetensors (``.safetensors``), PyTorch (``.pth``, ``.pt``, ``.bin``), Lightning
    (``.ckpt``) or detectron2 (``.pkl``), without the dict "model" or "state_dict" that may hold them.

    Args:
        path: of the file.
        prefix: of the names, such as "module." of DistributedDataParallel or "model." of a Lightning module; it is
            stripped, and weights without it are left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of another kind, one that is truncated, one that holds more than arrays, or one without a
            name that begins with ``prefix``.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    if path.suffix == ".safetensors":
        return without_prefix(load_weights(path), prefix, str(path))
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} is no {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file")
    try:
        content = _unpickle_arrays(path) if path.suffix == ".pkl" else torch.load(path, "cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError, UnicodeDecodeError, ImportError, AttributeError) as error:
        raise ValueError(f"{path} could not be read as weights: {error}") from error
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected weights by name")
    weights = {}
    for name, value in content.items():
        if not isinstance(value, Tensor | np.ndarray):
            raise ValueError(f"{path} holds {name} of type {type(value).__name__}; expected an array")
        weights[name] = value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
    return without_prefix(weights, prefix, str(path))


def _unpickle_arrays(path: Path) -> Any:
    with path.open("rb") as file:
        return _ArraysOnly(file, encoding="latin1").load()


class _ArraysOnly(pickle.Unpickler):
    """Reads NumPy arrays in dicts and lists, and refuses to import anything else: unpickling may run any code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("_codecs", "encode"):
            return _latin1
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name in ("_reconstruct", "scalar"):
            return getattr(_numpy_core("multiarray"), name)
        if module in ("numpy.core.numeric", "numpy._core.numeric") and name == "_frombuffer":
            return getattr(_numpy_core("numeric"), name)
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, and only arrays are read")


def _numpy_core(module: str) -> ModuleType:
    """A module of NumPy's core, which version 2 renamed."""
    return importlib.import_module(f"numpy.{'_core' if hasattr(np, '_core') else 'core'}.{module}")


def _latin1(text: str, encoding: str) -> bytes:
    """How pickle's older protocols hold bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it holds bytes as {encoding}")
    return text.encode("latin1")
