"""A whole run of training as one JSON file: data, network, recipe, precision and intervals."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fastmask.data import open_dataset
from fastmask.data.open import COMPOSED_SCENES
from fastmask.data.sample import TASKS
from fastmask.data.shards import is_url
from fastmask.models import efficientnet
from fastmask.models._configuration import ModelConfig, PlainConfig, require
from fastmask.models._registry import config_from_dict, load_config, make_config
from fastmask.models.maskformer import MaskFormerConfig
from fastmask.models.precision import PRECISIONS
from fastmask.models.segmenter import SegmenterConfig
from fastmask.training.distributed import STRATEGIES
from fastmask.training.recipe import Recipe

# What may change between a run and its continuation: it decides how fast and how often, not what is learned. The
# micro-batches follow from how many processes there are, and so they may change with these.
CHANGEABLE = ("accumulate", "workers", "strategy", "activation_checkpointing", "log_every", "eval_every")
CHANGEABLE += ("checkpoint_every",)
WARMUP_PART = 10  # of the steps that are asked for, what warm-up takes at most
SMALL_BACKBONES = ("tiny", efficientnet.NAME)


@dataclass(frozen=True)
class TrainingConfig(PlainConfig):
    """Everything that decides a run of :func:`fastmask.training.train`, except the machine.

    Args:
        data: the data set's folder or shards, kept as an absolute path, or "composed:scenes".
        model: the network, with the data set's classes; a configuration or what ``to_dict`` of one gives.
        recipe: optimizer, schedule, steps, batch and augmentation; a :class:`Recipe` or what its ``to_dict`` gives.
        kind: the data set's layout, see :func:`fastmask.data.open_dataset`.
        task: "semantic", "panoptic" or "instance", of which networks other than MaskFormer have the first alone; "" for
            the data set's own.
        skip_invalid: leave out invalid polygons, see :func:`fastmask.data.open_dataset`.
        train_split: what to train on.
        val_split: what to evaluate on; "" for no evaluation.
        pretrained: a folder with a network of the same kind to start from; weights of classes start at random where
            their number differs; kept as an absolute path. "" for none.
        pretrained_backbone: what the network's constructor takes by this name; "" for none.
        seed: of weights, order, augmentation and dropout; not negative.
        precision: "float32", "bfloat16" or "float16", see :class:`fastmask.training.Trainer`.
        accumulate: micro-batches of a step.
        workers: processes that read data, for each process that trains; 0 to read in these.
        strategy: of several processes, "ddp" or "fsdp".
        activation_checkpointing: compute activations again in the backward pass, to save memory.
        log_every: steps between two lines of the log.
        eval_every: steps between two evaluations; 0 for one at the end.
        checkpoint_every: steps between two checkpoints.

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
            if (path := getattr(self, name)) not in ("", COMPOSED_SCENES) and not is_url(path):
                object.__setattr__(self, name, os.path.abspath(path))  # a run may be resumed from another place
        require(self.train_split != "", "train_split", "''", "the name of a split")
        segments = hasattr(self.model, "pixel_mean")
        require(segments, "model", type(self.model).__name__, "the configuration of a network that segments images")
        check_task(self.model, self.task)
        for name, choices in (("precision", PRECISIONS), ("strategy", STRATEGIES), ("task", ("", *TASKS))):
            value = getattr(self, name)
            require(value in choices, name, repr(value), f"one of {', '.join(map(repr, choices))}")
        self.require_at_least(0, "seed", "workers", "eval_every")
        self.require_at_least(1, "accumulate", "log_every", "checkpoint_every")
        even = self.recipe.batch_size % self.accumulate == 0
        require(even, "accumulate", self.accumulate, f"a divisor of the recipe's batch_size {self.recipe.batch_size}")

    def to_dict(self) -> dict[str, Any]:
        """Every field, as JSON knows them."""
        return {**super().to_dict(), "model": self.model.to_dict(), "recipe": self.recipe.to_dict()}

    def fixed_differences(self, other: TrainingConfig) -> list[str]:
        """The fields, as "recipe.steps", in which another configuration describes another run."""
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
    """A configuration from a data set, whose classes become the network's, and from the names of presets. Pixels
    without a label count in no loss; MaskFormer's authors have them as background of every mask, for which
    ``model_fields`` is {"ignore_void": False}.

    Args:
        data: as for :class:`TrainingConfig`.
        model: a preset of :func:`fastmask.models.make_model`; "" for the network in the folder ``pretrained``.
        recipe: a :class:`Recipe` or the name of one; "" for the recipe of the network's paper.
        model_fields: fields of the network's configuration to set otherwise.
        recipe_fields: fields of the recipe to set otherwise; "steps" limit warm-up to a tenth of them.
        options: further fields of :class:`TrainingConfig`; ``task`` is the data set's own if it is not among them, or
            "semantic" if that is panoptic and the network does semantic segmentation only.

    Raises:
        FileNotFoundError: no data set, or no folder ``pretrained``.
        TypeError: an unknown field, or neither a model nor ``pretrained``.
        ValueError: an unknown preset, a value out of range, or a task that network or data set do not have.
    """
    unknown = sorted(set(options) - {f.name for f in fields(TrainingConfig)})
    if unknown:
        raise TypeError(f"a TrainingConfig has no {', '.join(unknown)}")
    split = options.get("train_split", "train")
    skip = options.get("skip_invalid", False)
    info = open_dataset(data, split, options.get("kind", "auto"), options.get("task") or None, skip_invalid=skip).info
    classes = {"class_names": info.class_names, "stuff_classes": info.stuff_classes}
    if model:
        network = make_config(model, **classes, **(model_fields or {}))
    elif options.get("pretrained"):
        network = load_config(options["pretrained"])
        known = {f.name for f in fields(network)}
        classes["ignore_index"] = info.ignore_index
        network = network.replace(
            num_classes=info.num_classes,
            **{name: value for name, value in classes.items() if name in known},
            **(model_fields or {}),
        )
    else:
        raise TypeError("model must be given, or pretrained, a folder with a network")
    if isinstance(network, MaskFormerConfig) and "ignore_void" not in (model_fields or {}):
        network = network.replace(ignore_void=True)  # what is not labeled teaches nothing
    if info.task == "panoptic" and not options.get("task") and not isinstance(network, MaskFormerConfig):
        options["task"] = "semantic"  # which panoptic truth holds
    else:
        check_task(network, info.task)
        options["task"] = info.task  # so that what reads the run's folder knows what it was for
    if not isinstance(recipe, Recipe):
        recipe = Recipe.preset(recipe or default_recipe(network))
    recipe = recipe.replace(**with_short_warmup(recipe, recipe_fields or {}))
    return TrainingConfig(str(data), network, recipe, **options)


def check_task(network: ModelConfig, task: str) -> None:
    """Refuses what a network cannot learn.

    Raises:
        ValueError: instances or panoptic segments for a network that gives each pixel a class and no more.
    """
    if task not in ("", "semantic") and not isinstance(network, MaskFormerConfig):
        raise ValueError(f"task={task!r}: a {network.model_type} does semantic segmentation only")


def with_short_warmup(recipe: Recipe, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Changes to a recipe, in which "steps" alone leave a tenth of them at most to warm-up."""
    if "steps" not in changes:
        return dict(changes)
    return {"warmup_steps": min(recipe.warmup_steps, changes["steps"] // WARMUP_PART), **changes}


def default_recipe(model: ModelConfig) -> str:
    """The name of the recipe with which a network's paper trains it on ADE20K; "finetune" for the small networks that
    are in no paper.
    """
    backbone = getattr(model, "backbone", "")
    if backbone in SMALL_BACKBONES:
        return "finetune"
    if isinstance(model, SegmenterConfig):
        return "segmenter-ade20k"
    if getattr(model, "masked_attention", False):
        return "mask2former-ade20k"
    return "maskformer-ade20k-swin" if backbone.startswith("swin") else "maskformer-ade20k"


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
