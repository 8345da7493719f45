"""Launches of Triton kernels that operators have planned."""

from __future__ import annotations

import gc


def forget_compiled_kernels() -> None:
    """The next call of each launch goes through Triton, as the first one does."""
    from fastmask.kernels._launch import Kernel, Launch

    for each in gc.get_objects():
        if type(each) is Launch:  # isinstance would ask what weak references refer to
            each.launchers.clear()
        elif type(each) is Kernel:
            each.compiled.clear()
