"""``fastmask predict``: a model on images."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastmask.cli._options import (
    Flip,
    Kind,
    MaxSide,
    OverlapThreshold,
    Precision,
    Scales,
    ShortSide,
    Split,
    Stride,
    Window,
    numbers_of,
    window_of,
)

if TYPE_CHECKING:
    from fastmask.data import DatasetInfo


def predict(
    model: Annotated[Path, typer.Argument(help="The folder of a model or of a run of training.")],
    images: Annotated[list[Path], typer.Argument(help="Images, and folders of images.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write to.")],
    task: Annotated[
        str,
        typer.Option(
            help="semantic, general (each pixel to one query), panoptic or instance; by default what the run was for."
        ),
    ] = "",
    data: Annotated[
        str, typer.Option(help="A data set, whose names, colors and category ids the results are to have.")
    ] = "",
    split: Split = "val",
    kind: Kind = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Images of one size to predict together.")] = 1,
    workers: Annotated[int, typer.Option(min=1, help="Threads that draw and write results.")] = 1,
    device: Annotated[str, typer.Option(help="Such as cuda:1; a GPU by default if there is one.")] = "",
    precision: Precision = "float32",
    short_side: ShortSide = None,
    max_side: MaxSide = None,
    window: Window = None,
    stride: Stride = None,
    scales: Scales = "1",
    flip: Flip = False,
    threshold: Annotated[
        float | None, typer.Option(help="Probability of a panoptic segment (0.8), score of a drawn instance (0.5).")
    ] = None,
    overlap_threshold: OverlapThreshold = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Most instances of an image (100).")] = None,
    overlays: Annotated[bool, typer.Option(help="Draw the results over the images.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace results that are there already.")] = False,
) -> None:
    """Segment images: label maps, COCO's panoptic or instance formats, and pictures.

    Images that cannot be read are named at the end, and the exit code is 1; the others are written all the same.
    """
    from fastmask import prediction

    result = prediction.predict(
        model,
        images,
        output,
        task=task or None,
        info=_class_info(data, split, kind, task, model) if data else None,
        batch_size=batch_size,
        workers=workers,
        device=device or None,
        precision=precision,
        short_side=short_side,
        max_side=max_side,
        window=window_of(window, stride),
        scales=numbers_of("--scales", scales),
        flip=flip,
        threshold=threshold,
        overlap_threshold=overlap_threshold,
        top_k=top_k,
        overlays=overlays,
        overwrite=overwrite,
        progress=True,
    )
    count = len(result.written)
    paths = ", ".join(map(str, result.paths)) or "nothing written"
    noun = "image" if count == 1 else "images"
    print(f"{result.task}: {count} {noun} in {result.seconds:.1f} s ({result.images_per_second:.1f} a second): {paths}")
    if result.failures:
        print(f"fastmask: {len(result.failures)} of {count + len(result.failures)} could not be read:", file=sys.stderr)
        for path, reason in result.failures:
            print(f"  {path}: {reason}", file=sys.stderr)
        raise typer.Exit(1)


def _class_info(data: str, split: str, kind: str, task: str, model: Path) -> DatasetInfo:
    """The classes of a data set: where instances are asked for, of its things alone if the model has as many."""
    from fastmask.data import open_dataset
    from fastmask.models._registry import load_config

    info = open_dataset(data, split, kind).info
    if task == "instance" and info.num_classes != load_config(model).num_classes:
        return open_dataset(data, split, kind, "instance").info
    return info
