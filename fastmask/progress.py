"""Progress bars, where tqdm is installed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def with_bar(items: Iterable[T], total: int, description: str, *, hidden: bool | None = None) -> Iterable[T]:
    """The same items, and on stderr a bar that counts them; ``hidden=None`` shows it on a terminal only."""
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, description, total, disable=hidden)
