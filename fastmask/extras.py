"""Optional packages, each installed by an extra of the distribution."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Wraps imports of optional packages: if one fails, the error names the extra that installs it.

    Raises:
        ImportError: an import inside failed; the message ends with the command that installs the extra ``name``.
    """
    try:
        yield
    except ImportError as error:
        raise ImportError(f"{error}; pip install 'fastmask-kernels[{name}]'", name=error.name) from error
