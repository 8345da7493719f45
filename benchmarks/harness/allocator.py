"""The settings of the memory allocator that CPU benchmarks run with, each in a process of its own."""

from __future__ import annotations

import os
import platform

DEFAULT, RETAINING = "default", "retaining"
# glibc reads these when a process starts: it then takes all blocks from a heap, which grows in large steps and never
# shrinks, whereas by default each large block is a mapping of its own that ends when the block is freed.
RETAIN = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_TOP_PAD_": "268435456"}


def allocators(device: str) -> tuple[str, ...]:
    """The settings that make a difference on a device, "cpu" or "cuda"."""
    return (DEFAULT, RETAINING) if device == "cpu" and platform.libc_ver()[0] == "glibc" else (DEFAULT,)


def environment_with(allocator: str) -> dict[str, str]:
    """This process's environment with one of the settings, and without any other of glibc's allocator."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    return kept | (RETAIN if allocator == RETAINING else {})


def current_allocator() -> str:
    """The setting that this process runs with."""
    return RETAINING if os.environ.items() >= RETAIN.items() else DEFAULT
