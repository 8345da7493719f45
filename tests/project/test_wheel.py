"""A built wheel, installed elsewhere, works."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
SOURCES = ("fastmask", "csrc", "kernels", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")

USE = """
import torch, fastmask, fastmask.kernels
from fastmask.data import ComposedScenes, collate_scenes
assert fastmask.__file__.startswith({site!r}), fastmask.__file__
assert fastmask.kernels.__file__.startswith({site!r}), fastmask.kernels.__file__
images, targets = collate_scenes([ComposedScenes("val")[i] for i in range(2)])
model = fastmask.MaskFormer(fastmask.models.MaskFormerConfig.preset("tiny", num_classes=13))
losses = model(images, targets)
sum(losses.values()).backward()
fastmask.mask_cost(torch.randn(2, 4, 14), torch.randn(2, 4, 32, 32), targets, backend="native")
fastmask.show_config()
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built in a copy of the sources, so that nothing that lies about in the tree gets in; without CUDA, for speed."""
    source, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "build")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", dist, source]
    subprocess.run(command, check=True, env={**os.environ, "FASTMASK_CUDA_ARCHS": ""})
    (path,) = dist.iterdir()
    return path


def test_a_wheel_holds_what_it_should_and_works_where_it_is_installed(wheel, tmp_path):
    check_content(wheel)
    check_installed(wheel, tmp_path / "site")


def check_content(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.name.startswith("fastmask_kernels-")
    for name in ("libfastmask.so", "py.typed", "kernels/__init__.py", "prediction/page.css", "prediction/page.js"):
        assert f"fastmask/{name}" in names
    assert any(name.startswith("fastmask/_native") for name in names)
    assert any(name.startswith("fastmask/data/assets/") for name in names)
    (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
    lines = zipfile.ZipFile(wheel).read(metadata).decode().splitlines()
    required = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    base = {re.match(r"[\w-]+", line)[0] for line in required if "extra ==" not in line}
    assert base == {"torch", "triton", "numpy", "scipy"}
    assert not any(name.startswith(("tests/", "benchmarks/", "csrc/", "kernels/")) for name in names)


def check_installed(wheel: Path, site: Path) -> None:
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel]
    subprocess.run(install, check=True)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    for arguments in (["-c", USE.format(site=str(site))], [ROOT / ".ci" / "wheel_smoke.py"]):
        run = subprocess.run(
            [sys.executable, *arguments], cwd=site.parent, env=environment, capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stderr
        assert re.search("mask_cost +native", run.stdout)
    assert f"from {site}" in run.stdout
