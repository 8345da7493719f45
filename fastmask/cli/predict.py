"""``fastmask predict``: a model on images."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastmask.cli._options import DataOptions, Html, HtmlImages, PredictionOptions, with_shared_options

if TYPE_CHECKING:
    from fastmask.data import DatasetInfo


@with_shared_options
def predict(
    model: Annotated[Path, typer.Argument(help="The folder of a model or of a training run.")],
    images: Annotated[list[Path], typer.Argument(help="Images, and folders of images.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write to.")],
    part: DataOptions,
    how: PredictionOptions,
    task: Annotated[
        str,
        typer.Option(
            help="semantic, general (each pixel to one query), panoptic or instance; by default that of the run."
        ),
    ] = "",
    data: Annotated[
        str, typer.Option(help="A data set whose class names, colors and category ids the results take.")
    ] = "",
    batch_size: Annotated[int, typer.Option(min=1, help="Images of one size to predict together.")] = 1,
    workers: Annotated[int, typer.Option(min=1, help="Threads that draw and write results.")] = 1,
    threshold: Annotated[
        float | None, typer.Option(help="Probability of a panoptic segment (0.8), score of a drawn instance (0.5).")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Most instances of an image (100).")] = None,
    overlays: Annotated[bool, typer.Option(help="Draw the results over the images.")] = True,
    html: Html = None,
    html_images: HtmlImages = 50,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing results.")] = False,
) -> None:
    """Segment images: label maps, COCO's panoptic or instance formats, and pictures.

    Images that cannot be read are listed at the end, and the exit code is 1; the results of the others are written.
    """
    from fastmask import prediction

    result = prediction.predict(
        model,
        images,
        output,
        task=task or None,
        info=_class_info(data, part, task, model) if data else None,
        batch_size=batch_size,
        workers=workers,
        device=how.device or None,
        **how.views(),
        threshold=threshold,
        overlap_threshold=how.overlap_threshold,
        top_k=top_k,
        overlays=overlays,
        html=html,
        html_images=html_images,
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


def _class_info(data: str, part: DataOptions, task: str, model: Path) -> DatasetInfo:
    """The classes of a data set; for instances, of its things alone if the model has as many."""
    from fastmask.data import open_dataset
    from fastmask.models._registry import load_config

    info = open_dataset(data, part.split, part.kind).info
    if task == "instance" and info.num_classes != load_config(model).num_classes:
        return open_dataset(data, part.split, part.kind, "instance").info
    return info
