"""Options that several subcommands have, and how they are read."""

from __future__ import annotations

from typing import Annotated

import typer

Split = Annotated[str, typer.Option(help="A split that the data set has.")]
Kind = Annotated[str, typer.Option(help="The data set's layout; found out by default.")]
SkipInvalid = Annotated[
    bool, typer.Option("--skip-invalid", help="Leave out invalid polygons of COCO instances and say how many.")
]
Precision = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
ShortSide = Annotated[
    int | None, typer.Option(min=1, help="The shorter side that the network sees, in pixels; the image's own.")
]
MaxSide = Annotated[int | None, typer.Option(min=1, help="The limit of the longer side, with --short-side.")]
Window = Annotated[int | None, typer.Option(min=0, help="Predict in square windows of this side.")]
Stride = Annotated[int | None, typer.Option(min=1, help="From one window to the next; the window's side.")]
Scales = Annotated[str, typer.Option(help="Average over these scales, such as 0.75,1,1.25.")]
Flip = Annotated[bool, typer.Option("--flip", help="Average with the mirror image.")]
OverlapThreshold = Annotated[float | None, typer.Option(help="Least visible share of a panoptic segment (0.8).")]


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
