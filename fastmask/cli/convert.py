"""``fastmask convert``: checkpoints from one format to another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

FORMAT_HELP = "One of fastmask, huggingface, original"


def convert(
    source: Annotated[Path, typer.Argument(help="A folder, or a file of weights (original).")],
    destination: Annotated[Path, typer.Argument(help="The folder or file to write; must not exist.")],
    to: Annotated[str, typer.Option(help=FORMAT_HELP + ".")] = "fastmask",
    source_format: Annotated[str, typer.Option("--from", help=FORMAT_HELP + "; recognized by default.")] = "",
    num_queries: Annotated[
        int | None, typer.Option(min=1, help="Queries of the result; the source's by default.")
    ] = None,
    num_classes: Annotated[
        int | None, typer.Option(min=1, help="Classes of the result; the source's by default.")
    ] = None,
    ignore_mismatched_sizes: Annotated[
        bool,
        typer.Option(
            "--ignore-mismatched-sizes", help="Start weights at random whose shapes differ from the source's."
        ),
    ] = False,
    prefix: Annotated[
        str, typer.Option(help='What wrappers put before the names of weights: "module." (DDP), "model." (Lightning).')
    ] = "",
) -> None:
    """Convert a network between the formats of fastmask, Hugging Face and its authors."""
    from fastmask.integrations.checkpoints import convert_checkpoint

    model = convert_checkpoint(
        source,
        destination,
        to,
        source_format or None,
        num_queries=num_queries,
        num_classes=num_classes,
        ignore_mismatched_sizes=ignore_mismatched_sizes,
        prefix=prefix,
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    name, num_classes = type(model).__name__, model.config.num_classes
    print(f"{destination}: {name} with {parameters / 1e6:.2f} million parameters, {num_classes} classes")
