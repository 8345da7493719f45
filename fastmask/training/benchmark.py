"""Measures time and memory of a model on this machine, with fastmask's kernels and with the PyTorch reference."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor

from fastmask.measure import Clock, Measurement, summary, take_turns
from fastmask.models._base import PretrainedModel
from fastmask.models.precision import autocast, check_precision
from fastmask.modules.criterion import SetCriterion
from fastmask.targets import Targets
from fastmask.training.optimizer import clip_gradients, make_optimizer
from fastmask.training.recipe import Recipe

OWN, REFERENCE = "fastmask", "PyTorch reference"
BACKENDS = {OWN: "auto", REFERENCE: "reference"}
SUBJECTS = ("criterion", "training", "semantic", "panoptic", "instance")
VOID = 255
CELL = 8  # pixels; random targets consist of squares of this side

Call = Callable[[Clock, str], Any]  # the function to measure, with a clock and a backend


def benchmark(
    model: PretrainedModel,
    images: Tensor,
    targets: Targets,
    subjects: Sequence[str] | None = None,
    *,
    precision: str = "float32",
    seconds: float = 10.0,
    progress: Callable[[str], None] = lambda subject: None,
) -> list[dict[str, Any]]:
    """Times a training step and predictions of a model with each backend in turn.

    The subjects are "criterion": matching, losses and their gradients for given predictions; "training": a whole step
    with AdamW; and "semantic", "panoptic" and "instance": predictions from images. The threshold of "panoptic" lets as
    many queries pass as there are targets, because random weights predict low probabilities. Segmenter and
    PerPixelBaseline run no kernels of fastmask, so they have no "criterion" and are timed with one backend.

    Args:
        model: the model, on its device. It is copied.
        images: ``(B, 3, H, W)`` floating point in 0..1 on the same device.
        targets: the targets of the images.
        subjects: the subjects to measure; by default all that the model has.
        precision: "float32", or "bfloat16" or "float16" for autocast.
        seconds: the time for each subject, over all backends; see :func:`fastmask.measure.take_turns`.
        progress: called with each subject when it begins.

    Returns:
        Rows for JSON, one for each subject and backend: "subject", "backend" and "failure" (None, or why the other keys
        are missing); "median_ms", "p20_ms", "p80_ms", "rounds", "images_per_second", "memory_bytes" (see
        :func:`fastmask.measure.peak_memory`). Rows of "training" have "parts_ms", the medians of forward, criterion,
        backward and optimizer. Rows of the reference have "ratio", its time divided by fastmask's, and for "criterion"
        "difference", the largest difference between the losses of both, for the same random numbers.

    Raises:
        TypeError: a model that does not take images.
        ValueError: a subject that the model does not have, or an unknown precision.
    """
    if not (isinstance(model, PretrainedModel) and "semantic" in model.tasks):
        raise TypeError(f"model must be a network that segments images, got {type(model).__name__}")
    check_precision(precision)
    criterion = _criterion_of(model)
    own = {"training", *model.tasks, *(["criterion"] if criterion is not None else [])}
    known = [subject for subject in SUBJECTS if subject in own]
    subjects = known if subjects is None else subjects
    if unknown := [subject for subject in subjects if subject not in known]:
        raise ValueError(f"{type(model).__name__} has no {', '.join(unknown)}; expected any of {', '.join(known)}")
    model = copy.deepcopy(model)
    backends = {OWN: "auto"} if criterion is None else BACKENDS
    rows = []
    with torch.random.fork_rng([images.device] if images.device.type == "cuda" else []):
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
    """Makes images of noise, and targets of random shapes and classes; 5% of the pixels are void.

    Args:
        num_classes: K.
        size: (H, W) in pixels.
        batch_size: B.
        num_targets: M, the number of targets per image, at most 254.

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


def _run(call: Call, model: PretrainedModel, images: Tensor, precision: str, backend: str, clock: Clock) -> Any:
    torch.manual_seed(0)  # so that both backends draw the same points
    with _using(model, backend), autocast(images.device, precision):
        return call(clock, backend)


def _criterion_of(model: PretrainedModel) -> SetCriterion | None:
    """The criterion of a network that classifies masks; None for other networks."""
    criterion = getattr(model, "criterion", None)
    return criterion if isinstance(criterion, SetCriterion) else None


def _make_call(model: PretrainedModel, images: Tensor, targets: Targets, subject: str) -> Call:
    if subject == "criterion":
        return _criterion(model, images, targets)
    if subject == "training":
        return _training_step(model, images, targets)
    return _prediction(model, images, targets, subject)


def _criterion(model: PretrainedModel, images: Tensor, targets: Targets) -> Call:
    with torch.no_grad():
        outputs = model(images)
    logits = {name: outputs[name].detach().requires_grad_() for name in ("class_logits", "mask_logits")}
    criterion = _criterion_of(model)
    assert criterion is not None

    def call(clock: Clock, backend: str) -> dict[str, Tensor]:
        losses = criterion(logits, targets)
        total = reduce(torch.add, [criterion.weight_dict[name] * loss for name, loss in losses.items()])
        torch.autograd.grad(total, list(logits.values()))
        clock.mark("criterion")
        return {name: loss.detach() for name, loss in losses.items()}

    return call


def _training_step(model: PretrainedModel, images: Tensor, targets: Targets) -> Call:
    recipe = Recipe()
    optimizer = make_optimizer(model, recipe)
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # every step has the same weights
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # allocates the optimizer's state, which must not count as memory of a step
    optimizer.zero_grad(set_to_none=True)

    criterion = _criterion_of(model)

    def call(clock: Clock, backend: str) -> None:
        hook: AbstractContextManager[Any] = nullcontext()
        if criterion is not None:  # "forward" ends where the criterion begins
            hook = criterion.register_forward_pre_hook(lambda *_: clock.mark("forward"))
        model.train()
        with hook:
            losses = model(images, targets)
        clock.mark("forward" if criterion is None else "criterion")
        reduce(torch.add, losses.values()).backward()
        clock.mark("backward")
        clip_gradients(model, recipe.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.mark("optimizer")

    return call


def _prediction(model: PretrainedModel, images: Tensor, targets: Targets, task: str) -> Call:
    options: dict[str, Any] = {} if len(model.tasks) == 1 else {"task": task}
    if task == "panoptic":
        options["threshold"] = _threshold(model, images, int(targets.counts.sum()))
    has_kernels = _criterion_of(model) is not None

    def call(clock: Clock, backend: str) -> None:
        model.predict(images, **options, **({"backend": backend} if has_kernels else {}))
        clock.mark(task)

    return call


@torch.no_grad()
def _threshold(model: PretrainedModel, images: Tensor, count: int) -> float:
    """The class probability that ``count`` queries of the batch exceed."""
    with model._evaluating():
        probabilities, labels = model(images)["pred_logits"].float().softmax(-1).max(-1)
    of_objects = probabilities[labels < model.config.num_classes].sort(descending=True).values
    return 0.0 if count >= len(of_objects) else float(of_objects[count])


@contextmanager
def _using(model: PretrainedModel, backend: str) -> Iterator[None]:
    """A context in which the model's modules run on a backend."""
    ours: list[Any] = [module for module in model.modules() if type(module).__module__.startswith("fastmask.")]
    before = {module: module.backend for module in ours if hasattr(module, "backend")}
    try:
        for module in before:
            module.backend = backend
        yield
    finally:
        for module, own in before.items():
            module.backend = own


def _row(subject: str, backend: str, found: dict[str, Measurement], num_images: int) -> dict[str, Any]:
    own, this = found[OWN], found[backend]
    row: dict[str, Any] = {"subject": subject, "backend": backend, "failure": this.failure}
    if this.failure is not None:
        return row
    row |= summary(this.seconds)
    row |= {"images_per_second": 1e3 * num_images / row["median_ms"], "memory_bytes": this.memory}
    if subject == "training":
        row["parts_ms"] = {part: 1e3 * value for part, value in this.parts().items()}
    if backend != OWN and own.failure is None:
        row["ratio"] = own.ratio(this)
        if subject == "criterion":
            row["difference"] = max(abs(float(own.result[name] - value)) for name, value in this.result.items())
    return row
