"""Compiles the Triton kernels that launches of real sizes would run, for GPUs of all generations, without one.

Launchers run on meta tensors, with the launch itself replaced by a recorder, so that shapes are those of training and
take no memory. The recorded arguments are then specialized by Triton's own code, and compiled. All of it runs in a
process that does not interpret kernels.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

# Bytes that one block may have, by compute capability (CUDA C++ programming guide, table 30).
SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
REGISTERS = 65_536  # of a multiprocessor

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
    mask_loss_backward(*mask_loss(*arguments, False), *arguments)  # also computes slopes


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
    point_mask_loss_backward(*point_mask_loss(*arguments, False), *arguments)


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
    """8 heads on a grid of half the logits' size, and of their own; queries have masks ("segments"), or keys padding as
    well.

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
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    arguments = (q, k, v, mask_logits, padding, *grid, 8, head_dim**-0.5, dropout_p, seed)
    out, logsumexp = masked_attention(*arguments)
    masked_attention_backward(out, out, logsumexp, *arguments)
    masked_attention(q, k, v, mask_logits.new_empty(batch, queries, *grid), *arguments[4:])


def launch_deformable_attention(
    shape: tuple[int, ...], dtype: torch.dtype, form: str, head_dim: int = 32, **_: Any
) -> None:
    """Three levels ("segments"), or one, of which every pixel is a query with 8 heads and 4 points per level."""
    from fastmask.kernels.deformable_attention import deformable_attention
    from fastmask.kernels.deformable_attention_backward import deformable_attention_backward

    scales = (2, 4, 8) if form == "segments" else (2,)
    levels = [((shape[5] + scale - 1) // scale, (shape[6] + scale - 1) // scale) for scale in scales]
    pixels = sum(height * width for height, width in levels)
    value = torch.empty(shape[1], pixels, 8, head_dim, dtype=dtype, device="meta")
    weights = torch.empty(shape[1], pixels, 8, len(levels), 4, device="meta")
    arguments = (value, torch.empty(*weights.shape, 2, device="meta"), weights, [x for size in levels for x in size])
    deformable_attention_backward(deformable_attention(*arguments), *arguments)


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
    "deformable_attention": launch_deformable_attention,
}


@dataclass(frozen=True)
class Call:
    """A launcher, by its operator, and what it is called with."""

    operator: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    form: str
    options: dict[str, Any]

    def launches(self, capability: int) -> list[Launch]:
        """By the configurations for a capability."""
        recorded: list[Launch] = []

        def run(kernel: JITFunction, *, grid: tuple[int, ...], warmup: bool, **arguments: Any) -> None:
            assert all(0 < size < 2 ** (31 if i == 0 else 16) for i, size in enumerate(grid)), grid
            recorded.append(Launch(kernel, arguments))

        common = importlib.import_module("fastmask.kernels._common")
        with (
            mock.patch.object(common, "generation", return_value=capability // 10),
            mock.patch.object(JITFunction, "run", run),
        ):
            OPERATORS[self.operator](self.shape, self.dtype, self.form, **self.options)
        return recorded


def call(operator: str, shape: tuple[int, ...], dtype: torch.dtype, form: str, **options: Any) -> Call:
    return Call(operator, shape, dtype, form, options)


@dataclass(frozen=True)
class Resources:
    registers: int
    spilled: int  # bytes of the stack
    shared: int  # bytes, with those that the kernel itself declares
    declared: int


def compile_for(launch: Launch, capability: int) -> CompiledKernel:
    specialized = launch.specialized(capability)
    return triton.compile(specialized.source, target=specialized.target, options=specialized.options)


def resources_of(launch: Launch, capability: int) -> Resources:
    compiled = compile_for(launch, capability)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        Path(cubin.name).write_bytes(compiled.asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        run = subprocess.run([tool, "-res-usage", cubin.name], capture_output=True, text=True, check=True)
    registers, stack = (int(re.search(rf"{name}:(\d+)", run.stdout)[1]) for name in ("REG", "STACK"))
    declared = sum(map(int, re.findall(r"\.shared .* \w+\[(\d+)\];", compiled.asm["ptx"])))
    return Resources(registers, stack, compiled.metadata.shared + declared, declared)


def misfits(calls: Iterable[Call], capability: int, spilled: int = 0) -> dict[tuple[str, ...], Resources]:
    """Compiles each form of the launches once; returns what does not fit, or spills more bytes a thread."""
    wrong = {}
    launches = [launch for call in calls for launch in call.launches(capability)]
    for key, launch in {launch.specialized(capability).key: launch for launch in launches}.items():
        resources = resources_of(launch, capability)
        # Triton asks the driver for more than a kernel may have by default only if what it allocates itself is more.
        fits = resources.shared <= (SHARED_MEMORY[capability] if resources.declared == 0 else 48 * 1024)
        fits &= resources.registers * 32 * launch.arguments.get("num_warps", 4) <= REGISTERS
        if resources.spilled > spilled or not fits:
            wrong[key] = resources
    return wrong


def assembly(call: Call, capability: int) -> list[tuple[str, str]]:
    """Names of the kernels that a call launches, and their PTX."""
    return [
        (launch.kernel.fn.__name__, compile_for(launch, capability).asm["ptx"]) for launch in call.launches(capability)
    ]


def kernels_of(calls: Iterable[Call]) -> tuple[set[tuple[str, ...]], set[tuple[tuple[str, bool], int | None]]]:
    """What would be compiled for all of the calls: Triton's keys; kernels, which may keep slopes or not, with the size
    of their blocks of targets."""
    launches = [launch for call in calls for launch in call.launches(90)]
    kernels = [(launch.kernel.fn.__name__, launch.arguments.get("KEEP_SLOPES", False)) for launch in launches]
    blocks = set(zip(kernels, (launch.arguments.get("BLOCK_M") for launch in launches), strict=True))
    return {launch.specialized(90).key for launch in launches}, blocks
