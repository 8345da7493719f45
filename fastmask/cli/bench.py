"""``fastmask bench``: the time and memory that a model takes on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from fastmask.cli._options import Precision
from fastmask.cli._tables import aligned

DEFAULT_CLASSES = 150
HEADER = ("", "", "median", "20 to 80 %", "rounds", "images/s", "peak extra memory", "ratio")
NAMES = {"training": "training step"}


def bench(
    model: Annotated[
        str, typer.Argument(help="The name of a model, or the folder of a model or of a training run.")
    ] = "maskformer-r50",
    size: Annotated[tuple[int, int], typer.Option(help="Height and width of the images, in pixels.")] = (512, 512),
    batch_size: Annotated[int, typer.Option(min=1, help="Images in a step.")] = 2,
    classes: Annotated[int | None, typer.Option(min=1, help="Classes of a model by name; 150 by default.")] = None,
    targets: Annotated[int, typer.Option(min=1, help="Targets of each image.")] = 20,
    subject: Annotated[
        list[str] | None,
        typer.Option(help="criterion, training, semantic, panoptic or instance; repeatable. All by default."),
    ] = None,
    device: Annotated[str, typer.Option(help="Such as cuda:1; a GPU by default if there is one.")] = "",
    precision: Precision = "float32",
    seconds: Annotated[
        float, typer.Option(help="Time for each subject, for fastmask and the reference together.")
    ] = 10.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all numbers to this file.")] = None,
) -> None:
    """Time a model on this machine, with fastmask's kernels and with the PyTorch reference in turn.

    Measures a training step with its parts, and predictions from images to
    results, on noise with random targets. Memory is what PyTorch's allocator
    handed out; the JSON file also has the growth of the process.
    benchmarks/run.py of the repository compares single operators with other
    implementations.
    """
    import sys

    import torch

    from fastmask import __version__
    from fastmask.device import usable_device
    from fastmask.files import write_json
    from fastmask.models import load_model, make_model
    from fastmask.training.benchmark import benchmark, random_batch

    if Path(model).is_dir():
        network = load_model(model)
        if classes not in (None, network.config.num_classes):
            raise ValueError(f"--classes is {classes}; {model} has {network.config.num_classes}")
    else:
        torch.manual_seed(0)
        network = make_model(model, classes or DEFAULT_CLASSES)
    where = usable_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    images, truth = random_batch(network.config.num_classes, size, batch_size, targets)
    rows = benchmark(
        network.to(where),
        images.to(where),
        truth.to(where),
        subject or None,
        precision=precision,
        seconds=seconds,
        progress=lambda doing: print(f"measuring {NAMES.get(doing, doing)} ...", file=sys.stderr),
    )
    content = {
        "model": model,
        "type": type(network).__name__,
        "num_classes": network.config.num_classes,
        "size": list(size),
        "batch_size": batch_size,
        "num_targets": targets,
        "precision": precision,
        "device": describe(where),
        "fastmask": __version__,
        "torch": torch.__version__,
    }
    print(
        f"{content['type']} {model}, {content['num_classes']} classes; {batch_size} images of {size[0]} x {size[1]} "
        f"pixels, {targets} targets each; {precision}; {content['device']}; torch {torch.__version__}\n"
    )
    print(table(rows))
    if json_file is not None:
        write_json(json_file, {**content, "rows": rows})


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The measurements of :func:`fastmask.training.benchmark.benchmark`: a line for each backend and each part of a
    step, and notes.
    """
    lines: list[tuple[str, ...]] = [HEADER]
    notes = []
    for i, row in enumerate(rows):
        first = i == 0 or rows[i - 1]["subject"] != row["subject"]
        name = NAMES.get(row["subject"], row["subject"])
        if row["failure"] is not None:
            lines.append((name if first else "", row["backend"], row["failure"], "", "", "", "", ""))
            continue
        lines.append(
            (
                name if first else "",
                row["backend"],
                f"{row['median_ms']:.1f} ms",
                f"{row['p20_ms']:.1f} to {row['p80_ms']:.1f}",
                str(row["rounds"]),
                f"{row['images_per_second']:.2f}",
                f"{row['memory_bytes']['allocator'] / 2**20:.2f} MiB",
                f"{row['ratio']:.2f} x" if "ratio" in row else "",
            )
        )
        lines += [("", f"  {part}", f"{ms:.1f} ms", *[""] * 5) for part, ms in row.get("parts_ms", {}).items()]
        if row["rounds"] == 1 and first:
            notes.append(f"{name}: slow, measured once")
        if "difference" in row:
            notes.append(f"largest difference between the losses of both: {row['difference']:.2g}")
    # The second column is text too.
    width = max(len(line[1]) for line in lines)
    text = aligned([(line[0], line[1].ljust(width), *line[2:]) for line in lines])
    return "\n\n".join([text, *(["\n".join(notes)] if notes else [])])


def describe(device: Any) -> str:
    """The name of a device's processor."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device} ({torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads)"
