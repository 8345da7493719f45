"""``fastmask evaluate``: the scores of a model on a data set."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastmask.cli._options import DataOptions, Html, HtmlImages, PredictionOptions, with_shared_options
from fastmask.cli._tables import aligned, percent

if TYPE_CHECKING:
    from fastmask.data import SegmentationDataset
    from fastmask.training import Evaluation

SEMANTIC = ("mIoU", "fwIoU", "pixel_accuracy", "mean_accuracy", "boundary_IoU")
PANOPTIC = ("PQ", "SQ", "RQ")
GROUPS = {"all": "", "things": "_things", "stuff": "_stuff"}


@with_shared_options
def evaluate(
    model: Annotated[Path, typer.Argument(help="The folder of a model or of a training run.")],
    data: Annotated[
        str, typer.Option(help="The data set: its folder, a pattern of shards, composed:scenes or composed:icons-K.")
    ],
    part: DataOptions,
    how: PredictionOptions,
    skip_invalid: Annotated[
        bool, typer.Option("--skip-invalid", help="Leave out invalid polygons of COCO instances and say how many.")
    ] = False,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="semantic, general, panoptic or instance; repeatable. By default that of the run or of the truth."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images of one size to predict together.")] = 4,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read images.")] = 0,
    threshold: Annotated[float | None, typer.Option(help="Probability of a panoptic segment (0.8).")] = None,
    boundary: Annotated[bool, typer.Option(help="Compute boundary IoU too, which takes longer.")] = True,
    per_class: Annotated[bool, typer.Option("--per-class", help="Also print the numbers of each class.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all numbers to this file.")] = None,
    html: Html = None,
    html_images: HtmlImages = 50,
) -> None:
    """Evaluate a model on a data set: mIoU and boundary IoU, panoptic quality, COCO's AP.

    The page shows the images with the worst scores first: PQ, mIoU or AP of each image alone.

    torchrun -m fastmask evaluate ... shares the images among several processes.
    """
    from fastmask import prediction, training
    from fastmask.data import open_dataset
    from fastmask.files import write_json
    from fastmask.models import load_model
    from fastmask.models._registry import model_folder, task_of_run
    from fastmask.training.distributed import cleanup, setup

    folder = model_folder(model)
    network = load_model(folder)
    opened = partial(open_dataset, data, part.split, part.kind, skip_invalid=skip_invalid)
    dataset = _open(opened, task, task_of_run(model), network.config.num_classes)
    segments = {"threshold": threshold, "overlap_threshold": how.overlap_threshold}
    segments = {name: value for name, value in segments.items() if value is not None}
    page = None if html is None else prediction.EvaluationPage(dataset.info, html_images)
    processes = setup(how.device or None)
    evaluation = training.evaluate(
        network,
        dataset,
        task or None,
        batch_size=batch_size,
        workers=workers,
        device=processes.device,
        **how.views(),
        options={"panoptic": segments} if segments else None,
        boundary_share=0.02 if boundary else None,
        progress=True,
        each=None if page is None else page.add,
    )
    name, where = f"{type(network).__name__} of {folder}", f"{data} ({part.split})"
    if page is not None and html is not None:
        page.write(html, f"{name} on {where}", evaluation.numbers, evaluation.per_class, evaluation.absent_classes)
    if processes.is_main:
        classes = f"{name}, {network.config.num_classes} classes"
        print(f"{classes}, on {evaluation.num_samples} images of {where}; all numbers in percent")
        print(f"\n{summary(evaluation)}")
        if per_class:
            print(f"\n{class_table(evaluation)}")
        if json_file is not None:
            content = {"model": str(folder), "data": data, "split": part.split, **evaluation.to_dict()}
            write_json(json_file, content)
    cleanup()


def summary(evaluation: Evaluation) -> str:
    """Tables with the numbers of all tasks, and the classes that the truth does not hold."""
    numbers = evaluation.numbers
    tables = []
    prefixes = {task: {"semantic": "", "general": "general_"}.get(task) for task in evaluation.tasks}
    semantic = {task: prefix for task, prefix in prefixes.items() if prefix is not None}
    if semantic:
        names = [name for name in SEMANTIC if next(iter(semantic.values())) + name in numbers]
        rows = [[task, *(percent(numbers[prefix + name]) for name in names)] for task, prefix in semantic.items()]
        tables.append([["", *(name.replace("_", " ") for name in names)], *rows])
    if "panoptic" in evaluation.tasks:
        rows = [[name, *(percent(numbers[kind + suffix]) for kind in PANOPTIC)] for name, suffix in GROUPS.items()]
        tables.append([["panoptic", *PANOPTIC], *rows])
    if "instance" in evaluation.tasks:
        for kind in ("AP", "AR"):
            names = [name for name in numbers if name.startswith(kind)]
            cells = [percent(numbers[name]) for name in names]
            tables.append([["instance", *(name.replace("_", " ") for name in names)], ["", *cells]])
    parts = list(map(aligned, tables))
    absent, known = evaluation.absent_classes, evaluation.class_names
    if absent:
        parts.append(f"not in the truth, {len(absent)} of {len(known)} classes: {', '.join(absent)}")
    return "\n\n".join(parts)


def class_table(evaluation: Evaluation) -> str:
    """A line for each class."""
    header = ["class", *(name.replace("_", " ") for name in evaluation.per_class)]
    columns = [[percent(value) for value in values] for values in evaluation.per_class.values()]
    return aligned([header, *zip(evaluation.class_names, *columns, strict=True)])


def _open(
    opened: Callable[..., SegmentationDataset], tasks: list[str] | None, task_of_run: str | None, num_classes: int
) -> SegmentationDataset:
    """The data set with truth for the tasks, by default for the task of the run. For instances the classes are the
    things if the model has as many, otherwise all classes.

    Args:
        opened: opens the data set for a task.
    """
    if tasks == ["instance"]:
        dataset = opened(task="instance")
        return dataset if dataset.info.num_classes == num_classes else opened()
    if tasks:
        return opened(task="semantic" if set(tasks) <= {"semantic", "general"} else None)
    return opened(task=task_of_run)
