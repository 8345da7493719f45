"""Compiles every Triton kernel for GPUs of all generations, without one: what its launches of real sizes would run.

Launchers run on meta tensors, with the launch itself replaced by a recorder, so that shapes are those of training and
take no memory. The recorded arguments are then specialized by Triton's own code, and compiled.

``make triton-matrix`` runs this file under each version of Triton that is supported.
"""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

# Bytes that one block may have, by compute capability (CUDA C++ programming guide, table 30).
SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
REGISTERS = 65_536  # of a multiprocessor
SPILLED = 32  # bytes of a thread, at most, in forms that are seldom used: benchmarks/NOTES.md lists them

KERNEL_FILES = sorted((Path(__file__).parents[2] / "kernels").glob("*.py"))

# (L, B, N, K+1, M, h, w, H, W)
TRAINING = (6, 16, 100, 151, 20, 128, 128, 512, 512)
NO_POWERS_OF_TWO = (7, 3, 99, 81, 23, 117, 97, 467, 387)
POINTS = 12544


@dataclass(frozen=True)
class Launch:
    kernel: JITFunction
    arguments: dict[str, Any]

    def specialized(self, capability: int) -> Specialized:
        """By what Triton's launcher runs for a GPU."""
        target = GPUTarget("cuda", capability, 32)
        backend = make_backend(target)
        bind = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        bound, specialization, options = bind(**self.arguments)
        parsed, signature, constants, attributes = self.kernel._pack_args(
            backend, dict(options), bound, specialization, options
        )
        return Specialized(
            ASTSource(self.kernel, signature, constants, attributes),
            target,
            parsed.__dict__,
            (self.kernel.fn.__name__, str(specialization), str(sorted(options.items()))),
        )


@dataclass(frozen=True)
class Specialized:
    """``key`` is that by which Triton knows whether it has compiled a kernel before."""

    source: ASTSource
    target: GPUTarget
    options: dict[str, Any]
    key: tuple[str, ...]


def launch_mask_cost(
    shape: tuple[int, ...], dtype: torch.dtype, form: str, ignore_void: bool = True, **options: Any
) -> None:
    from fastmask.kernels.mask_cost import mask_cost

    class_logits, mask_logits, _, *targets = inputs(shape, dtype, form)
    mask_cost(class_logits, mask_logits, *targets, 255, ignore_void, 1.0, 20.0, 1.0, *term(**options))


def launch_mask_loss(
    shape: tuple[int, ...], dtype: torch.dtype, form: str, ignore_void: bool = True, **options: Any
) -> None:
    from fastmask.kernels.mask_loss import mask_loss, mask_loss_backward

    _, mask_logits, assignment, *targets = inputs(shape, dtype, form)
    arguments = (mask_logits, assignment, *targets, 255, ignore_void, *term(**options))
    pair_mask, pair_dice, sums = mask_loss(*arguments)
    mask_loss_backward(pair_mask, pair_dice, sums, *arguments)


def launch_point_mask_cost(
    shape: tuple[int, ...], dtype: torch.dtype, form: str, ignore_void: bool = True, **options: Any
) -> None:
    from fastmask.kernels.point_mask_cost import point_mask_cost

    class_logits, mask_logits, _, *targets = inputs(shape, dtype, form)
    points = torch.empty((shape[1], POINTS, 2), device="meta")
    point_mask_cost(class_logits, mask_logits, *targets, 255, ignore_void, points, 2.0, 5.0, 5.0, *term(**options))


def launch_point_mask_loss(
    shape: tuple[int, ...], dtype: torch.dtype, form: str, ignore_void: bool = True, **options: Any
) -> None:
    from fastmask.kernels.point_mask_loss import point_mask_loss, point_mask_loss_backward

    _, mask_logits, assignment, *targets = inputs(shape, dtype, form)
    points = torch.empty((*assignment.shape, POINTS, 2), device="meta")
    arguments = (mask_logits, assignment, *targets, 255, ignore_void, points, *term(**options))
    pair_mask, pair_dice, sums = point_mask_loss(*arguments)
    point_mask_loss_backward(pair_mask, pair_dice, sums, *arguments)


def launch_uncertain_points(shape: tuple[int, ...], dtype: torch.dtype, form: str, **_: Any) -> None:
    from fastmask.kernels.uncertain_points import uncertain_points

    _, mask_logits, assignment, *_ = inputs(shape, dtype, form)
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    uncertain_points(mask_logits, assignment, seed, POINTS, 3 * POINTS, 3 * POINTS // 4)


def launch_masked_attention(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    form: str,
    ignore_void: bool = True,
    head_dim: int = 32,
    images: int = 3,
    most_queries: int = 128,
    dropout_p: float = 0.0,
    **_: Any,
) -> None:
    """8 heads on a grid of half the logits' size; queries have masks ("segments"), or keys padding as well.

    Of few images, so that the keys are split; more than 128 queries would come in turns, by a kernel that adds.
    """
    from fastmask.kernels.masked_attention import masked_attention, masked_attention_backward

    batch, queries, h, w = min(shape[1], images), min(shape[2], most_queries), shape[5], shape[6]
    grid = (h + 1) // 2, (w + 1) // 2
    q, k, v = (
        torch.empty(batch, n, 8 * head_dim, dtype=dtype, device="meta")
        for n in (queries, grid[0] * grid[1], grid[0] * grid[1])
    )
    mask_logits = torch.empty(batch, queries, h, w, dtype=dtype, device="meta")
    padding = None if form == "segments" else torch.empty(k.shape[:2], dtype=torch.bool, device="meta")
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    arguments = (q, k, v, mask_logits, padding, *grid, 8, head_dim**-0.5, dropout_p, seed)
    out, logsumexp = masked_attention(*arguments)
    masked_attention_backward(out, out, logsumexp, *arguments)


def term(mask_term: str = "focal", alpha: float = 0.25, gamma: float = 2.0) -> tuple[str, float, float]:
    return mask_term, alpha, gamma


def inputs(shape: tuple[int, ...], dtype: torch.dtype, form: str) -> tuple[torch.Tensor | None, ...]:
    """class_logits, mask_logits, assignment, labels, masks, segments, valid."""
    layers, batch, queries, classes, targets, h, w, height, width = shape

    def empty(*size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    segments = form == "segments"
    return (
        empty(layers, batch, queries, classes, dtype=dtype),
        empty(layers, batch, queries, h, w, dtype=dtype),
        empty(layers, batch, targets, dtype=torch.int64),
        empty(batch, targets, dtype=torch.int64),
        None if segments else empty(batch, targets, height, width, dtype=torch.uint8),
        empty(batch, height, width, dtype=torch.uint8) if segments else None,
        None if segments else empty(batch, height, width, dtype=torch.bool),
    )


def launch_semantic(shape: tuple[int, ...], dtype: torch.dtype, form: str, **_: Any) -> None:
    """ "segments" for labels, "masks" for scores by the other order, in two steps."""
    from fastmask.kernels.semantic import semantic_inference

    # How many classes there are is for a model to say, and part of what is compiled for it.
    classes = shape[3] - 1 if shape[3] < 64 else TRAINING[3] - 1
    mask_logits, geometry = inference_inputs(shape, dtype, form)
    probabilities = torch.empty(*mask_logits.shape[:2], classes, device="meta")
    order, output = ("masks", "labels") if form == "segments" else ("scores", "scores")
    semantic_inference(probabilities, mask_logits, order, output, False, *geometry)


def launch_panoptic(shape: tuple[int, ...], dtype: torch.dtype, form: str, **_: Any) -> None:
    from fastmask.kernels.panoptic import panoptic_winners

    mask_logits, geometry = inference_inputs(shape, dtype, form)
    scores = torch.empty(mask_logits.shape[:2], device="meta")
    panoptic_winners(scores, mask_logits, form == "masks", form == "masks", 0.5, *geometry)


def launch_instance(shape: tuple[int, ...], dtype: torch.dtype, form: str, **_: Any) -> None:
    from fastmask.kernels.instance import instance_masks

    mask_logits, geometry = inference_inputs(shape, dtype, form)
    queries = torch.empty(mask_logits.shape[:2], dtype=torch.int64, device="meta")
    instance_masks(mask_logits, queries, form == "masks", *geometry)


def inference_inputs(shape: tuple[int, ...], dtype: torch.dtype, form: str) -> tuple[torch.Tensor, tuple[Any, ...]]:
    """Mask logits (B, N, h, w) and how they become H x W pixels: in one step, or in two for "masks"."""
    _, batch, queries, _, _, h, w, height, width = shape
    steps = (None, None) if form == "segments" else ([2 * h, 2 * w], [2 * h, 2 * w - 1])
    geometry = ([h, w], *steps, [height, width], 0, 0, height)
    return torch.empty(batch, queries, h, w, dtype=dtype, device="meta"), geometry


OPERATORS: dict[str, Callable[..., None]] = {
    "mask_cost": launch_mask_cost,
    "mask_loss": launch_mask_loss,
    "semantic_inference": launch_semantic,
    "panoptic_inference": launch_panoptic,
    "instance_inference": launch_instance,
    "point_mask_cost": launch_point_mask_cost,
    "point_mask_loss": launch_point_mask_loss,
    "uncertain_points": launch_uncertain_points,
    "masked_attention": launch_masked_attention,
}


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Launch]]:
    launches: list[Launch] = []

    def run(self: JITFunction, *, grid: tuple[int, ...], warmup: bool, **arguments: Any) -> None:
        assert all(0 < size < 2 ** (31 if i == 0 else 16) for i, size in enumerate(grid)), grid
        launches.append(Launch(self, arguments))

    def launches_of(operator: str, *arguments: Any, capability: int = 90, **options: Any) -> list[Launch]:
        """By the configurations for a capability."""
        launches.clear()
        common = importlib.import_module("fastmask.kernels._common")
        monkeypatch.setattr(common, "generation", lambda _: capability // 10)
        OPERATORS[operator](*arguments, **options)
        return list(launches)

    monkeypatch.setattr(JITFunction, "run", run)
    return launches_of


@dataclass(frozen=True)
class Resources:
    registers: int
    spilled: int  # bytes of the stack
    shared: int  # bytes


def compile_for(launch: Launch, capability: int) -> CompiledKernel:
    specialized = launch.specialized(capability)
    return triton.compile(specialized.source, target=specialized.target, options=specialized.options)


def assembly(launch: Launch, capability: int) -> str:
    return compile_for(launch, capability).asm["ptx"]


def resources_of(launch: Launch, capability: int, folder: Path) -> Resources:
    compiled = compile_for(launch, capability)
    path = folder / f"{launch.kernel.fn.__name__}.cubin"
    path.write_bytes(compiled.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    text = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK"))
    return Resources(registers, stack, compiled.metadata.shared)


def check(launches: list[Launch], capability: int, folder: Path, spilled: int = 0) -> None:
    """Compiles each form of the launches once, and says of all what does not fit."""
    wrong = {}
    for key, launch in {launch.specialized(capability).key: launch for launch in launches}.items():
        resources = resources_of(launch, capability, folder)
        fits = resources.shared <= SHARED_MEMORY[capability]
        fits &= resources.registers * 32 * launch.arguments.get("num_warps", 4) <= REGISTERS
        if resources.spilled > spilled or not fits:
            wrong[key] = resources
    assert wrong == {}


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_training_sizes_fit_every_generation(operator, capability, record, tmp_path):
    check(record(operator, TRAINING, torch.bfloat16, "segments", capability=capability), capability, tmp_path)


# Configurations are chosen by generation; the widest heads need the most of what GPUs of the general one differ in.
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize(
    ("capability", "head_dim"),
    [*((c, d) for c in (80, 90, 100) for d in (16, 32, 64, 128)), (86, 128), (89, 128), (120, 128)],
)
def test_attention_heads_fit_every_generation(capability, head_dim, dropout_p, record, tmp_path):
    """More queries than a block holds come in turns, with a kernel for the later ones."""
    launches = []
    for queries in (100, 300) if dropout_p == 0.0 else (100,):
        launches += record(
            "masked_attention", (1, 16, queries, 1, 1, *TRAINING[5:]), torch.bfloat16, "segments",
            capability=capability, head_dim=head_dim, images=16, most_queries=queries, dropout_p=dropout_p,
        )  # fmt: skip
    check(launches, capability, tmp_path)


@pytest.mark.parametrize(
    ("capability", "head_dim"), [(80, 16), (80, 128), (90, 32), (90, 64), (120, 16), (120, 32), (120, 128)]
)
def test_attention_in_float32_fits_every_generation(capability, head_dim, record, tmp_path):
    launches = record(
        "masked_attention", (1, 16, 100, 1, 1, *TRAINING[5:]), torch.float32, "segments",
        capability=capability, head_dim=head_dim, images=16, dropout_p=0.1,
    )  # fmt: skip
    check(launches, capability, tmp_path, SPILLED)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(
    ("dtype", "form", "options"),
    [(torch.float32, "masks", {"mask_term": "bce"}), (torch.float16, "masks", {"gamma": 1.5})],
)
def test_other_forms(operator, dtype, form, options, record, tmp_path):
    check(record(operator, NO_POWERS_OF_TWO, dtype, form, **options), 90, tmp_path, SPILLED)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 2, 1, 1, 1, 1, 1), (1, 2, 9, 5, 100, 40, 50, 90, 99)])
def test_sizes_of_one_and_many_targets(operator, shape, record, tmp_path):
    check(record(operator, shape, torch.float32, "masks", capability=80), 80, tmp_path, SPILLED)


def test_targets_of_ten_times_the_logits_size(record, tmp_path):
    """A cell's outputs come in more than one chunk."""
    launches = record("mask_loss", (6, 16, 100, 151, 20, 100, 100, 1000, 1000), torch.bfloat16, "segments")
    check(launches, 90, tmp_path, SPILLED)


@pytest.mark.parametrize("capability", [90, 100])
@pytest.mark.parametrize(
    ("operator", "shape", "dtype", "form"),
    [
        ("mask_cost", (6, 2, 100, 20, 19, 128, 256, 512, 1024), torch.float32, "segments"),  # Cityscapes
        ("mask_cost", (6, 2, 100, 9, 7, 128, 128, 512, 512), torch.float32, "masks"),
        ("point_mask_cost", NO_POWERS_OF_TWO, torch.float32, "masks"),
        ("point_mask_loss", TRAINING, torch.bfloat16, "segments"),
        ("semantic_inference", TRAINING, torch.bfloat16, "segments"),
        ("semantic_inference", TRAINING, torch.float32, "masks"),
        ("masked_attention", NO_POWERS_OF_TWO, torch.float32, "masks"),
    ],
)
def test_forms_that_broke(operator, shape, dtype, form, capability, record, tmp_path):
    """Under one version of Triton or another."""
    check(record(operator, shape, dtype, form, capability=capability), capability, tmp_path, SPILLED)


@pytest.mark.parametrize("path", KERNEL_FILES, ids=lambda path: path.stem)
def test_constants_are_normal_float32(path):
    """Of other ones Triton makes float64, up to 3.6 without turning results back: slow, or no kernel at all."""
    numbers = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
    limits = torch.finfo(torch.float32)
    wrong = [x for x in numbers if isinstance(x, float) and x != 0 and not limits.tiny <= abs(x) <= limits.max]
    assert wrong == []


@pytest.mark.parametrize(
    ("operator", "kernels"),
    [
        ("mask_cost", {"_mask_cost_fwd_kernel"}),
        ("semantic_inference", {"_nan_count_kernel", "_stage_kernel", "_semantic_fwd_kernel"}),
        ("point_mask_loss", {"_point_mask_loss_grad_kernel"}),
        ("masked_attention", {"_masked_attention_fwd_kernel", "_masked_attention_bwd_kernel"}),
    ],
)
def test_16_bytes_are_read_at_a_time(operator, kernels, record):
    """No size is known to the compiler, but that planes and rows are aligned is."""
    for launch in record(operator, TRAINING, torch.bfloat16, "segments", capability=80):
        if launch.kernel.fn.__name__ in kernels:
            assert re.search(r"ld\.global\.(v4\.b32|v2\.b64)|cp\.async\.cg.*, 0x10", assembly(launch, 80)), (
                launch.kernel
            )


@pytest.mark.parametrize("width", [512, 511])
def test_masks_are_stored_8_bytes_at_a_time(width, record):
    *_, main, _ = record("instance_inference", (*TRAINING[:8], width), torch.bfloat16, "segments")
    assert re.search(r"st\.global\.(v2\.b32|b64|v8\.b8|v4\.b16)", assembly(main, 90))


def keys(launches: list[Launch]) -> set[tuple[str, ...]]:
    return {launch.specialized(90).key for launch in launches}


def test_image_sizes_compile_few_kernels(record):
    """What depends on the size are the width of instances' blocks and whether logits can be read 16 bytes at a time."""
    sizes = torch.randint(200, 641, (300, 2), generator=torch.Generator().manual_seed(0)).tolist()
    found = set()
    for height, width in sizes:
        shape = (1, 1, 100, 134, 1, -(-height // 4), -(-width // 4), height, width)
        for operator in ("semantic_inference", "panoptic_inference", "instance_inference"):
            found |= keys(record(operator, shape, torch.bfloat16, "segments"))
    assert len(found) <= 12, sorted(name for name, *_ in found)


@pytest.mark.parametrize(
    "operator", ["mask_cost", "mask_loss", "point_mask_cost", "point_mask_loss", "uncertain_points"]
)
@pytest.mark.parametrize("form", ["segments", "masks"])
def test_numbers_of_targets_compile_a_kernel_for_each_block(operator, form, record):
    found, blocks = set(), set()
    for targets in range(1, 61):
        launches = record(operator, (*TRAINING[:4], targets, *TRAINING[5:]), torch.bfloat16, form)
        found |= keys(launches)
        blocks |= {(launch.kernel.fn.__name__, launch.arguments.get("BLOCK_M")) for launch in launches}
    assert len(found) == len(blocks)
    assert all(block in (None, 16, 32, 64) for _, block in blocks)


@pytest.mark.parametrize("operator", OPERATORS)
def test_sizes_are_no_constants(operator, record):
    """A new image size or number of images compiles nothing, as long as block shapes stay the same powers of two, and
    logits can be read 16 bytes at a time."""
    other = (6, 1, 200, 134, 31, 64, 120, 256, 480)
    kinds = [keys(record(operator, shape, torch.bfloat16, "segments")) for shape in (TRAINING, other)]
    assert kinds[0] == kinds[1]
