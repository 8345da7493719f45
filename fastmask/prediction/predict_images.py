"""From a model and images to files: label maps, COCO's formats and overlays."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmask.data import DatasetInfo, ResizeShortSide
from fastmask.data.folder import void_label
from fastmask.data.image_files import reading
from fastmask.data.palette import distinct_colors
from fastmask.data.pictures import decode_picture
from fastmask.device import usable_device
from fastmask.models._base import PretrainedModel
from fastmask.models._inference import INFERENCE_BY_TASK
from fastmask.models._registry import load_model, task_of_run
from fastmask.models._views import view_options
from fastmask.models.precision import autocast, check_precision
from fastmask.prediction.inputs import ImageFile, find_images
from fastmask.prediction.outputs import FILES, Outputs
from fastmask.prediction.overlay import Palette

# The options of ``predict`` for single tasks, and their defaults.
THRESHOLDS = {"panoptic": {"threshold": 0.8, "overlap_threshold": 0.8}, "instance": {"threshold": 0.5, "top_k": 100}}


@dataclass(frozen=True)
class PredictionReport:
    """The outcome of :func:`predict`.

    Attributes:
        task: the predicted task.
        written: the names of the images whose results were written.
        failures: the images that could not be read, each with the reason.
        paths: the folders and files that were written.
        seconds: the time for all images, without loading the model.
    """

    task: str
    written: tuple[str, ...]
    failures: tuple[tuple[Path, str], ...]
    paths: tuple[Path, ...]
    seconds: float

    @property
    def images_per_second(self) -> float:
        """Images written per second."""
        return len(self.written) / max(self.seconds, 1e-9)


def predict(
    model: PretrainedModel | str | Path,
    images: str | Path | Iterable[str | Path],
    output: str | Path,
    *,
    task: str | None = None,
    info: DatasetInfo | None = None,
    palette: Palette | None = None,
    batch_size: int = 1,
    workers: int = 1,
    device: str | torch.device | None = None,
    precision: str = "float32",
    short_side: int | None = None,
    max_side: int | None = None,
    window: int | tuple[int, int] | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    threshold: float | None = None,
    overlap_threshold: float | None = None,
    top_k: int | None = None,
    overlays: bool = True,
    html: str | Path | None = None,
    html_images: int = 50,
    overwrite: bool = False,
    progress: bool = False,
) -> PredictionReport:
    """Segments images and writes the results. NAME is an image's path in its folder, without suffix.

    "semantic" and "general": ``labels/NAME.png``, the class index of each pixel in 8 bits, or in 16 if there are more
    than 255 classes; 255 (65535) is void, which "semantic" never gives. ``classes.json`` names the classes, in the form
    that data sets of the layout "folder" have.

    "panoptic": ``panoptic/NAME.png`` and ``panoptic.json`` in COCO's panoptic format, with an additional score for each
    segment; and ``labels/NAME.png`` and ``classes.json`` as above.

    "instance": ``instances.json`` in COCO's format of results, with all instances regardless of score; and
    ``images.json``, the list of their images and categories, as pycocotools expects it.

    All tasks: ``overlays/NAME.png``, a picture of at most 1600 pixels a side that shows the result.

    Each picture is written whole or not at all. The JSON files are written at the end, even after an error or Ctrl-C,
    and list the images that were written. One batch of images is in memory at a time. A file that cannot be read does
    not stop the others.

    Args:
        model: a network, or the folder of a saved network or of a training run.
        images: a file, a folder or several; :func:`fastmask.prediction.find_images` says which files count, and how
            their results are named and numbered. Pictures are turned as their EXIF orientation says;
            :func:`fastmask.data.pictures.decode_picture` says how they become RGB.
        output: the folder to write to.
        task: "semantic", "general", "panoptic" or "instance". By default the task of the training run; without one
            "panoptic" for a network that classifies masks and has stuff classes, otherwise "semantic".
        info: a data set's description: names, colors and stuff of the classes, and the category ids of the JSON files.
            By default names and stuff are the model's, and a category id is the index of its class.
        palette: a color for each class; by default the data set's, or distinct colors.
        batch_size: the most consecutive images of one size to predict together.
        workers: threads that draw and write results while the model continues; each holds one more image in memory.
        device: where to predict; the model moves there. By default its own, and for a folder a GPU if there is one.
        precision: "float32", or "bfloat16" or "float16" for autocast.
        short_side: resize images to this shorter side for the network, in pixels, such as its training size. Results
            still have the image's own size. None for no resizing.
        max_side: with ``short_side``, the limit of the longer side.
        window: (size, stride) of the windows in which images are predicted, in pixels, or one number for both; bounds
            the memory for large images. None for whole images, and for Segmenter and EoMT the configured windows.
            Networks that classify masks take ``window``, ``scales`` and ``flip`` for "semantic" only.
        scales: factors by which each image is enlarged; results are averaged. Not for networks that classify pixels.
        flip: predict mirror images too, as for ``scales``.
        threshold: "panoptic": the class probability that a segment must exceed, 0.8. "instance": the score that an
            instance must exceed to be drawn, 0.5.
        overlap_threshold: "panoptic": the least visible share of a segment, 0.8.
        top_k: "instance": the most instances of an image, 100.
        overlays: write overlays.
        html: a file to write as one HTML page, in which the segments show their names and scores under the pointer.
        html_images: the page shows the first images, at most this many.
        overwrite: replace existing files.
        progress: show a bar, if tqdm is installed.

    Raises:
        FileNotFoundError: no such model, file or folder, or no image.
        FileExistsError: a result exists; nothing was predicted.
        TypeError: a model that does not segment color images.
        ValueError: a task or option that the model lacks, an argument out of range, or an ``info`` or palette with
            another number of classes.
        OSError: the results cannot be written.
    """
    files = find_images(images, output)
    if isinstance(model, str | Path):
        task = task or task_of_run(model)
        device = device or ("cuda" if torch.cuda.is_available() else None)
    network = _image_model(load_model(model) if isinstance(model, str | Path) else model)
    task = _task_of(network, task)
    info = _class_info(network, info, palette)
    options = view_options(network, [task], window, scales, flip)
    limits = _limits(task, threshold=threshold, overlap_threshold=overlap_threshold, top_k=top_k)
    check_precision(precision)
    counts = {
        "batch_size": batch_size,
        "workers": workers,
        "html_images": html_images,
        "short_side": short_side,
        "max_side": max_side,
    }
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if short_side is None and max_side is not None:
        raise ValueError("max_side goes with short_side")
    if short_side is not None and window is not None and "scales" in network.views:
        raise ValueError("short_side does not go with window, whose results have the size that the network sees")
    resize = None if short_side is None else ResizeShortSide((short_side,), max_side)
    if len(network.tasks) > 1:
        options |= {"task": task, **_task_options(task, info, limits)}

    page = None if html is None else Path(html)
    outputs = Outputs(Path(output), task, info, limits.get("threshold", 0.0), overlays, workers, page, html_images)
    existing = [] if overwrite else outputs.existing(files)
    if existing:
        what = f"{existing[0]} exists" if len(existing) == 1 else f"{existing[0]} and {len(existing) - 1} more exist"
        raise FileExistsError(f"{what} already; overwrite=True (--overwrite) replaces them")
    if device is not None:
        network.to(usable_device(device))
    start = time.perf_counter()
    with outputs, _Bar(len(files), progress) as bar:
        for batch in _batches(files, outputs.failures, bar, batch_size):
            for (file, image), result in zip(batch, _run(network, batch, resize, precision, options), strict=True):
                outputs.write(file, image, result)
                bar.advance()
    seconds = time.perf_counter() - start
    paths: tuple[Path, ...] = ()
    if outputs.written:
        paths = tuple(Path(output) / name for name in (*outputs.folders, *FILES[task]))
        paths += () if page is None else (page,)
    return PredictionReport(task, tuple(file.name for file in outputs.written), tuple(outputs.failures), paths, seconds)


def _batches(
    files: Sequence[ImageFile], failures: list[tuple[Path, str]], bar: _Bar, batch_size: int
) -> Iterator[list[tuple[ImageFile, Tensor]]]:
    """Batches of consecutive images ``(3, H, W)`` uint8 of one size; unreadable files go to ``failures``."""
    batch: list[tuple[ImageFile, Tensor]] = []
    for file in files:
        try:
            image = reading(file.path, decode_picture)
        except ValueError as error:
            failures.append((file.path, str(error).removeprefix(f"{file.path}: ")))
            bar.advance()
            continue
        if batch and batch[0][1].shape != image.shape:
            yield batch
            batch = []
        batch.append((file, image))
        if len(batch) == batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def _run(
    model: PretrainedModel,
    batch: Sequence[tuple[ImageFile, Tensor]],
    resize: ResizeShortSide | None,
    precision: str,
    options: dict[str, Any],
) -> list[Any]:
    """The model's result for each image, of the image's size."""
    sizes = [(image.shape[1], image.shape[2]) for _, image in batch]
    images = [image for _, image in batch]
    if resize is not None:
        images = list(map(resize.of_image, images))
    device = model.device
    pixels = torch.stack(images).to(device).float().div_(255)
    with autocast(device, precision):
        return model.predict(pixels, sizes=sizes, **options)


def _image_model(model: Any) -> PretrainedModel:
    if not (isinstance(model, PretrainedModel) and "semantic" in model.tasks):
        raise TypeError(f"a {type(model).__name__} does not segment images")
    channels = len(model.preprocessor.mean)
    if channels != 3:
        raise TypeError(f"the model takes images of {channels} channels; expected 3, red, green and blue")
    return model


def _task_of(model: PretrainedModel, task: str | None) -> str:
    if task is None:
        return "panoptic" if getattr(model.config, "stuff_classes", ()) else "semantic"
    if task not in INFERENCE_BY_TASK:
        raise ValueError(f"task={task!r} is unknown; expected one of {', '.join(INFERENCE_BY_TASK)}")
    if task not in model.tasks:
        raise ValueError(f"task={task!r}: a {type(model).__name__} does semantic segmentation only")
    return task


def _class_info(model: PretrainedModel, info: DatasetInfo | None, palette: Palette | None) -> DatasetInfo:
    """The description of the model's classes."""
    config = model.config
    num_classes = config.num_classes
    if info is None:
        names = config.class_names or tuple(f"class {k}" for k in range(num_classes))
        void = void_label(num_classes)
        info = DatasetInfo(names, stuff_classes=getattr(config, "stuff_classes", ()), ignore_index=void)
    elif info.num_classes != num_classes:
        raise ValueError(f"info has {info.num_classes} classes; the model has {num_classes}")
    colors = palette if palette is not None else info.palette or distinct_colors(num_classes)
    if len(colors) != num_classes:
        raise ValueError(f"palette has {len(colors)} colors; the model has {num_classes} classes")
    for color in colors:
        if len(color) != 3 or not all(0 <= channel <= 255 for channel in color):
            raise ValueError(f"palette holds {tuple(map(int, color))}; expected three values in 0..255")
    checked = tuple((int(red), int(green), int(blue)) for red, green, blue in colors)
    return replace(info, palette=checked, ignore_index=void_label(num_classes))


def _limits(task: str, **given: float | None) -> dict[str, Any]:
    """The task's thresholds, by default those of ``THRESHOLDS``."""
    limits = dict(THRESHOLDS.get(task, {}))
    for name, value in given.items():
        if value is None:
            continue
        if name not in limits:
            raise ValueError(f"{name} does not go with the task {task!r}")
        if name != "top_k" and not 0 <= value <= 1:
            raise ValueError(f"{name} must lie in 0..1, got {value}")
        limits[name] = value
    return limits


def _task_options(task: str, info: DatasetInfo, limits: dict[str, Any]) -> dict[str, Any]:
    """The other arguments of ``predict`` of networks that classify masks."""
    if task == "general":
        return {"ignore_index": info.ignore_index}
    if task == "panoptic":
        return {"stuff_classes": info.stuff_classes, **limits}
    if task == "instance":
        return {"stuff_classes": info.stuff_classes, "output": "rle", "boxes": True, "top_k": limits["top_k"]}
    return {}


class _Bar:
    """A progress bar, if it is wanted and tqdm is installed."""

    def __init__(self, total: int, shown: bool):
        self._bar = None
        if shown:
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self._bar = tqdm(total=total, desc="predicting", unit="image", disable=None)

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
