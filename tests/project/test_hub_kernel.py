"""The kernel for Hugging Face's hub is what kernel-builder takes, and works where ``kernels`` loads it."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HUB = runpy.run_path(str(ROOT / ".ci" / "hub_kernel.py"))

LOAD = """
import sys
from pathlib import Path
import torch
from kernels import get_local_kernel
"""
CHECKED = """
sys.modules["fastmask"] = None  # cannot be imported
kernel = get_local_kernel(Path({folder!r}))
sys.path.append({ci!r})
import wheel_smoke
wheel_smoke.check(kernel)
"""
BESIDE_FASTMASK = """
import fastmask
kernel = get_local_kernel(Path({folder!r}))
torch.manual_seed(0)
arguments = torch.randn(2, 10, 6), torch.randn(2, 10, 16, 16)
costs = []
for module in (fastmask, kernel):
    targets = module.Targets.from_segmentation(torch.arange(2 * 64 * 64).view(2, 64, 64) % 5, 5)
    costs.append(torch.compile(module.mask_cost, backend="aot_eager", fullgraph=True)(*arguments, targets))
assert torch.equal(*costs)
assert fastmask.ops._extension.ops.name == "fastmask" != kernel.ops._extension.ops.name
"""
TRITON = """
sys.modules["fastmask"] = None
kernel = get_local_kernel(Path({folder!r}))
targets = kernel.Targets.from_segmentation(torch.randint(0, 5, (1, 16, 16)), 5)
arguments = torch.randn(1, 5, 6), torch.randn(1, 5, 8, 8, requires_grad=True), targets
gradients = []
for backend in ("triton", "reference"):
    assignment = kernel.assign(kernel.mask_cost(*arguments, backend=backend).detach(), targets.counts)
    losses = kernel.mask_loss(*arguments[1:], assignment, backend=backend)
    gradients += torch.autograd.grad(sum(losses), arguments[1])
torch.testing.assert_close(*gradients)
"""


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], tuple[Path, dict]]:
    """Native or not -> the folder of the kernel's source, and its configuration."""
    made = {}
    for native in (True, False):
        folder = tmp_path_factory.mktemp("hub") / ("fastmask-kernels" if native else "fastmask-kernels-triton")
        made[native] = folder, HUB["generate"](folder, f"owner/{folder.name}", native)
    return made.__getitem__


def run(code: str, folder: Path, **environment: str) -> str:
    """What a fresh process prints. It starts elsewhere: in this project's root, ``kernels`` is another module."""
    code = LOAD + code.format(folder=str(folder), ci=str(ROOT / ".ci"))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.slow
def test_kernel_builder_takes_the_source(generated, native):
    folder, config = generated(native)
    parse = "from kernels._rust import Build; print(Build.open({folder!r}).general.backends)"
    assert run(parse, folder) == ("[Backend.CPU, Backend.CUDA]\n" if native else "[Backend.CUDA]\n")
    assert {"build.toml", "flake.nix", "CARD.md", "LICENSE", "torch-ext"} <= {path.name for path in folder.iterdir()}
    on_disk = {str(path.relative_to(folder)) for path in folder.glob("**/*.*") if path.suffix in (".cpp", ".h", ".cu")}
    for backend, left_out in (("cpu", "csrc/cuda/"), ("cuda", "none")):
        tables = [table for table in config.values() if table.get("backend", backend) == backend]
        listed = sorted(name for table in tables for name in table.get("src", []))
        assert listed == sorted(name for name in on_disk if not name.startswith(left_out))


def test_no_module_of_the_kernel_imports_fastmask():
    relative = HUB["with_relative_imports"]
    source = "from fastmask import reference\nif x:\n    from fastmask.ops._checks import (\n        y,\n    )\n"
    assert relative(source, Path("ops/z.py")) == source.replace("fastmask.", "..").replace("fastmask", "..")
    assert relative("from fastmask.ops import x", Path("z.py")) == "from .ops import x"
    with pytest.raises(ValueError, match="got `import fastmask`"):
        relative("import fastmask.ops", Path("z.py"))


@pytest.mark.slow
def test_the_kernel_works_where_it_is_loaded(generated):
    folder, config = generated(True)
    HUB["build"](folder, config, "cpu")
    assert re.search("mask_cost +native", run(CHECKED, folder))
    run(BESIDE_FASTMASK, folder)


@pytest.mark.slow
def test_the_triton_kernels_work_without_the_extension(generated):
    folder, config = generated(False)
    HUB["build"](folder, config, "cpu")
    run(TRITON, folder, TRITON_INTERPRET="1")
