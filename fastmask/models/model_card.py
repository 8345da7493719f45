"""The README.md of a saved model: a model card for the Hugging Face hub that describes the model and its training."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastmask.models._base import PretrainedModel

CARD_FILE = "README.md"
MARK = "<!-- fastmask rewrites this file with the model. Delete this line to keep a text of your own. -->"
NOT_STATED = "Not stated."
# The scores in the card's YAML front matter, and their names on the hub.
HEAD_METRICS = {"mIoU": "mean_iou", "PQ": "pq", "AP": "ap"}


@dataclass(frozen=True)
class ModelCard:
    """The facts in a model's card that the model itself does not hold. The card says "Not stated" for empty ones.

    Args:
        data: the name of the data set that the model was trained on.
        recipe: the training settings, by name.
        metrics: the model's scores in 0..1, by name.
        evaluated_on: the data that the scores were measured on.
        license: the license of the weights by its name on the hub, such as "apache-2.0".
    """

    data: str = ""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    evaluated_on: str = ""
    license: str = ""

    def writers(self, model: PretrainedModel, folder: Path) -> dict[str, Callable[[Path], object]]:
        """The function that writes the card to a folder, for :func:`fastmask.files.replace_files`; none if the folder
        has a README.md that fastmask did not write.
        """
        path = folder / CARD_FILE
        if path.exists() and MARK.encode() not in path.read_bytes():
            return {}
        text = self.text(model)
        return {CARD_FILE: lambda temporary: temporary.write_text(text, encoding="utf-8", errors="replace")}

    def text(self, model: PretrainedModel) -> str:
        """The card: YAML front matter, whose values are written as JSON, and Markdown."""
        config = model.config
        head = "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in self._head(model).items())
        parameters = sum(parameter.numel() for parameter in model.parameters())
        backbone = f" and the backbone {_cell(config.backbone)}" if hasattr(config, "backbone") else ""
        return f"""---
{head}---

{MARK}

# {config.model_type}, {config.num_classes} classes

A {config.model_type} of fastmask with {parameters:,} parameters{backbone}.

## Use

{_use(model)}

## Input

{_input(config)}

## Training

Data: {_cell(self.data) or NOT_STATED}

{_table(("setting", "value"), self.recipe.items()) or f"Recipe: {NOT_STATED}"}

## Metrics

{self._metrics() or NOT_STATED}

## Classes

{_classes(config)}

## License

{_cell(self.license) or NOT_STATED}
"""

    def _head(self, model: PretrainedModel) -> dict[str, Any]:
        tasks = [f"{task}-segmentation" for task in ("semantic", "panoptic", "instance") if task in model.tasks]
        head: dict[str, Any] = {
            "library_name": "fastmask",
            "pipeline_tag": "image-segmentation" if tasks else "audio-classification",
            "tags": ["fastmask", model.config.model_type, *tasks],
        }
        if self.license:
            head["license"] = self.license
        if self.data:
            head["datasets"] = [self.data]
        scores = [
            {"type": kind, "name": name, "value": round(self.metrics[name], 4)}
            for name, kind in HEAD_METRICS.items()
            if math.isfinite(self.metrics.get(name, math.nan))
        ]
        if scores:
            dataset = {"name": self.evaluated_on or NOT_STATED, "type": self.data or NOT_STATED}
            result = {"task": {"type": head["pipeline_tag"]}, "dataset": dataset, "metrics": scores}
            head["model-index"] = [{"name": model.config.model_type, "results": [result]}]
        return head

    def _metrics(self) -> str:
        rows = [(name, f"{100 * value:.2f} %") for name, value in self.metrics.items() if math.isfinite(value)]
        where = f"On {_cell(self.evaluated_on)}:\n\n" if rows and self.evaluated_on else ""
        return where + _table(("score", "value"), rows)


def _use(model: PretrainedModel) -> str:
    custom = getattr(model.config, "backbone", "") == "custom"
    modules = ", backbone=backbone" if custom else ""
    comment = "  # the module that the model was built with" if custom else ""
    calls = {
        "semantic": "label_maps = model.predict(images)  # (B, 3, H, W) in 0..1, or a list of images",
        "panoptic": 'panoptic = model.predict(images, task="panoptic")',
        "instance": 'instances = model.predict(images, task="instance")',
        "events": "events = model.predict(waveforms)",
    }
    lines = [
        "from fastmask.models import load_model",
        "",
        f'model = load_model("path/to/this/folder"{modules}){comment}',
        *(call for task, call in calls.items() if task in model.tasks),
    ]
    return "\n".join(["```python", *lines, "```"])


def _input(config: Any) -> str:
    if hasattr(config, "sample_rate"):
        return f"Mono waveforms of {config.sample_rate} samples a second."
    mean, deviation = (", ".join(f"{value:g}" for value in values) for values in (config.pixel_mean, config.pixel_std))
    channels = "red, green and blue" if len(config.pixel_mean) == 3 else f"{len(config.pixel_mean)} channels"
    return (
        f"Images of {channels} in 0..1. The model itself subtracts the mean ({mean}) and divides by the standard "
        f"deviation ({deviation})."
    )


def _classes(config: Any) -> str:
    names = config.class_names or [NOT_STATED] * config.num_classes
    if not hasattr(config, "stuff_classes"):
        return _table(("class", "name"), enumerate(names))
    stuff = set(config.stuff_classes)
    rows = ((k, name, "stuff" if k in stuff else "thing") for k, name in enumerate(names))
    return _table(("class", "name", "kind"), rows)


def _table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A table in Markdown; "" if there are no rows."""
    header, lines = list(header), [list(map(_cell, row)) for row in rows]
    if not lines:
        return ""
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *lines))


def _cell(value: Any) -> str:
    """The value as one line of text, escaped for Markdown."""
    return html.escape(" ".join(str(value).split()), quote=False).replace("|", "&#124;")
