"""Loads ``libfastmask.so``, which holds the C++ and CUDA kernels, and names the operators.

If it cannot be loaded, the operators still exist, trace and compile; ``EXTENSION_ERROR`` says why they cannot run.
A build for Hugging Face's kernels has another file in this place: its operators have a namespace for each build.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch

EXTENSION = Path(__file__).parent.parent / "libfastmask.so"

if find_spec("fastmask.kernels") is None:  # as in a clone from which pip install . was run, without --editable
    raise ImportError(
        f"{EXTENSION.parent} is source code that hides the installed fastmask: start Python in another folder, or run "
        "pip install --no-build-isolation --editable . in the source tree"
    )


def _load_extension() -> str | None:
    """None, or the reason why the extension could not be loaded."""
    if not EXTENSION.exists():
        return f"{EXTENSION.name} was not built (run pip install --no-build-isolation --editable . in the source tree)"
    try:
        torch.ops.load_library(str(EXTENSION))
    except OSError as error:
        return f"{EXTENSION.name} could not be loaded: {error}"
    return None


EXTENSION_ERROR = _load_extension()

ops = torch.ops.fastmask


def add_op_namespace_prefix(name: str) -> str:
    """The full name of an operator."""
    return f"fastmask::{name}"
