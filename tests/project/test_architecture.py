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
LEAVES = {"extras", "files", "mask_term", "progress", "targets", "version"}
ALLOWED = {
    "reference": set(),
    "extras": set(),
    "files": set(),
    "mask_term": set(),
    "progress": set(),
    "targets": set(),
    "version": set(),
    "kernels": {"targets"},
    "ops": {*LEAVES, "kernels", "reference"},
    "functional": {"ops"},
    "modules": {*LEAVES, "ops", "functional"},
    "data": {*LEAVES},
    "models": {*LEAVES, "ops", "functional", "modules"},
    "integrations": {*LEAVES, "ops", "functional", "modules", "models", "metrics"},
    "metrics": {*LEAVES, "functional", "modules"},
    "training": {*LEAVES, "ops", "functional", "modules", "models", "data", "metrics", "measure", "device"},
    "prediction": {*LEAVES, "models", "data", "device"},
    "export": {*LEAVES, "ops", "functional", "modules", "models"},
    "__main__": {"cli"},
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


BASE = """
import sys

class Blocked:
    def find_spec(self, name, *_):
        extras = "PIL yaml safetensors transformers huggingface_hub typer tqdm matplotlib hotcoco webdataset soundfile"
        if name.partition(".")[0] in extras.split():
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
import torch, fastmask
"""
USE = """
targets = fastmask.Targets.from_list(
    [{"labels": torch.tensor([0, 2]), "masks": torch.rand(2, 16, 16) < 0.5}], num_classes=3
)
class_logits, mask_logits = torch.randn(1, 5, 4, requires_grad=True), torch.randn(1, 5, 8, 8, requires_grad=True)
for points in (None, fastmask.PointSampling()):
    matcher = fastmask.HungarianMatcher(cost_class=1, cost_mask=20, cost_dice=1, points=points)
    weights = {"loss_ce": 1, "loss_mask": 20, "loss_dice": 1}
    criterion = fastmask.SetCriterion(3, matcher, weights, eos_coef=0.1, losses=["labels", "masks"], points=points)
    outputs = {"pred_logits": class_logits, "pred_masks": mask_logits}
    sum(criterion(outputs, targets).values()).backward()
assert mask_logits.grad.abs().sum() > 0
class_logits, mask_logits = class_logits.detach(), mask_logits.detach()
fastmask.semantic_inference(class_logits, mask_logits, (16, 16))
fastmask.panoptic_inference(class_logits, mask_logits, (16, 16))
fastmask.instance_inference(class_logits, mask_logits, (16, 16), output="rle")
q, k, v = (torch.randn(1, n, 32) for n in (5, 16, 16))
fastmask.masked_attention(q, k, v, mask_logits, grid=(4, 4), num_heads=4)
fastmask.deformable_attention(k.view(1, 16, 4, 8), [(4, 4)], torch.rand(1, 5, 4, 1, 2, 2), torch.rand(1, 5, 4, 1, 2))
assert fastmask.linear_sum_assignment(torch.eye(3).numpy())[1].sum() == 3
fastmask.show_config()
"""
MISSING = {
    "import fastmask.data": "data",
    "import fastmask.training": "data",
    "import fastmask.prediction": "data",
    "fastmask.MaskFormer(fastmask.MaskFormerConfig.preset('tiny', 3))": "models",
    "fastmask.Segmenter(fastmask.SegmenterConfig.preset('tiny', 3)).save_pretrained('unwritten')": "models",
    "import fastmask.cli.main": "cli",
    "from fastmask.metrics import InstanceMetrics; InstanceMetrics(3)": "coco",
}


def run_with_base_dependencies(code: str) -> subprocess.CompletedProcess[str]:
    """Runs code where every package that only an extra installs is missing."""
    return subprocess.run([sys.executable, "-c", BASE + code], capture_output=True, text=True)


def test_operators_matcher_and_criterion_need_the_base_dependencies_alone():
    run = run_with_base_dependencies(USE)
    assert run.returncode == 0, run.stderr


def test_errors_name_the_extra_that_is_missing():
    tries = [
        f"try:\n    {code}\nexcept ImportError as error:\n    print(error)\nelse:\n    print({code!r})\n"
        for code in MISSING
    ]
    run = run_with_base_dependencies("".join(tries))
    assert run.returncode == 0, run.stderr
    for line, (code, name) in zip(run.stdout.splitlines(), MISSING.items(), strict=True):
        assert line.endswith(f"; pip install 'fastmask-kernels[{name}]'"), code


def test_the_command_names_the_extra_that_is_missing():
    run = run_with_base_dependencies("from fastmask.__main__ import main\nmain()\n")
    assert run.returncode == 1
    assert run.stderr == "fastmask: No module named 'typer'; pip install 'fastmask-kernels[cli]'\n"


def test_source_that_hides_the_installed_package_says_so():
    """In a clone, Python finds the clone's package before the installed one."""
    code = (
        "import sys\n"
        "sys.meta_path = [finder for finder in sys.meta_path if 'Editable' not in getattr(finder, '__name__', '')]\n"
        "import fastmask\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert run.returncode == 1
    assert "hides the installed fastmask: start Python in another folder, or run pip install" in run.stderr


def test_public_names():
    assert all(hasattr(fastmask, name) for name in fastmask.__all__)
    assert (PACKAGE / "py.typed").exists()
    assert fastmask.__version__.count(".") == 2
