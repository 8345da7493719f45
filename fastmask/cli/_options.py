"""What several subcommands read from their options."""

from __future__ import annotations


def window_of(size: int | None, stride: int | None) -> tuple[int, int] | None:
    """(size, stride) of windows; a stride that is not given is the size.

    Raises:
        ValueError: a stride alone.
    """
    if size is None:
        if stride is not None:
            raise ValueError("--stride goes with --window")
        return None
    return size, stride or size


def numbers_of(option: str, text: str) -> tuple[float, ...]:
    """Numbers between commas.

    Raises:
        ValueError: something else; the message names the option.
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{option} is {text!r}; expected numbers and commas") from None
