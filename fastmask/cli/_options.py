"""Options that several subcommands share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

Stride = Annotated[int | None, typer.Option(min=1, help="From one window to the next; the window's side by default.")]
Html = Annotated[Path | None, typer.Option(help="Write one HTML page of the results to this file.")]
HtmlImages = Annotated[int, typer.Option(min=1, help="Most images on the page.")]
Precision = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]


@dataclass(frozen=True)
class DataOptions:
    """Which part of a data set."""

    split: Annotated[str, typer.Option(help="A split of the data set.")] = "val"
    kind: Annotated[str, typer.Option(help="The data set's layout; recognized by default.")] = "auto"


@dataclass(frozen=True)
class PredictionOptions:
    """How a model predicts."""

    device: Annotated[str, typer.Option(help="Such as cpu or cuda:1; a GPU by default if there is one.")] = ""
    precision: Precision = "float32"
    short_side: Annotated[
        int | None, typer.Option(min=1, help="Shorter side that the network sees, in pixels; the image's by default.")
    ] = None
    max_side: Annotated[int | None, typer.Option(min=1, help="The limit of the longer side, with --short-side.")] = None
    window: Annotated[int | None, typer.Option(min=0, help="Predict in square windows of this side.")] = None
    stride: Stride = None
    scales: Annotated[str, typer.Option(help="Average over these scales, such as 0.75,1,1.25.")] = "1"
    flip: Annotated[bool, typer.Option("--flip", help="Average with the mirror image.")] = False
    overlap_threshold: Annotated[
        float | None, typer.Option(help="Least visible share of a panoptic segment (0.8).")
    ] = None

    def views(self) -> dict[str, Any]:
        """The arguments of ``evaluate`` and ``predict`` for precision, sizes, windows, scales and mirror images."""
        return {
            "precision": self.precision,
            "short_side": self.short_side,
            "max_side": self.max_side,
            "window": window_of(self.window, self.stride),
            "scales": numbers_of("--scales", self.scales),
            "flip": self.flip,
        }


def with_shared_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replaces the parameters of a command that are dataclasses by one option for each of their fields."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name not in groups:
            parameters.append(parameter.replace(annotation=hints[name], kind=parameter.KEYWORD_ONLY))
            continue
        of_fields = get_type_hints(groups[name], include_extras=True)
        parameters += [
            inspect.Parameter(f.name, parameter.KEYWORD_ONLY, default=f.default, annotation=of_fields[f.name])
            for f in fields(groups[name])
        ]

    @wraps(command)
    def expanded(**values: Any) -> None:
        own = {name: group(**{f.name: values.pop(f.name) for f in fields(group)}) for name, group in groups.items()}
        command(**values, **own)

    expanded.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # functions take any attribute
    expanded.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return expanded


def window_of(size: int | None, stride: int | None) -> tuple[int, int] | None:
    """(size, stride) of windows; the stride is the size by default.

    Raises:
        ValueError: a stride without a size.
    """
    if size is None:
        if stride is not None:
            raise ValueError("--stride goes with --window")
        return None
    return size, stride or size


def numbers_of(option: str, text: str) -> tuple[float, ...]:
    """Numbers between commas.

    Raises:
        ValueError: the text is something else; the message names the option.
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{option} is {text!r}; expected numbers and commas") from None
