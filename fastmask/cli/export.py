"""``fastmask export``: a model as an ONNX file or a program of ``torch.export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fastmask.cli._options import Stride, window_of


def export(
    model: Annotated[Path, typer.Argument(help="The folder of a model or of a training run.")],
    output: Annotated[Path, typer.Argument(help="The file to write: .onnx, or .pt2 for torch.export.load.")],
    task: Annotated[
        str, typer.Option(help="semantic (the default), scores or logits; events for a sound event detector.")
    ] = "",
    size: Annotated[
        tuple[int, int] | None, typer.Option(metavar="HEIGHT WIDTH", help="Size of all images; any by default.")
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Samples of all clips, for sound; any by default.")] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch", min=1, help="Images or clips at a time; any number by default.")
    ] = None,
    output_size: Annotated[
        tuple[int, int] | None,
        typer.Option(metavar="HEIGHT WIDTH", help="Size of the result, with --size; the image's by default."),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Side of a Segmenter's windows, with --size; its own by default, 0 for whole images. Without --size "
            "it predicts whole images, which gives other labels.",
        ),
    ] = None,
    stride: Stride = None,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Keep fastmask's kernels in a .pt2, which then loads with fastmask only.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that exists.")] = False,
) -> None:
    """Export a model, from images to labels, to run without its Python code.

    The program takes RGB images as float32 (B, 3, H, W) in 0..1, normalizes and
    pads them itself, and gives labels (B, H, W). An ONNX file holds standard
    operators only and names the classes in its metadata. A Segmenter's program
    predicts in windows with --size; without it the program predicts whole
    images, which changes labels.
    """
    from fastmask.export import export_onnx, export_pt2
    from fastmask.models import Segmenter, load_model

    if output.suffix not in (".onnx", ".pt2"):
        raise ValueError(f"OUTPUT must end with .onnx or .pt2, got {str(output)!r}")
    if size is not None and samples is not None:
        raise ValueError("--size is for images, --samples for sound; give one of them")
    options: dict[str, Any] = {
        "task": task or None,
        "size": size or samples,
        "batch_size": batch_size,
        "output_size": output_size,
        "window": window_of(window, stride),
        "overwrite": overwrite,
    }
    if kernels and output.suffix == ".onnx":
        raise ValueError("--kernels goes with .pt2; an ONNX file holds standard operators only")
    network = load_model(model)
    if output.suffix == ".onnx":
        export_onnx(network, output, **options)
    else:
        export_pt2(network, output, portable=not kernels, **options)
    how = ""
    if isinstance(network, Segmenter) and task != "logits":
        side, step = network.window_of(options["window"]) if size else (0, 0)
        how = f"; predicts in windows of {side} pixels, every {step}" if side else "; predicts images whole"
    print(f"{output}: {output.stat().st_size / 1e6:.1f} MB{how}")
