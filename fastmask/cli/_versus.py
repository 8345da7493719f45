"""The demo's closing table: one training step of the criterion with fastmask and with the PyTorch reference."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from fastmask.measure import peak_memory
from fastmask.models import MaskFormer
from fastmask.targets import Targets

BACKENDS = {"fastmask": "auto", "PyTorch reference": "reference"}
ROUNDS = 15


def compare_criteria(model: MaskFormer, images: Tensor, targets: Targets) -> str:
    """Matching, losses and their gradients on what the model predicts, by both backends in turn.

    Returns:
        A table of the median time of a step, its peak extra memory, and the largest difference between the losses.
    """
    with torch.no_grad():
        outputs = model(images)
    logits = [outputs[name].requires_grad_() for name in ("class_logits", "mask_logits")]
    steps = {name: _step(model, logits, targets, backend) for name, backend in BACKENDS.items()}
    losses, memory = {}, {}
    for name, step in steps.items():
        step()
        losses[name], memory[name] = peak_memory(step, images.device)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)

    layers, batch_size, num_queries, height, width = logits[1].shape
    lines = [
        f"the criterion on this model's predictions ({layers} layers, {batch_size} images, {num_queries} queries, "
        f"{height} x {width} logits,",
        f"{targets.size[0]} x {targets.size[1]} targets), forward and backward, medians of {ROUNDS} steps in turn:",
        "",
        f"{'':<20}{'time per step':>15}{'peak extra memory':>21}",
    ]
    for name in steps:
        milliseconds = 1e3 * statistics.median(times[name])
        lines.append(f"{name:<20}{milliseconds:>12.1f} ms{memory[name]['allocator'] / 2**20:>17.2f} MiB")
    ratio = statistics.median(
        slow / fast for fast, slow in zip(times["fastmask"], times["PyTorch reference"], strict=True)
    )
    least = max(memory["fastmask"]["allocator"], 1)
    lines.append(f"{'ratio':<20}{ratio:>13.1f} x{memory['PyTorch reference']['allocator'] / least:>18.1f} x")
    difference = max(abs(losses["fastmask"][key] - value) for key, value in losses["PyTorch reference"].items())
    lines.append(f"\nlargest difference between their {len(losses['fastmask'])} losses: {difference:.2g}")
    return "\n".join(lines)


def _step(model: MaskFormer, logits: list[Tensor], targets: Targets, backend: str) -> Callable[[], dict[str, float]]:
    """Computes the losses and the gradients of their weighted sum; returns the losses."""
    class_logits, mask_logits = logits

    def step() -> dict[str, float]:
        criterion = model.criterion
        criterion.backend = criterion.matcher.backend = backend
        try:
            losses = criterion({"class_logits": class_logits, "mask_logits": mask_logits}, targets)
        finally:
            criterion.backend = criterion.matcher.backend = "auto"
        total = sum(criterion.weight_dict[name] * loss for name, loss in losses.items())
        torch.autograd.grad(total, logits)
        return {name: loss.item() for name, loss in losses.items()}

    return step
