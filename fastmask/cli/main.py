"""The command ``fastmask``. What a subcommand needs is imported when it runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fastmask.cli.convert import FORMATS, convert_checkpoint
from fastmask.cli.train import train

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Mask-classification segmentation with fused kernels.",
)
app.command()(train)
FORMAT_HELP = f"One of {', '.join(FORMATS)}"


@app.command()
def info() -> None:
    """Show what was built and which kernels run on this machine."""
    from fastmask import show_config

    show_config()


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A folder, or a file of weights (original).")],
    destination: Annotated[Path, typer.Argument(help="What to write; must not exist.")],
    to: Annotated[str, typer.Option(help=FORMAT_HELP + ".")] = "fastmask",
    source_format: Annotated[str, typer.Option("--from", help=FORMAT_HELP + "; found out by default.")] = "",
    num_queries: Annotated[int, typer.Option(help="Queries of the result; the source's by default.")] = 0,
    num_classes: Annotated[int, typer.Option(help="Classes of the result; the source's by default.")] = 0,
    ignore_mismatched_sizes: Annotated[
        bool, typer.Option(help="Start weights at random that depend on other numbers than the source's.")
    ] = False,
) -> None:
    """Convert a MaskFormer (or Segmenter) between fastmask, Hugging Face and the original repository."""
    model = convert_checkpoint(
        source,
        destination,
        to,
        source_format or None,
        num_queries=num_queries or None,
        num_classes=num_classes or None,
        ignore_mismatched_sizes=ignore_mismatched_sizes,
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    name, num_classes = type(model).__name__, model.config.num_classes
    print(f"{destination}: {name} with {parameters / 1e6:.2f} million parameters, {num_classes} classes")


def main() -> None:
    """Runs the command; errors of the user's input end it with a line instead of a traceback."""
    try:
        app()
    except (OSError, ImportError, FloatingPointError, ValueError, TypeError) as error:
        print(f"fastmask: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
