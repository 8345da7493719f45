"""The subcommands of ``fastmask``, which import what they need when they run."""

from __future__ import annotations

import sys

import typer

from fastmask.cli.bench import bench
from fastmask.cli.convert import convert
from fastmask.cli.evaluate import evaluate
from fastmask.cli.export import export
from fastmask.cli.info import info
from fastmask.cli.predict import predict
from fastmask.cli.train import train

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Mask-classification segmentation with fused kernels.",
)
app.command()(train)
app.command()(evaluate)
app.command()(predict)
app.command()(bench)
app.command()(convert)
app.command()(export)
app.command()(info)


def main() -> None:
    """Runs the command; errors of the user's input end it with a line instead of a traceback."""
    try:
        app()
    except (OSError, ImportError, FloatingPointError, ValueError, TypeError) as error:
        print(f"fastmask: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
