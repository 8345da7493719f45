"""``fastmask predict``: a model on images."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastmask.cli._options import numbers_of, window_of

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
        str, typer.Option(help="A data set, whose names, colours and category ids the results are to have.")
    ] = "",
    split: Annotated[str, typer.Option(help="A split that the data set has.")] = "val",
    kind: Annotated[str, typer.Option(help="The data set's layout; found out by default.")] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Images of one size to predict together.")] = 1,
    workers: Annotated[int, typer.Option(min=1, help="Threads that draw and write results.")] = 1,
    device: Annotated[str, typer.Option(help="Such as cuda:1; a GPU by default if there is one.")] = "",
    precision: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    short_side: Annotated[
        int | None, typer.Option(min=1, help="The shorter side that the network sees, in pixels; the image's own.")
    ] = None,
    max_side: Annotated[int | None, typer.Option(min=1, help="Limit of the longer side, with --short-side.")] = None,
    window: Annotated[int | None, typer.Option(min=0, help="Predict in square windows of this side.")] = None,
    stride: Annotated[int | None, typer.Option(min=1, help="From one window to the next; the window's side.")] = None,
    scales: Annotated[str, typer.Option(help="Average over these scales, such as 0.75,1,1.25.")] = "1",
    flip: Annotated[bool, typer.Option("--flip", help="Average with the mirror image.")] = False,
    threshold: Annotated[
        float | None, typer.Option(help="Probability of a panoptic segment (0.8), score of a drawn instance (0.5).")
    ] = None,
    overlap_threshold: Annotated[
        float | None, typer.Option(help="Least visible share of a panoptic segment (0.8).")
    ] = None,
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
    from fastmask.models.auto import model_folder, saved_type
    from fastmask.models.checkpoint import CONFIG_FILE

    info = open_dataset(data, split, kind).info
    if task == "instance":
        folder = model_folder(model)
        num_classes = saved_type(folder).config_class.load(folder / CONFIG_FILE).num_classes
        if info.num_classes != num_classes:
            return open_dataset(data, split, kind, "instance").info
    return info
