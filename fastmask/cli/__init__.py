"""The command ``fastmask``: a file for each subcommand."""

from fastmask.extras import extra

with extra("cli"):
    import typer as typer
