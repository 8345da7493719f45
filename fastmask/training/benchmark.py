"""What a model costs on this machine with fastmask's kernels, and with the PyTorch reference in their place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastmask.measure import Clock, Measurement, take_turns
from fastmask.models._base import SegmentationModel
from fastmask.models.maskformer import MaskFormer
from fastmask.models.precision import autocast, check_precision
from fastmask.targets import Targets
from fastmask.training.optimizer import clip_gradients, make_optimizer
from fastmask.training.recipe import Recipe

OWN, REFERENCE = "fastmask", "PyTorch reference"
BACKENDS = {OWN: "auto", REFERENCE: "reference"}
SUBJECTS = ("criterion", "training", "semantic", "panoptic", "instance")
VOID = 255
CELL = 8  # pixels; the sides of what random targets are made of

Call = Callable[[Clock, str], Any]  # what is measured, given a clock and a backend


def benchmark(
    model: SegmentationModel,
    images: Tensor,
    targets: Targets,
    subjects: Sequence[str] | None = None,
    *,
    precision: str = "float32",
    seconds: float = 10.0,
    progress: Callable[[str], None] = lambda subject: None,
) -> list[dict[str, Any]]:
    """Times a training step and predictions of a model with each backend in turn.

    Subjects: "criterion", matching, losses and their gradients on what the model predicts; "training", a whole step
    with AdamW; and predictions of a task from images, "semantic", "panoptic" (at the threshold that as many queries
    pass as there are targets, since networks with random weights are sure of nothing) and "instance". Segmenter and
    PerPixelBaseline run no kernels of fastmask: they have no criterion of its own and nothing to compare with.

    Args:
        model: on its device. It is copied.
        images: ``(B, 3, H, W)`` floating point in 0..1 on the same device.
        targets: of the images.
        subjects: all that the model has by default.
        precision: "float32", or "bfloat16" or "float16" for autocast.
        seconds: for each subject, all backends together; see :func:`fastmask.measure.take_turns`.
        progress: told each subject when it begins.

    Returns:
        JSON-able rows, one for each subject and backend: "subject", "backend" and "failure" (None, or why nothing
        follows); "median_ms", "p20_ms", "p80_ms", "rounds", "images_per_second", "memory_bytes" (see
        :func:`fastmask.measure.peak_memory`), for "training" the medians "parts_ms" of forward, criterion, backward and
        optimizer; and for the reference "ratio", how many times as long it takes, and for "criterion" "difference", the
        greatest between the losses of both.

    Raises:
        TypeError: a model of something else than images.
        ValueError: a subject that the model does not have, or an unknown precision.
    """
    if not isinstance(model, SegmentationModel):
        raise TypeError(f"model must be a network that segments images, got {type(model).__name__}")
    check_precision(precision)
    known = SUBJECTS if isinstance(model, MaskFormer) else ("training", "semantic")
    subjects = known if subjects is None else subjects
    if unknown := [subject for subject in subjects if subject not in known]:
        raise ValueError(f"{type(model).__name__} has no {', '.join(unknown)}; expected any of {', '.join(known)}")
    model = copy.deepcopy(model)
    backends = BACKENDS if isinstance(model, MaskFormer) else {OWN: "auto"}
    rows = []
    for subject in subjects:
        progress(subject)
        with autocast(images.device, precision):
            call = _make_call(model, images, targets, subject)
        calls = {name: partial(_run, call, model, images, precision, backend) for name, backend in backends.items()}
        found = take_turns(calls, images.device, seconds)
        rows += [_row(subject, name, found, len(images)) for name in found]
    return rows


def random_batch(
    num_classes: int, size: tuple[int, int], batch_size: int = 2, num_targets: int = 20, seed: int = 0
) -> tuple[Tensor, Targets]:
    """Images of noise, and targets that are patches of random shapes and classes, a twentieth of the pixels void.

    Args:
        num_classes: K.
        size: (H, W) in pixels.
        batch_size: B.
        num_targets: M, of each image, at most 254.

    Returns:
        ``(B, 3, H, W)`` float32 and segment maps of that size, on the CPU.

    Raises:
        ValueError: a number out of range.
    """
    for name, value, most in (("num_targets", num_targets, 254), ("batch_size", batch_size, None)):
        if value < 1 or (most is not None and value > most):
            raise ValueError(f"{name} must be at least 1{'' if most is None else f' and at most {most}'}, got {value}")
    generator = torch.Generator().manual_seed(seed)
    height, width = size
    rows, columns = -(-height // CELL), -(-width // CELL)
    cells = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).float()
    segments, labels = [], []
    for _ in range(batch_size):
        centers = torch.rand(num_targets, 2, generator=generator) * torch.tensor([rows, columns])
        nearest = torch.cdist(cells, centers).argmin(1).to(torch.uint8)
        nearest[torch.rand(len(nearest), generator=generator) < 0.05] = VOID
        plane = nearest.view(rows, columns).repeat_interleave(CELL, 0).repeat_interleave(CELL, 1)
        segments.append(plane[:height, :width])
        labels.append(torch.randint(num_classes, (num_targets,), generator=generator))
    images = torch.rand(batch_size, 3, height, width, generator=generator)
    return images, Targets.from_segments(torch.stack(segments), labels, void=VOID)


def _run(call: Call, model: SegmentationModel, images: Tensor, precision: str, backend: str, clock: Clock) -> Any:
    with _using(model, backend), autocast(images.device, precision):
        return call(clock, backend)


def _make_call(model: SegmentationModel, images: Tensor, targets: Targets, subject: str) -> Call:
    if subject == "criterion":
        return _criterion(model, images, targets)
    if subject == "training":
        return _training_step(model, images, targets)
    return _prediction(model, images, targets, subject)


def _criterion(model: MaskFormer, images: Tensor, targets: Targets) -> Call:
    with torch.no_grad():
        outputs = model(images)
    logits = {name: outputs[name].detach().requires_grad_() for name in ("class_logits", "mask_logits")}
    weights = model.criterion.weight_dict

    def call(clock: Clock, backend: str) -> dict[str, Tensor]:
        losses = model.criterion(logits, targets)
        total = sum(weights[name] * loss for name, loss in losses.items())
        torch.autograd.grad(total, list(logits.values()))
        clock.mark("criterion")
        return {name: loss.detach() for name, loss in losses.items()}

    return call


def _training_step(model: SegmentationModel, images: Tensor, targets: Targets) -> Call:
    recipe = Recipe()
    optimizer = make_optimizer(model, recipe)
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # so that every step finds the same weights
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # makes its state, which is no step's own memory
    optimizer.zero_grad(set_to_none=True)

    has_criterion = isinstance(model, MaskFormer)

    def call(clock: Clock, backend: str) -> None:
        hook = nullcontext()  # or one that ends "forward" where the criterion begins
        if has_criterion:
            hook = model.criterion.register_forward_pre_hook(lambda *_: clock.mark("forward"))
        model.train()
        with hook:
            losses = model(images, targets)
        clock.mark("criterion" if has_criterion else "forward")
        sum(losses.values()).backward()
        clock.mark("backward")
        clip_gradients(model, recipe.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.mark("optimizer")

    return call


def _prediction(model: SegmentationModel, images: Tensor, targets: Targets, task: str) -> Call:
    options: dict[str, Any] = {}
    if task == "panoptic":
        options["threshold"] = _threshold(model, images, int(targets.counts.sum()))

    def call(clock: Clock, backend: str) -> None:
        if isinstance(model, MaskFormer):
            model.predict(images, task, backend=backend, **options)
        else:
            model.predict(images)
        clock.mark(task)

    return call


@torch.no_grad()
def _threshold(model: MaskFormer, images: Tensor, count: int) -> float:
    """The class probability that ``count`` queries of the batch exceed."""
    with model._evaluating():
        probabilities, labels = model(images)["pred_logits"].float().softmax(-1).max(-1)
    of_objects = probabilities[labels < model.config.num_classes].sort(descending=True).values
    return 0.0 if count >= len(of_objects) else float(of_objects[count])


@contextmanager
def _using(model: SegmentationModel, backend: str) -> Iterator[None]:
    """The model's modules run on a backend for a while."""
    ours = [module for module in model.modules() if type(module).__module__.startswith("fastmask.")]
    before = {module: module.backend for module in ours if hasattr(module, "backend")}
    for module in before:
        module.backend = backend
    try:
        yield
    finally:
        for module, own in before.items():
            module.backend = own


def _row(subject: str, backend: str, found: dict[str, Measurement], num_images: int) -> dict[str, Any]:
    own, this = found[OWN], found[backend]
    row: dict[str, Any] = {"subject": subject, "backend": backend, "failure": this.failure}
    if this.failure is not None:
        return row
    low, median, high = this.percentiles(20, 50, 80)
    row |= {
        "median_ms": 1e3 * median,
        "p20_ms": 1e3 * low,
        "p80_ms": 1e3 * high,
        "rounds": len(this.rounds),
        "images_per_second": num_images / median,
        "memory_bytes": this.memory,
    }
    if subject == "training":
        row["parts_ms"] = {part: 1e3 * value for part, value in this.parts().items()}
    if backend != OWN and own.failure is None:
        row["ratio"] = own.ratio(this)
        if subject == "criterion":
            row["difference"] = max(abs(float(own.result[name] - value)) for name, value in this.result.items())
    return row
