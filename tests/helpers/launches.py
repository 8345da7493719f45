"""Launches of Triton kernels that operators have planned."""

from __future__ import annotations

import sys


def forget_compiled_kernels() -> None:
    """The next call of each operator plans its launches and goes through Triton, as the first one does."""
    from fastmask.kernels._launch import Kernel

    for module in [each for name, each in sys.modules.items() if name.startswith("fastmask.kernels.")]:
        for value in vars(module).values():
            if isinstance(value, Kernel):
                value.compiled.clear()
            elif hasattr(value, "cache_clear"):
                value.cache_clear()
