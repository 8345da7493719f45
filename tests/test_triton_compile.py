"""Compiles every Triton kernel for GPUs of three generations, without one: what its launches of real sizes would run.

Launchers run on meta tensors, with the launch itself replaced by a recorder, so that shapes are those of training and
take no memory. The recorded arguments are then compiled as Triton would specialise them.
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
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

LAUNCH_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.uint8: "u8", torch.int16: "i16",
    torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
SHARED_MEMORY = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes that one block may have
REGISTERS = 65_536  # of a multiprocessor

# (L, B, N, K+1, M, h, w, H, W)
TRAINING = (6, 16, 100, 151, 20, 128, 128, 512, 512)
SHAPES = {
    "training": TRAINING,
    "other powers of two": (6, 2, 200, 134, 31, 64, 128, 256, 512),
    "no powers of two": (7, 3, 99, 81, 23, 117, 97, 467, 387),
}
POINTS = 12544


@dataclass(frozen=True)
class Launch:
    kernel: JITFunction
    arguments: dict[str, Any]

    def source(self) -> ASTSource:
        """As Triton's launcher specialises: None, ones and constexpr are constants, multiples of 16 are known to be."""
        signature, constants, attributes = {}, {}, {}
        for i, parameter in enumerate(self.kernel.params):
            value = self.arguments[parameter.name]
            if isinstance(value, torch.Tensor):
                signature[parameter.name] = f"*{TYPES[value.dtype]}"
                attributes[(i,)] = [["tt.divisibility", 16]]
            elif parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
                signature[parameter.name] = "constexpr"
                constants[parameter.name] = value
            elif isinstance(value, float):
                signature[parameter.name] = "fp32"
            else:
                signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if value % 16 == 0:
                    attributes[(i,)] = [["tt.divisibility", 16]]
        return ASTSource(fn=self.kernel, signature=signature, constexprs=constants, attrs=attributes)

    def constants(self) -> tuple[Any, ...]:
        return tuple(self.arguments[parameter.name] for parameter in self.kernel.params if parameter.is_constexpr)

    def options(self) -> dict[str, int]:
        return {name: self.arguments[name] for name in LAUNCH_OPTIONS if name in self.arguments}


def launch_mask_cost(
    shape: tuple[int, ...], dtype: torch.dtype, form: str, ignore_void: bool = True, **options: Any
) -> None:
    from fastmask.kernels.mask_cost import mask_cost

    class_logits, mask_logits, _, *targets = inputs(shape, dtype, form)
    mask_cost(class_logits, mask_logits, *targets, 255, ignore_void, 1.0, 20.0, 1.0, *term(**options))


def launch_mask_loss(
    shape: tuple[int, ...], dtype: torch.dtype, form: str, ignore_void: bool = True, **options: Any
) -> None:
    from fastmask.kernels.mask_loss import mask_loss
    from fastmask.kernels.mask_loss_backward import mask_loss_backward

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
    **_: Any,
) -> None:
    """8 heads on a grid of half the logits' size; queries have masks ("segments"), or keys padding as well.

    Of few images, so that the keys are split; more than 128 queries would come in turns, by a kernel that adds.
    """
    from fastmask.kernels.masked_attention import masked_attention
    from fastmask.kernels.masked_attention_backward import masked_attention_backward

    batch, queries, h, w = min(shape[1], images), min(shape[2], most_queries), shape[5], shape[6]
    grid = (h + 1) // 2, (w + 1) // 2
    q, k, v = (
        torch.empty(batch, n, 8 * head_dim, dtype=dtype, device="meta")
        for n in (queries, grid[0] * grid[1], grid[0] * grid[1])
    )
    mask_logits = torch.empty(batch, queries, h, w, dtype=dtype, device="meta")
    padding = None if form == "segments" else torch.empty(k.shape[:2], dtype=torch.bool, device="meta")
    arguments = (q, k, v, mask_logits, padding, *grid, 8, head_dim**-0.5, 0.0, None)
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

    def launches_of(operator: str, *arguments: Any, **options: Any) -> list[Launch]:
        launches.clear()
        OPERATORS[operator](*arguments, **options)
        return list(launches)

    monkeypatch.setattr(JITFunction, "run", run)
    return launches_of


@dataclass(frozen=True)
class Resources:
    registers: int
    spilled: int  # bytes of the stack
    shared: int  # bytes


def compile_for(launch: Launch, capability: int, folder) -> Resources:
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(launch.source(), target=target, options=launch.options())
    path = folder / f"{launch.kernel.fn.__name__}.cubin"
    path.write_bytes(compiled.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    text = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK"))
    return Resources(registers, stack, compiled.metadata.shared)


def check(launch: Launch, capability: int, folder) -> None:
    resources = compile_for(launch, capability, folder)
    threads = 32 * launch.arguments.get("num_warps", 4)
    assert resources.spilled == 0, resources
    assert resources.shared <= SHARED_MEMORY[capability], resources
    assert resources.registers * threads <= REGISTERS, resources


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_training_sizes_fit_every_generation(operator, capability, record, tmp_path):
    for launch in record(operator, TRAINING, torch.bfloat16, "segments"):
        check(launch, capability, tmp_path)


@pytest.mark.parametrize("head_dim", [16, 32, 64, 128])
@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_attention_heads_fit_every_generation(head_dim, capability, record, tmp_path, monkeypatch):
    """By the configuration of that generation, where it has one of its own."""
    for name in ("masked_attention", "masked_attention_backward"):
        module = importlib.import_module(f"fastmask.kernels.{name}")
        monkeypatch.setattr(module, "pick_config", lambda configs, _: configs.get(capability // 10, configs[None]))
    kinds = {}
    many_queries = (1, 16, 300, 1, 1, *TRAINING[5:])
    for shape, most in ((TRAINING, 128), (many_queries, 300)):
        for launch in record(
            "masked_attention", shape, torch.bfloat16, "segments", head_dim=head_dim, images=16, most_queries=most
        ):
            kinds[launch.kernel, launch.constants()] = launch
    for launch in kinds.values():
        check(launch, capability, tmp_path)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(
    ("dtype", "form", "options"),
    [(torch.float32, "masks", {"mask_term": "bce"}), (torch.float16, "masks", {"gamma": 1.5})],
)
def test_other_forms(operator, dtype, form, options, record, tmp_path):
    for launch in record(operator, SHAPES["no powers of two"], dtype, form, **options):
        check(launch, 90, tmp_path)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 2, 1, 1, 1, 1, 1), (2, 1, 1, 5, 3, 9, 1, 30, 1), (1, 2, 9, 5, 100, 40, 50, 90, 99)]
)
def test_sizes_of_one_and_many_targets(operator, shape, record, tmp_path):
    """Triton makes constants of sizes that are one, as the interpreter does not."""
    for launch in record(operator, shape, torch.float32, "masks"):
        check(launch, 80, tmp_path)


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parent.parent / "kernels").glob("*.py")), ids=lambda path: path.stem
)
def test_constants_are_normal_float32(path):
    """Of other ones Triton makes float64, up to 3.6 without turning results back: slow, or no kernel at all."""
    numbers = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
    limits = torch.finfo(torch.float32)
    wrong = [x for x in numbers if isinstance(x, float) and x != 0 and not limits.tiny <= abs(x) <= limits.max]
    assert wrong == []


@pytest.mark.parametrize("operator", OPERATORS)
def test_sizes_are_no_constants(operator, record):
    """A new image size or number of targets compiles nothing, as long as block shapes stay the same powers of two."""
    kinds = [
        {(launch.kernel, launch.constants(), *launch.options().items()) for launch in launches}
        for launches in (record(operator, shape, torch.bfloat16, "segments") for shape in SHAPES.values())
    ]
    assert kinds[0] == kinds[1] == kinds[2]
