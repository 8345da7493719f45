"""README and documentation: their Python runs as written, their commands parse, and their links lead somewhere.

The blocks of a page run in order, in one namespace. ``<!-- slow -->`` before a block keeps it for ``-m slow``, and
``<!-- not run: REASON -->`` from running at all.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

import click
import pytest
import torch
import typer

import fastmask
from fastmask.cli.main import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(?:^<!-- (slow|not run: .+) -->\n)?^( *)```(\w+)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")


class Block(NamedTuple):
    mark: str
    language: str
    code: str
    line: int


def blocks(page: Path, language: str) -> list[Block]:
    text = page.read_text()
    found = [
        Block(match[1] or "", match[3], match[4], text.count("\n", 0, match.start(4))) for match in BLOCK.finditer(text)
    ]
    return [block for block in found if block.language == language]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def run(page: Path, chosen: list[Block]) -> None:
    torch.manual_seed(0)
    namespace = {"__name__": "__main__"}
    for block in chosen:
        exec(compile("\n" * block.line + block.code, page, "exec"), namespace)


QUICK = [page for page in PAGES if any(not block.mark for block in blocks(page, "python"))]
SLOW = [page for page in PAGES if any(block.mark == "slow" for block in blocks(page, "python"))]


@pytest.mark.parametrize("page", QUICK, ids=name)
def test_python_runs_as_written(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(page, [block for block in blocks(page, "python") if not block.mark])


@pytest.mark.slow
@pytest.mark.parametrize("page", SLOW, ids=name)
def test_slow_python_runs_as_written(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(page, [block for block in blocks(page, "python") if block.mark in ("", "slow")])


def commands(page: Path) -> list[list[str]]:
    """The words of each call of ``fastmask`` in the page's shell blocks."""
    lines = "\n".join(block.code for block in blocks(page, "bash")).replace("\\\n", " ").splitlines()
    called = [line.replace("-m fastmask ", "; fastmask ").rsplit("; ", 1)[-1] for line in lines]
    return [shlex.split(line, comments=True) for line in called if line.startswith("fastmask ")]


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=name)
def test_commands_have_the_options_that_they_are_given(page):
    group = typer.main.get_command(app)
    for _, command, *arguments in commands(page):
        assert command in group.commands, command
        context = click.Context(group.commands[command], info_name=command)
        group.commands[command].make_parser(context).parse_args(arguments)


def test_links_lead_to_files():
    for page in PAGES:
        for link in LINK.findall(page.read_text()):
            assert (page.parent / link).exists(), f"{name(page)} links to {link}"


def test_the_version_is_the_same_everywhere():
    changelog, citation = (ROOT / "CHANGELOG.md").read_text(), (ROOT / "CITATION.cff").read_text()
    date = re.search(rf"^## \[{re.escape(fastmask.__version__)}\] - (\d{{4}}-\d\d-\d\d)$", changelog, re.MULTILINE)[1]
    assert f"\nversion: {fastmask.__version__}\ndate-released: {date}\n" in citation


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
