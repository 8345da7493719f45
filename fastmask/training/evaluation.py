"""Evaluates a model on a data set, in the tasks that both support."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fastmask.data.sample import DatasetInfo, Sample
from fastmask.data.transforms import ResizeShortSide
from fastmask.device import usable_device
from fastmask.files import finite
from fastmask.metrics import InstanceMetrics, PanopticMetrics, SemanticMetrics, SoundEventMetrics
from fastmask.metrics.base import Metrics
from fastmask.models._base import PretrainedModel
from fastmask.models._views import view_options
from fastmask.models.precision import autocast, check_precision
from fastmask.progress import with_bar
from fastmask.training.distributed import together, whole
from fastmask.training.interruption import prepare_worker

# For each kind of truth, the tasks that it can evaluate, and those evaluated by default.
SERVED = {
    "semantic": ("semantic", "general"),
    "panoptic": ("semantic", "general", "panoptic", "instance"),
    "instance": ("instance",),
}
DEFAULTS = {"semantic": ("semantic",), "panoptic": ("semantic", "panoptic"), "instance": ("instance",)}
EVENTS = "events"


class MapDataset(Protocol):
    """A data set that is read by index; if it has images, its ``info`` is a :class:`fastmask.data.DatasetInfo`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class Evaluation:
    """The result of :func:`evaluate`.

    Attributes:
        numbers: scores in 0..1 by name; nan where there was nothing to find. Names of the task "general" begin with
            "general_", since they would otherwise equal those of "semantic".
        per_class: by name, a list of the scores of each class in the order of ``class_names``.
        class_names: the classes of the data set.
        tasks: the tasks evaluated.
        num_samples: the number of images or clips, in all processes together.
        absent_classes: the classes that do not occur in the truth of any task; their part of "mIoU" and other means
            depends only on the predictions. Stuff does not count as absent if the truth has only things.
    """

    numbers: dict[str, float]
    per_class: dict[str, list[float]]
    class_names: tuple[str, ...]
    tasks: tuple[str, ...]
    num_samples: int
    absent_classes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """All fields, in types of JSON; nan becomes None."""
        return {
            "tasks": list(self.tasks),
            "num_samples": self.num_samples,
            "numbers": finite(self.numbers),
            "class_names": list(self.class_names),
            "per_class": finite(self.per_class),
            "absent_classes": list(self.absent_classes),
        }


def evaluate(
    model: nn.Module,
    dataset: MapDataset,
    tasks: Iterable[str] | None = None,
    *,
    batch_size: int = 4,
    workers: int = 0,
    device: str | torch.device | None = None,
    precision: str = "float32",
    window: tuple[int, int] | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    short_side: int | None = None,
    max_side: int | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    boundary_share: float | None = 0.02,
    progress: bool = False,
    each: Callable[[Any, dict[str, Any], dict[str, float]], object] | None = None,
) -> Evaluation:
    """Predicts every sample of a data set and compares the results with the truth, at the truth's own size.

    Images of the same size in a batch are predicted together, others separately, so that a result depends only on its
    image. One batch is in memory at a time; for "instance" the run lengths of all masks are kept, too.

    If ``torch.distributed`` is initialized, process r of W takes the samples r, r + W, ..., and each process returns
    the numbers over all samples.

    Args:
        model: the model, in any mode, which is kept; or the result of :func:`fastmask.training.distributed.wrap`.
        dataset: a data set with ``info``, as from :func:`fastmask.data.open_dataset`; for
            :class:`fastmask.SoundEventDetector` a data set of :class:`fastmask.data.Clip`.
        tasks: any of "semantic", "general" (semantic maps by hard assignment of masks), "panoptic" and "instance";
            for sound "events". By default the task of the truth, if the model supports it; for panoptic truth
            "semantic" and "panoptic".
        batch_size: the number of samples to read at a time, and the most to predict at a time.
        workers: the number of processes that read samples.
        device: the device to predict on; the model is moved there. By default the model's device.
        precision: "float32", or "bfloat16" or "float16" for autocast.
        window: (size, stride) of the windows in which images are predicted, as for the model's ``predict``; None for
            whole images, or the configured windows of a Segmenter or EoMT. Networks that classify masks have windows,
            scales and mirror images for "semantic" only.
        scales: the factors by which each image is enlarged; networks that classify masks average all views.
        flip: predict mirror images, too.
        short_side: resize images to this shorter side in pixels before they are predicted; results keep the truth's
            size. None leaves images as they are.
        max_side: with ``short_side``, the limit of the longer side.
        options: by task, further arguments of the model's ``predict``, such as {"panoptic": {"threshold": 0.5}}.
        boundary_share: as in :class:`fastmask.metrics.SemanticMetrics`; None leaves out boundary IoU, which is slow.
        progress: show a bar in the first process, if tqdm is installed.
        each: called with each sample, its results by task, and the numbers of the metrics on this sample alone; such as
            :meth:`fastmask.prediction.EvaluationPage.add`. Each process calls it for its own samples.

    Returns:
        The numbers of :class:`fastmask.metrics.SemanticMetrics` ("mIoU", ...), ``PanopticMetrics`` ("PQ", ...),
        ``InstanceMetrics`` ("AP", ...) or ``SoundEventMetrics`` ("F1", ...). These classes document how void pixels and
        crowd regions count; the data set says which classes are stuff.

    Raises:
        TypeError: a data set without ``info``, or ``tasks`` that is one string.
        ValueError: model and data set have different numbers of classes, model or truth does not have a task or option,
            or an argument is out of range.
        ImportError: "instance" without hotcoco.
    """
    check_precision(precision)
    for name, value in (("batch_size", batch_size), ("short_side", short_side), ("max_side", max_side)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if isinstance(tasks, str):
        raise TypeError(f"tasks must be several names, got {tasks!r}; expected [{tasks!r}]")
    if max_side is not None and short_side is None:
        raise ValueError("max_side goes with short_side")
    network = cast(PretrainedModel, whole(model))
    evaluator: _ClipEvaluator | _ImageEvaluator
    if "events" in network.tasks:
        if window is not None or tuple(scales) != (1.0,) or flip or short_side is not None:
            name = type(network).__name__
            raise ValueError(f"window, scales, flip and short_side are for images; {name} hears sounds")
        evaluator = _ClipEvaluator(network, dataset, tasks, options or {})
    else:
        images = _ImageEvaluator(network, dataset, tasks, options or {}, boundary_share)
        images.views = view_options(network, tuple(images.metrics), window, scales, flip)
        evaluator = images
    if device is not None:
        network.to(usable_device(device))
    device = next(network.parameters()).device
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if together() else (0, 1)
    resize = None if short_side is None else ResizeShortSide((short_side,), max_side)
    loader = DataLoader(
        _Share(dataset, range(rank, len(dataset), world_size), resize),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=_as_list,
        worker_init_fn=prepare_worker,
        generator=torch.Generator(),  # the default one would draw from the random state of training
    )
    for batch in with_bar(loader, len(loader), "evaluating", hidden=not progress or rank != 0):
        for group in _by_shape(batch):
            indices, tensors, samples = zip(*group, strict=True)
            inputs = torch.stack(tensors).to(device)
            with autocast(device, precision):
                results = evaluator.predict(inputs, samples)
            for i, (index, sample) in enumerate(zip(indices, samples, strict=True)):
                of_sample = {task: of_task[i] for task, of_task in results.items()}
                alone = evaluator.new_metrics()
                evaluator.add(alone, index, sample, of_sample)
                for task, metrics in alone.items():
                    evaluator.metrics[task].merge(metrics)
                if each is not None:
                    each(sample, of_sample, _numbers(alone))
    every = {task: metrics.synced() for task, metrics in evaluator.metrics.items()}
    per_class = {
        _prefix(task) + name: values for task, metrics in every.items() for name, values in metrics.per_class().items()
    }
    absent = set(evaluator.expected_classes).intersection(*(metrics.absent() for metrics in every.values()))
    names = evaluator.class_names
    absent_names = tuple(names[label] for label in sorted(absent))
    return Evaluation(_numbers(every), per_class, names, tuple(every), len(dataset), absent_names)


def served_tasks(model: PretrainedModel, info: DatasetInfo) -> tuple[str, ...]:
    """The tasks that the model supports and the truth of the data set can evaluate."""
    return tuple(task for task in SERVED[info.task] if task in model.tasks)


def _numbers(metrics: Mapping[str, Metrics]) -> dict[str, float]:
    """The scores of all tasks by name."""
    return {
        _prefix(task) + name: value for task, of_task in metrics.items() for name, value in of_task.compute().items()
    }


def _prefix(task: str) -> str:
    """The prefix of the task's score names, which separates "general" from "semantic"."""
    return "general_" if task == "general" else ""


class _ImageEvaluator:
    """Predicts images and compares the results with the truth."""

    def __init__(
        self,
        model: PretrainedModel,
        dataset: MapDataset,
        tasks: Iterable[str] | None,
        options: Mapping[str, Mapping[str, Any]],
        boundary_share: float | None,
    ):
        info = getattr(dataset, "info", None)
        if not isinstance(info, DatasetInfo):
            raise TypeError(f"dataset must have a DatasetInfo as its info, as from open_dataset; got {dataset!r}")
        self.model, self.info = model, info
        self.views: dict[str, Any] = {}  # further arguments of the model's ``predict``
        _check_classes(model, self.info)
        served = served_tasks(model, self.info)
        wanted = [task for task in DEFAULTS[self.info.task] if task in served] if tasks is None else list(tasks)
        names = f"{type(model).__name__} and {self.info.task} truth"
        if not wanted:
            raise ValueError(f"{names} have no task in common")
        _check_known("tasks", wanted, served, names)
        _check_known("options", options, wanted, "this evaluation")
        self.class_names = self.info.class_names
        # The classes that may occur in the truth: instances are never stuff.
        self.expected_classes = self.info.thing_classes if set(wanted) == {"instance"} else range(self.info.num_classes)
        self.tasks, self.boundary_share = wanted, boundary_share
        self.metrics = self.new_metrics()
        self.options = {task: self._own_options(task) | dict(options.get(task, {})) for task in wanted}

    def predict(self, inputs: Tensor, samples: Sequence[Sample]) -> dict[str, list[Any]]:
        """The results by task, a list with one for each of the images ``(B, 3, H, W)`` uint8."""
        images = inputs.float().div_(255)
        sizes = [sample.size for sample in samples]
        if len(self.model.tasks) == 1:
            return {"semantic": self.model.predict(images, sizes, **self.views, **self.options["semantic"])}
        results = {}
        of_image = dict(self.options)
        if self.views:
            results["semantic"] = self.model.predict(
                images, "semantic", sizes, **self.views, **of_image.pop("semantic")
            )
        if of_image:
            results |= self.model.predict_tasks(images, of_image, sizes)
        return results

    def add(self, metrics: Mapping[str, Metrics], index: int, sample: Sample, results: Mapping[str, Any]) -> None:
        """Adds the results of an image to the metrics of their tasks."""
        for task, result in results.items():
            of_task = metrics[task]
            if isinstance(of_task, SemanticMetrics):
                of_task.update(result.cpu(), sample.class_map(self.info.ignore_index))
            elif isinstance(of_task, PanopticMetrics):
                assert sample.segments is not None  # panoptic truth has no masks
                of_task.update(result, sample.segments, sample.labels, sample.crowd)
            elif isinstance(of_task, InstanceMetrics):
                of_task.update(f"{index:09d}", result, *_instances(sample, self.info))

    def new_metrics(self) -> dict[str, Metrics]:
        """New metrics by task."""
        return {task: self._metrics_of(task) for task in self.tasks}

    def _metrics_of(self, task: str) -> Metrics:
        info = self.info
        if task == "panoptic":
            return PanopticMetrics(info.num_classes, info.stuff_classes)
        if task == "instance":
            return InstanceMetrics(info.num_classes)
        return SemanticMetrics(info.num_classes, ignore_index=info.ignore_index, boundary_share=self.boundary_share)

    def _own_options(self, task: str) -> dict[str, Any]:
        if task in ("panoptic", "instance"):
            return {"stuff_classes": self.info.stuff_classes}
        # A label that is not a class, whatever the data set's void value.
        return {"ignore_index": self.info.num_classes} if task == "general" else {}


class _ClipEvaluator:
    """Predicts sound clips and compares the results with the truth."""

    def __init__(
        self,
        model: PretrainedModel,
        dataset: MapDataset,
        tasks: Iterable[str] | None,
        options: Mapping[str, Mapping[str, Any]],
    ):
        if hasattr(dataset, "info"):
            raise ValueError(f"{type(model).__name__} hears sounds; the data set has images")
        _check_known("tasks", [] if tasks is None else tasks, (EVENTS,), type(model).__name__)
        _check_known("options", options, (EVENTS,), type(model).__name__)
        config = model.config
        self.model, self.options = model, options.get(EVENTS, {})
        self.class_names = config.class_names or tuple(map(str, range(config.num_classes)))
        self.expected_classes = range(config.num_classes)
        self.metrics = self.new_metrics()

    def predict(self, inputs: Tensor, samples: Sequence[Any]) -> dict[str, list[Any]]:
        return {EVENTS: [result["events"] for result in self.model.predict(inputs, **self.options)]}

    def add(self, metrics: Mapping[str, Any], index: int, sample: Any, results: Mapping[str, Any]) -> None:
        """Adds the results of a clip to the metrics."""
        truth = {"labels": sample.labels, "onsets": sample.onsets, "offsets": sample.offsets}
        metrics[EVENTS].update(results[EVENTS], truth)

    def new_metrics(self) -> dict[str, Metrics]:
        """New metrics by task."""
        return {EVENTS: SoundEventMetrics(self.model.config.num_classes)}


class _Share(Dataset[tuple[int, Tensor, Any]]):
    """A process's share of a data set, as (index, input of the model, sample)."""

    def __init__(self, dataset: MapDataset, indices: range, resize: ResizeShortSide | None):
        self.dataset, self.indices, self.resize = dataset, indices, resize

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> tuple[int, Tensor, Any]:
        index = self.indices[i]
        sample = self.dataset[index]
        if hasattr(sample, "waveform"):
            return index, sample.waveform, sample
        return index, sample.image if self.resize is None else self.resize.of_image(sample.image), sample


def _instances(sample: Sample, info: DatasetInfo) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Masks, labels, crowd flags and areas of the things of a sample."""
    if sample.masks is not None:
        return sample.masks, sample.labels, sample.crowd, sample.areas
    stuff = set(info.stuff_classes)
    indices = torch.tensor(
        [m for m, label in enumerate(sample.labels.tolist()) if label not in stuff], dtype=torch.long
    )
    crowd, areas = (None if values is None else values[indices] for values in (sample.crowd, sample.areas))
    assert sample.segments is not None  # a sample has either segments or masks
    return sample.segments.eq(indices[:, None, None]), sample.labels[indices], crowd, areas


def _check_classes(model: PretrainedModel, info: DatasetInfo) -> None:
    if model.config.num_classes != info.num_classes:
        raise ValueError(f"the model has {model.config.num_classes} classes, the data set {info.num_classes}")
    names = model.config.class_names
    wrong = [i for i, (own, other) in enumerate(zip(names, info.class_names, strict=False)) if own != other]
    if wrong:
        warnings.warn(
            f"{len(wrong)} classes have other names in the data set than in the model, the first {wrong[0]}: "
            f"{info.class_names[wrong[0]]!r} and {names[wrong[0]]!r}",
            stacklevel=4,
        )


def _check_known(what: str, names: Iterable[str], known: Sequence[str], whose: str) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"{whose}: unknown {what} {', '.join(unknown)}; known are {', '.join(known) or 'none'}")


def _by_shape(batch: Sequence[tuple[int, Tensor, Any]]) -> list[list[tuple[int, Tensor, Any]]]:
    groups: dict[tuple[int, ...], list[tuple[int, Tensor, Any]]] = {}
    for item in batch:
        groups.setdefault(tuple(item[1].shape), []).append(item)
    return list(groups.values())


def _as_list(items: list[Any]) -> list[Any]:
    return items
