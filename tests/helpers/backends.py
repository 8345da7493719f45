"""The kernels that a test runs, by name: "native-" and a SIMD level, "triton", or a backend of that name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest

from fastmask.ops._registry import triton_interpreted
from fastmask.testing import simd_level, simd_levels

KERNELS = (*(f"native-{level}" for level in simd_levels()), "triton")


@contextmanager
def kernels(name: str) -> Iterator[str]:
    """The backend to ask for; Triton's kernels are interpreted."""
    backend, _, level = name.partition("-")
    if backend == "triton":
        interpret()
    with simd_level(level) if level else nullcontext():
        yield backend


def interpret() -> None:
    """Triton's kernels run on CPU tensors in this process."""
    if not triton_interpreted():
        pytest.skip("Triton's kernels are compiled here; TRITON_INTERPRET=1 interprets them")
    from tests.helpers import interpreter

    interpreter.improve()
