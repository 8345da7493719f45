"""The configuration of a training run as one JSON file: data, network, recipe, precision and intervals."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fastmask.data import open_dataset
from fastmask.data.open import is_composed
from fastmask.data.sample import TASKS
from fastmask.data.shards import is_url
from fastmask.models._configuration import ModelConfig, PlainConfig, require
from fastmask.models._registry import MODELS, config_from_dict, load_config, make_config
from fastmask.models.precision import PRECISIONS
from fastmask.training.distributed import STRATEGIES
from fastmask.training.recipe import Recipe

# Fields that may change when a run is resumed, because they do not affect what is learned. "accumulate" may change
# because the number of processes may.
CHANGEABLE = frozenset(
    "accumulate workers strategy activation_checkpointing log log_every eval_every checkpoint_every".split()
)
LOGGERS = ("tensorboard", "wandb", "trackio", "none")
WARMUP_PART = 10  # warm-up takes at most one tenth of the steps


@dataclass(frozen=True)
class TrainingConfig(PlainConfig):
    """Everything that determines a run of :func:`fastmask.training.train`, except the machine.

    Args:
        data: the data set's folder or shards, kept as an absolute path, or "composed:scenes"
            or "composed:icons-K".
        model: the network, with the classes of the data set; a configuration or its ``to_dict``.
        recipe: optimizer, schedule, steps, batch and augmentation; a :class:`Recipe` or its ``to_dict``.
        kind: the layout of the data set, see :func:`fastmask.data.open_dataset`.
        task: "semantic", "panoptic" or "instance"; networks that classify pixels support only the first. "" for the
            task of the data set.
        skip_invalid: leave out invalid polygons, see :func:`fastmask.data.open_dataset`.
        train_split: the split to train on.
        val_split: the split to evaluate on; "" for no evaluation.
        pretrained: a folder with a network of the same kind to start from, kept as an absolute path; if the number of
            classes differs, the weights that depend on it start at random. "" for none.
        pretrained_backbone: the argument of the same name to the network's constructor; "" for none.
        seed: decides initial weights, order, augmentation and dropout; not negative.
        precision: "float32", "bfloat16" or "float16", see :class:`fastmask.training.Trainer`.
        accumulate: the number of micro-batches in a step.
        workers: the number of processes that read data, for each training process; 0 to read in the training process.
        strategy: how several processes train together, "ddp" or "fsdp".
        activation_checkpointing: recompute activations in the backward pass to save memory.
        log: the logger that gets all numbers: "tensorboard", "wandb", "trackio" or "none"; metrics.jsonl and the log
            always get them.
        log_every: the number of steps between two lines of the log.
        eval_every: the number of steps between two evaluations; 0 for one at the end.
        checkpoint_every: the number of steps between two checkpoints.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value out of range.
    """

    data: str
    model: ModelConfig
    recipe: Recipe = field(default_factory=Recipe)
    kind: str = "auto"
    task: str = ""
    skip_invalid: bool = False
    train_split: str = "train"
    val_split: str = "val"
    pretrained: str = ""
    pretrained_backbone: str = ""
    seed: int = 0
    precision: str = "float32"
    accumulate: int = 1
    workers: int = 2
    strategy: str = "ddp"
    activation_checkpointing: bool = False
    log: str = "tensorboard"
    log_every: int = 20
    eval_every: int = 1000
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        for name, make in (("model", config_from_dict), ("recipe", Recipe.from_dict)):
            value = getattr(self, name)
            if not isinstance(value, PlainConfig):
                if not isinstance(value, Mapping):
                    raise TypeError(f"{name} must be a configuration or a dict, got {value!r}")
                try:
                    object.__setattr__(self, name, make(value))
                except (TypeError, ValueError) as error:
                    raise type(error)(f"{name}: {error}") from error
        super().__post_init__()
        require(self.data != "", "data", "''", 'a folder or "composed:scenes"')
        for name in ("data", "pretrained"):
            if (path := getattr(self, name)) and not is_composed(path) and not is_url(path):
                object.__setattr__(self, name, os.path.abspath(path))  # a run may be resumed from another place
        require(self.train_split != "", "train_split", "''", "the name of a split")
        segments = isinstance(self.model, ModelConfig) and "semantic" in MODELS[self.model.model_type].tasks
        require(segments, "model", type(self.model).__name__, "the configuration of a network that segments images")
        known = {"precision": PRECISIONS, "strategy": STRATEGIES, "task": ("", *TASKS), "log": LOGGERS}
        for name, choices in known.items():
            value = getattr(self, name)
            require(value in choices, name, repr(value), f"one of {', '.join(map(repr, choices))}")
        check_task(self.model, self.task)
        self.require_at_least(0, "seed", "workers", "eval_every")
        self.require_at_least(1, "accumulate", "log_every", "checkpoint_every")
        even = self.recipe.batch_size % self.accumulate == 0
        require(even, "accumulate", self.accumulate, f"a divisor of the recipe's batch_size {self.recipe.batch_size}")

    def to_dict(self) -> dict[str, Any]:
        """Every field, in types of JSON."""
        return {**super().to_dict(), "model": self.model.to_dict(), "recipe": self.recipe.to_dict()}

    def fixed_differences(self, other: TrainingConfig) -> list[str]:
        """The names of fields, such as "recipe.steps", whose difference in ``other`` means that it is another run."""
        ours, theirs = _flat(self.to_dict()), _flat(other.to_dict())
        return [name for name in {**ours, **theirs} if name not in CHANGEABLE and ours.get(name) != theirs.get(name)]


def make_training_config(
    data: str | Path,
    model: str = "",
    recipe: str | Recipe = "",
    *,
    model_fields: Mapping[str, Any] | None = None,
    recipe_fields: Mapping[str, Any] | None = None,
    **options: Any,
) -> TrainingConfig:
    """Makes a configuration from a data set, whose classes become the network's, and the names of presets. Pixels
    without a label do not count in any loss; ``model_fields={"ignore_void": False}`` makes them background of every
    mask, as MaskFormer's authors do.

    Args:
        data: as for :class:`TrainingConfig`.
        model: a preset of :func:`fastmask.models.make_model`; "" for the network in the folder ``pretrained``.
        recipe: a :class:`Recipe` or the name of one; "" for the recipe of the network's paper.
        model_fields: fields of the network's configuration to change.
        recipe_fields: fields of the recipe to change; "steps" limits warm-up to a tenth of the steps.
        options: further fields of :class:`TrainingConfig`. ``task`` is by default that of the data set, or "semantic"
            if that is panoptic and the network supports semantic segmentation only.

    Raises:
        FileNotFoundError: no data set, or no folder ``pretrained``.
        TypeError: an unknown field, or neither a model nor ``pretrained``.
        ValueError: an unknown preset, a value out of range, or a task that the network or the data set does not have.
    """
    unknown = sorted(set(options) - {f.name for f in fields(TrainingConfig)})
    if unknown:
        raise TypeError(f"a TrainingConfig has no {', '.join(unknown)}")
    split = options.get("train_split", "train")
    skip = options.get("skip_invalid", False)
    info = open_dataset(data, split, options.get("kind", "auto"), options.get("task") or None, skip_invalid=skip).info
    if model:
        network = make_config(
            model, class_names=info.class_names, stuff_classes=info.stuff_classes, **(model_fields or {})
        )
    elif options.get("pretrained"):
        network = load_config(options["pretrained"])
        names = ("num_classes", "class_names", "stuff_classes", "ignore_index")
        of_data = {name: getattr(info, name) for name in names if hasattr(network, name)}
        network = network.replace(**of_data, **(model_fields or {}))
    else:
        raise TypeError("model must be given, or pretrained, a folder with a network")
    if hasattr(network, "ignore_void") and "ignore_void" not in (model_fields or {}):
        network = network.replace(ignore_void=True)
    if info.task == "panoptic" and not options.get("task") and "panoptic" not in MODELS[network.model_type].tasks:
        options["task"] = "semantic"  # panoptic truth has it, too
    else:
        check_task(network, info.task)
        options["task"] = info.task  # for readers of the run's folder
    if not isinstance(recipe, Recipe):
        recipe = Recipe.preset(recipe or network.recipe)
    recipe = recipe.replace(**with_short_warmup(recipe, recipe_fields or {}))
    return TrainingConfig(str(data), network, recipe, **options)


def check_task(network: ModelConfig, task: str) -> None:
    """Checks that a network supports a task.

    Raises:
        ValueError: instance or panoptic segmentation with a network for semantic segmentation.
    """
    if task not in ("", *MODELS[network.model_type].tasks):
        raise ValueError(f"task={task!r}: a {network.model_type} does semantic segmentation only")


def with_short_warmup(recipe: Recipe, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Changes to a recipe; a change of "steps" limits warm-up to a tenth of the steps unless that changes, too."""
    if "steps" not in changes:
        return dict(changes)
    most = changes["steps"] // WARMUP_PART
    names = ("warmup_steps", "backbone_warmup_steps")
    return {**{name: min(getattr(recipe, name), most) for name in names}, **changes}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
