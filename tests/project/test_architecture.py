"""Imports run one way; the package imports where its optional parts are missing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fastmask

PACKAGE = Path(fastmask.__file__).parent
KERNELS = PACKAGE.parent / "kernels"

# What each part may import of ours, besides itself.
LEAVES = {"files", "mask_term", "targets", "version"}
ALLOWED = {
    "reference": set(),
    "files": set(),
    "mask_term": set(),
    "targets": set(),
    "version": set(),
    "kernels": {"targets"},
    "ops": {*LEAVES, "kernels", "reference"},
    "functional": {"ops"},
    "modules": {*LEAVES, "ops", "functional"},
    "data": {*LEAVES},
    "models": {*LEAVES, "ops", "functional", "modules"},
    "integrations": {*LEAVES, "ops", "functional", "modules", "models"},
    "metrics": {*LEAVES},
    "training": {*LEAVES, "ops", "functional", "modules", "models", "data", "metrics", "measure", "device"},
    "prediction": {*LEAVES, "models", "data", "device"},
    "export": {*LEAVES, "ops", "functional", "modules", "models"},
    "cli": {*LEAVES, *("ops functional modules models data metrics training prediction export".split())}
    | {"integrations", "testing", "measure", "device"},
    "testing": {*LEAVES, "ops"},
    "measure": set(),
    "device": set(),
}


def imported_parts(path: Path) -> set[str]:
    """First components below ``fastmask`` of every import in a file, also of those inside functions."""
    parts = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        parts |= {name.split(".")[1] for name in names if name.startswith("fastmask.")}
    return {part for part in parts if part in ALLOWED or (PACKAGE / part).exists() or (PACKAGE / f"{part}.py").exists()}


def source_files() -> list[tuple[str, Path]]:
    files = [(path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path) for path in PACKAGE.rglob("*.py")]
    files += [("kernels", path) for path in KERNELS.rglob("*.py")]
    return [(part, path) for part, path in files if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize(("part", "path"), source_files(), ids=lambda value: getattr(value, "name", value))
def test_imports_run_one_way(part, path):
    assert part in ALLOWED, f"{part} has no place in the order of imports"
    wrong = imported_parts(path) - ALLOWED[part] - {part}
    assert not wrong, f"{path} imports {', '.join(sorted(wrong))}"


def test_only_the_reference_backend_imports_the_reference():
    """Optimized code stands on its own: the reference is imported inside functions, when it is asked for."""
    for part, path in source_files():
        if part in ("reference", "cli"):
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom):
                assert node.module != "fastmask.reference", path
                assert not (node.module == "fastmask" and any(a.name == "reference" for a in node.names)), path


def test_importing_fastmask_is_light():
    """No Triton, SciPy, transformers or plotting library is imported before it is needed."""
    code = "import sys, torch; before = set(sys.modules); import fastmask; print(*(set(sys.modules) - before))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    heavy = {"triton", "scipy", "transformers", "matplotlib", "PIL", "typer"} & {name.split(".")[0] for name in loaded}
    assert not heavy


def test_public_names():
    assert all(hasattr(fastmask, name) for name in fastmask.__all__)
    assert (PACKAGE / "py.typed").exists()
    assert fastmask.__version__.count(".") == 2
