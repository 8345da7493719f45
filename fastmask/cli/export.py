"""``fastmask export``: a model as an ONNX file or a program of ``torch.export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    model: Annotated[Path, typer.Argument(help="The folder of a model or of a run of training.")],
    output: Annotated[Path, typer.Argument(help="The file to write: .onnx, or .pt2 for torch.export.load.")],
    task: Annotated[
        str, typer.Option(help="semantic (the default), scores or logits; events for a sound event detector.")
    ] = "",
    size: Annotated[
        tuple[int, int] | None, typer.Option(metavar="HEIGHT WIDTH", help="Of all images; any by default.")
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Of all clips, for sound; any by default.")] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch", min=1, help="Images or clips at a time; any number by default.")
    ] = None,
    output_size: Annotated[
        tuple[int, int] | None,
        typer.Option(metavar="HEIGHT WIDTH", help="Of the result, with --size; the image's by default."),
    ] = None,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Keep fastmask's kernels in a .pt2, which then loads with fastmask only.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that exists.")] = False,
) -> None:
    """Export a model, from images to labels, to run without its Python code.

    The program takes RGB images as float32 (B, 3, H, W) in 0..1, normalises and
    pads them itself, and gives labels (B, H, W). An ONNX file holds standard
    operators only and names the classes in its metadata.
    """
    from fastmask.export import export_onnx, export_pt2
    from fastmask.models import load_model

    if output.suffix not in (".onnx", ".pt2"):
        raise ValueError(f"OUTPUT must end with .onnx or .pt2, got {str(output)!r}")
    if size is not None and samples is not None:
        raise ValueError("--size is for images, --samples for sound; give one of them")
    options = {
        "task": task or None,
        "size": size or samples,
        "batch_size": batch_size,
        "output_size": output_size,
        "overwrite": overwrite,
    }
    if output.suffix == ".onnx":
        if kernels:
            raise ValueError("--kernels goes with .pt2; an ONNX file holds standard operators only")
        export_onnx(load_model(model), output, **options)
    else:
        export_pt2(load_model(model), output, portable=not kernels, **options)
    print(f"{output}: {output.stat().st_size / 1e6:.1f} MB")
