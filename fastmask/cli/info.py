"""``fastmask info``: the kernels that were built."""

from __future__ import annotations


def info() -> None:
    """Show what was built and which kernels run on this machine."""
    from fastmask import show_config

    show_config()
