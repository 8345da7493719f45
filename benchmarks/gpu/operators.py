"""Runs every operator once on small inputs, forward and backward, for the memory checker and for tests of streams,
graphs and host syncs.

``python -m benchmarks.gpu.operators --device cuda NAME ...`` runs the named ones, by default all; one line for each.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmask import (
    MaskTerm,
    Targets,
    assign,
    class_loss,
    deformable_attention,
    general_inference,
    mask_cost,
    mask_loss,
    masked_attention,
    semantic_inference,
)
from fastmask.functional import matched_mask_logits
from fastmask.ops._geometry import Geometry

LAYERS, IMAGES, QUERIES, CLASSES, TARGETS, CHANNELS, POINTS = 2, 2, 21, 5, 6, 16, 150
GRID, SIZE = (20, 30), (75, 101)  # not powers of two, so that the last blocks are partly filled
VOID = 255
Results = tuple[Tensor, ...]


@dataclass(frozen=True)
class Call:
    """One call of an operator.

    Args:
        inputs: tensors on the device; those that need a gradient require it.
        run: computes the results from the inputs, without reading any value on the host.
    """

    inputs: tuple[Tensor, ...]
    run: Callable[..., Results]

    def __call__(self) -> Results:
        return self.run(*self.inputs)


class Draw:
    """Random inputs of the sizes above, the same on every device.

    Args:
        exact: make floating-point inputs float64, with values rounded to ``dtype``, for the reference.
    """

    def __init__(self, device: torch.device | str, dtype: torch.dtype, seed: int, exact: bool = False) -> None:
        self.device, self.dtype, self.exact = device, dtype, exact
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 3.0, grad: bool = False) -> Tensor:
        values = torch.randn(shape, generator=self.generator) * scale
        values = values.to(self.device, self.dtype)
        return (values.double() if self.exact else values).requires_grad_(grad)

    def class_logits(self, *leading: int, grad: bool = False) -> Tensor:
        return self.normal(*leading, IMAGES, QUERIES, CLASSES + 1, grad=grad)

    def mask_logits(self, *leading: int, grad: bool = False) -> Tensor:
        return self.normal(*leading, IMAGES, QUERIES, *GRID, grad=grad)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator).to(self.device, dtype)

    def targets(self, form: str) -> tuple[Tensor, ...]:
        """labels, counts, and segments or masks and valid; the last image has fewer targets."""
        labels = self.integers(0, CLASSES, IMAGES, TARGETS)
        labels[-1, TARGETS // 2 :] = -1
        counts = (labels >= 0).sum(1)
        if form == "segments":
            segments = self.integers(0, TARGETS + 1, IMAGES, *SIZE, dtype=torch.uint8)
            return labels, counts, segments.masked_fill(segments == TARGETS, VOID)
        masks = self.integers(0, 2, IMAGES, TARGETS, *SIZE, dtype=torch.uint8)
        return labels, counts, masks, self.integers(0, 4, IMAGES, *SIZE) > 0

    def assignment(self) -> Tensor:
        """``(L, B, M)``: a different query for each target that is not padding."""
        orders = torch.rand(LAYERS, IMAGES, QUERIES, generator=self.generator).argsort(-1)[..., :TARGETS]
        orders[:, -1, TARGETS // 2 :] = -1
        return orders.to(self.device)

    def points(self, *leading: int) -> Tensor:
        return torch.rand(*leading, POINTS, 2, generator=self.generator).to(self.device)


def as_targets(labels: Tensor, counts: Tensor, *planes: Tensor) -> Targets:
    if len(planes) == 1:
        return Targets(labels, counts, segments=planes[0], void=VOID)
    return Targets(labels, counts, masks=planes[0], valid=planes[1])


def with_gradients(outputs: Results, *leaves: Tensor) -> Results:
    """``outputs``, and the gradients of a sum of their elements with weights that all differ."""
    weights = [torch.linspace(0.5, 1.5, x.numel(), device=x.device).view_as(x) for x in outputs]
    total = sum((x * weight).sum() for x, weight in zip(outputs, weights, strict=True))
    return *(output.detach() for output in outputs), *torch.autograd.grad(total, leaves)


def make_mask_cost(draw: Draw, form: str) -> Call:
    def run(class_logits: Tensor, mask_logits: Tensor, *targets: Tensor) -> Results:
        weights = {"cost_class": 1.0, "cost_mask": 20.0, "cost_dice": 1.0}
        return (mask_cost(class_logits, mask_logits, as_targets(*targets), term=MaskTerm(ignore_void=True), **weights),)

    return Call((draw.class_logits(LAYERS), draw.mask_logits(LAYERS), *draw.targets(form)), run)


def make_assign(draw: Draw) -> Call:
    def run(cost: Tensor, counts: Tensor) -> Results:
        return (assign(cost, counts),)

    counts = torch.tensor([TARGETS, TARGETS // 2]).to(draw.device)
    return Call((draw.normal(LAYERS, IMAGES, QUERIES, TARGETS), counts), run)


def make_mask_loss(draw: Draw, form: str) -> Call:
    def run(mask_logits: Tensor, assignment: Tensor, *targets: Tensor) -> Results:
        losses = mask_loss(
            mask_logits, as_targets(*targets), assignment, reduction="none", term=MaskTerm(ignore_void=True)
        )
        return with_gradients(losses, mask_logits)

    return Call((draw.mask_logits(LAYERS, grad=True), draw.assignment(), *draw.targets(form)), run)


def make_class_loss(draw: Draw) -> Call:
    def run(class_logits: Tensor, assignment: Tensor, *targets: Tensor) -> Results:
        return with_gradients((class_loss(class_logits, as_targets(*targets), assignment),), class_logits)

    return Call((draw.class_logits(LAYERS, grad=True), draw.assignment(), *draw.targets("segments")), run)


def make_embeddings(draw: Draw) -> Call:
    def run(mask_embed: Tensor, pixel_embed: Tensor, assignment: Tensor, *targets: Tensor) -> Results:
        logits, rows = matched_mask_logits(mask_embed, pixel_embed, as_targets(*targets), assignment)
        return *with_gradients((logits,), mask_embed, pixel_embed), rows

    mask_embed = draw.normal(LAYERS, IMAGES, QUERIES, CHANNELS, grad=True)
    pixel_embed = draw.normal(IMAGES, CHANNELS, *GRID, grad=True)
    return Call((mask_embed, pixel_embed, draw.assignment(), *draw.targets("segments")), run)


def make_point_mask_cost(draw: Draw, form: str) -> Call:
    def run(class_logits: Tensor, mask_logits: Tensor, points: Tensor, *targets: Tensor) -> Results:
        return (
            mask_cost(class_logits, mask_logits, as_targets(*targets), points, term=MaskTerm("bce", ignore_void=True)),
        )

    return Call((draw.class_logits(LAYERS), draw.mask_logits(LAYERS), draw.points(IMAGES), *draw.targets(form)), run)


def make_point_mask_loss(draw: Draw, form: str) -> Call:
    def run(mask_logits: Tensor, assignment: Tensor, points: Tensor, *targets: Tensor) -> Results:
        losses = mask_loss(
            mask_logits, as_targets(*targets), assignment, points, term=MaskTerm("bce"), reduction="none"
        )
        return with_gradients(losses, mask_logits)

    points = draw.points(LAYERS, IMAGES, TARGETS)
    return Call((draw.mask_logits(LAYERS, grad=True), draw.assignment(), points, *draw.targets(form)), run)


def make_uncertain_points(draw: Draw) -> Call:
    """Calls the operator, which takes the seed as a tensor; the public function draws a new seed in each call."""

    def run(mask_logits: Tensor, assignment: Tensor, seed: Tensor) -> Results:
        return (torch.ops.fastmask.uncertain_points(mask_logits, assignment, seed, POINTS, 3 * POINTS, POINTS // 2),)

    return Call((draw.mask_logits(LAYERS), draw.assignment(), draw.integers(0, 2**40, 1)), run)


def make_masked_attention(draw: Draw) -> Call:
    heads, width, grid = 2, 32, (11, 14)
    keys = grid[0] * grid[1]

    def run(q: Tensor, k: Tensor, v: Tensor, mask_logits: Tensor, padding: Tensor) -> Results:
        out = masked_attention(q, k, v, mask_logits, grid=grid, num_heads=heads, key_padding_mask=padding)
        return with_gradients((out,), q, k, v)

    q, k, v = (draw.normal(IMAGES, n, heads * width, scale=1.0, grad=True) for n in (QUERIES, keys, keys))
    padding = torch.zeros(IMAGES, keys, dtype=torch.bool)
    padding[-1, keys // 2 :] = True
    return Call((q, k, v, draw.mask_logits(), padding.to(draw.device)), run)


def make_deformable_attention(draw: Draw) -> Call:
    heads, width, levels, points = 2, 32, ((11, 14), (6, 7)), 4

    def run(value: Tensor, locations: Tensor, weights: Tensor) -> Results:
        return with_gradients((deformable_attention(value, levels, locations, weights),), value, locations, weights)

    value = draw.normal(IMAGES, 11 * 14 + 6 * 7, heads, width, scale=1.0, grad=True)
    weights = draw.normal(IMAGES, QUERIES, heads, len(levels), points, scale=1.0, grad=True)
    return Call((value, draw.normal(*weights.shape, 2, scale=0.5, grad=True), weights), run)


def make_semantic(draw: Draw, order: str) -> Call:
    def run(class_logits: Tensor, mask_logits: Tensor) -> Results:
        details = semantic_inference(class_logits, mask_logits, SIZE, order=order, details=True)
        return *details, semantic_inference(class_logits, mask_logits, SIZE, order=order, output="scores")

    return Call((draw.class_logits(), draw.mask_logits()), run)


def make_embedded_semantic(draw: Draw) -> Call:
    def run(class_logits: Tensor, mask_embed: Tensor, pixel_embed: Tensor) -> Results:
        return (semantic_inference(class_logits, (mask_embed, pixel_embed), SIZE),)

    mask_embed = draw.normal(IMAGES, QUERIES, CHANNELS, scale=1.0)
    return Call((draw.class_logits(), mask_embed, draw.normal(IMAGES, CHANNELS, *GRID, scale=1.0)), run)


def make_general(draw: Draw) -> Call:
    def run(class_logits: Tensor, mask_logits: Tensor) -> Results:
        return (general_inference(class_logits, mask_logits, SIZE),)

    return Call((draw.class_logits(), draw.mask_logits()), run)


def make_panoptic(draw: Draw) -> Call:
    """The part that runs on the device, before segments are listed on the host."""
    geometry = Geometry(GRID, (80, 120), SIZE, (61, 90)).arguments()

    def run(scores: Tensor, mask_logits: Tensor) -> Results:
        return torch.ops.fastmask.panoptic_winners(scores, mask_logits, False, True, 0.5, *geometry)

    scores = torch.rand(IMAGES, QUERIES, generator=draw.generator)
    scores[:, ::4] = 0  # dropped queries
    return Call((scores.to(draw.device), draw.mask_logits()), run)


def make_instance(draw: Draw, packed: bool) -> Call:
    """The part that runs on the device, before run lengths are made on the host."""
    geometry = Geometry(GRID, None, None, SIZE).arguments()

    def run(mask_logits: Tensor, queries: Tensor) -> Results:
        return torch.ops.fastmask.instance_masks(mask_logits, queries, packed, *geometry)

    return Call((draw.mask_logits(), draw.integers(0, QUERIES, IMAGES, 9)), run)


BELOW_PUBLIC = ("uncertain_points", "panoptic", "instance", "instance, packed")
MAKERS: dict[str, Callable[[Draw], Call]] = {
    "mask_cost": lambda draw: make_mask_cost(draw, "segments"),
    "mask_cost, masks": lambda draw: make_mask_cost(draw, "masks"),
    "assign": make_assign,
    "mask_loss": lambda draw: make_mask_loss(draw, "segments"),
    "mask_loss, masks": lambda draw: make_mask_loss(draw, "masks"),
    "class_loss": make_class_loss,
    "embeddings": make_embeddings,
    "point_mask_cost": lambda draw: make_point_mask_cost(draw, "segments"),
    "point_mask_cost, masks": lambda draw: make_point_mask_cost(draw, "masks"),
    "point_mask_loss": lambda draw: make_point_mask_loss(draw, "segments"),
    "point_mask_loss, masks": lambda draw: make_point_mask_loss(draw, "masks"),
    "uncertain_points": make_uncertain_points,
    "masked_attention": make_masked_attention,
    "deformable_attention": make_deformable_attention,
    "semantic": lambda draw: make_semantic(draw, "masks"),
    "semantic, scores resized": lambda draw: make_semantic(draw, "scores"),
    "semantic, embeddings": make_embedded_semantic,
    "general": make_general,
    "panoptic": make_panoptic,
    "instance": lambda draw: make_instance(draw, False),
    "instance, packed": lambda draw: make_instance(draw, True),
}


def make_call(name: str, device: torch.device | str, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Call:
    """A call of one of ``MAKERS`` on random inputs."""
    return MAKERS[name](Draw(device, dtype, seed))


def expected_results(name: str, dtype: torch.dtype) -> Results:
    """The results of ``make_call(name, ..., dtype)`` by the reference: in float64, public functions use no kernel.
    Operators that are called directly, or that have a float64 kernel, run on the CPU."""
    exact = name not in BELOW_PUBLIC
    return MAKERS[name](Draw("cpu", dtype, 0, exact))()


def main() -> int:
    parser = argparse.ArgumentParser(description="Run every operator once on small inputs.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="operators; all by default")
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in MAKERS]:
        parser.error(f"no operator {', '.join(unknown)}; there are {', '.join(MAKERS)}")
    ran = [attempt(name, options.device, getattr(torch, options.dtype)) for name in options.names or MAKERS]
    return 0 if all(ran) else 1


def attempt(name: str, device: str, dtype: torch.dtype) -> bool:
    """Whether an operator ran; after an error, the others still run."""
    try:
        make_call(name, device, dtype)()
        if device == "cuda":
            torch.cuda.synchronize()
    except Exception as error:
        traceback.print_exc()
        print(f"FAILED {name}: {type(error).__name__}: {' '.join(str(error).splitlines()[:1])}", flush=True)
        return False
    print(f"ok {name}", flush=True)
    return True


if __name__ == "__main__":
    sys.exit(main())
