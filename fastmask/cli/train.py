"""``fastmask train``: a network from a data set."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from fastmask.training import TrainingConfig

DATA, NETWORK, RUN, MACHINE = "Data", "Network and recipe", "Run", "Machine"


def train(
    output: Annotated[Path, typer.Option("--output", "-o", help="The run's folder.", rich_help_panel=RUN)],
    data: Annotated[
        str,
        typer.Option(
            help="The data set: its folder, a pattern of shards, composed:scenes or composed:icons-K. To begin a run.",
            rich_help_panel=DATA,
        ),
    ] = "",
    model: Annotated[
        str,
        typer.Option(
            help="A network by name, such as maskformer-swin-tiny; an unknown one lists all.", rich_help_panel=NETWORK
        ),
    ] = "",
    recipe: Annotated[
        str,
        typer.Option(
            help="A recipe by name; an unknown one lists all. By default that of the network's paper, or finetune.",
            rich_help_panel=NETWORK,
        ),
    ] = "",
    pretrained: Annotated[
        str | None, typer.Option(help="The folder of a network to start from, or of a run.", rich_help_panel=NETWORK)
    ] = None,
    pretrained_backbone: Annotated[
        str | None,
        typer.Option(
            help="Weights of the backbone: a folder or hub id of transformers, or imagenet for EfficientNet.",
            rich_help_panel=NETWORK,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Of the optimizer, by default as the recipe says; warm-up takes a tenth at most.",
            rich_help_panel=NETWORK,
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Images of a step, on all devices together; the recipe's.", rich_help_panel=NETWORK),
    ] = None,
    ema: Annotated[
        float | None,
        typer.Option(
            help="Evaluate and save an exponential moving average of the weights, with this decay, such as 0.999.",
            rich_help_panel=NETWORK,
        ),
    ] = None,
    lr: Annotated[float | None, typer.Option(help="The learning rate; the recipe's.", rich_help_panel=NETWORK)] = None,
    crop: Annotated[
        tuple[int, int] | None,
        typer.Option(help="Height and width of training images, in pixels; the recipe's.", rich_help_panel=NETWORK),
    ] = None,
    short_side: Annotated[
        int | None,
        typer.Option(
            min=1, help="Shorter side of an image at scale 1, in pixels; with --crop its own.", rich_help_panel=NETWORK
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help="semantic, panoptic or instance; by default the data set's own.", rich_help_panel=DATA),
    ] = None,
    kind: Annotated[
        str | None, typer.Option(help="The data set's layout; found out by default.", rich_help_panel=DATA)
    ] = None,
    skip_invalid: Annotated[
        bool | None,
        typer.Option(
            "--skip-invalid",
            help="Leave out invalid polygons of COCO instances and say how many.",
            rich_help_panel=DATA,
        ),
    ] = None,
    train_split: Annotated[str | None, typer.Option(help="What to train on (train).", rich_help_panel=DATA)] = None,
    val_split: Annotated[
        str | None, typer.Option(help='What to evaluate on (val); "" for nothing.', rich_help_panel=DATA)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of weights, order and augmentation (0).", rich_help_panel=RUN)
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="float32 (the default), bfloat16 or float16.", rich_help_panel=MACHINE)
    ] = None,
    accumulate: Annotated[
        int | None,
        typer.Option(min=1, help="Parts of a step's batch, one after the other (1).", rich_help_panel=MACHINE),
    ] = None,
    strategy: Annotated[
        str | None, typer.Option(help="With torchrun: ddp (the default) or fsdp.", rich_help_panel=MACHINE)
    ] = None,
    activation_checkpointing: Annotated[
        bool | None,
        typer.Option(help="Less memory for a third to a half more time.", rich_help_panel=MACHINE),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes that read images (2).", rich_help_panel=MACHINE)
    ] = None,
    device: Annotated[
        str, typer.Option(help="Such as cpu; a GPU by default if there is one.", rich_help_panel=MACHINE)
    ] = "",
    log: Annotated[
        str | None,
        typer.Option(help="Where numbers go: tensorboard (the default), wandb, trackio or none.", rich_help_panel=RUN),
    ] = None,
    log_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between two lines of the log (20).", rich_help_panel=RUN)
    ] = None,
    eval_every: Annotated[
        int | None,
        typer.Option(min=0, help="Steps between two evaluations (1000); 0 for the end alone.", rich_help_panel=RUN),
    ] = None,
    checkpoint_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between two checkpoints (500).", rich_help_panel=RUN)
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="A run's config.json, to begin the same run; options override it.", rich_help_panel=RUN),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Any field of config.json, as recipe.weight_decay=0.01 or model.num_queries=50; repeatable.",
            rich_help_panel=RUN,
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in the folder.", rich_help_panel=RUN)
    ] = False,
) -> None:
    """Train a network on a data set.

    Ctrl-C saves and stops; --resume goes on. torchrun -m fastmask train ... trains on several devices.
    """
    from fastmask import training
    from fastmask.training.run_folder import RunFolder

    fields = {
        "task": task,
        "kind": kind,
        "skip_invalid": skip_invalid,
        "train_split": train_split,
        "val_split": val_split,
        "pretrained": pretrained,
        "pretrained_backbone": pretrained_backbone,
        "seed": seed,
        "precision": precision,
        "accumulate": accumulate,
        "strategy": strategy,
        "activation_checkpointing": activation_checkpointing,
        "workers": workers,
        "log": log,
        "log_every": log_every,
        "eval_every": eval_every,
        "checkpoint_every": checkpoint_every,
    }
    if crop is not None and short_side is None:
        short_side = min(crop)
    recipe_fields = {
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": lr,
        "ema": ema,
        "crop": crop,
        "short_side": short_side,
    }
    own = RunFolder(output).config
    source = config or (own if resume and own.is_file() else None)
    run = None
    if source is not None or data:
        run = _configuration(source, data, model, recipe, _given(fields), _given(recipe_fields), settings or [])
    elif not resume:
        raise ValueError("--data is missing: a folder or composed:scenes (or --config, or --resume)")
    try:
        training.train(run, output, resume=resume, device=device or None)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _configuration(
    source: Path | None,
    data: str,
    model: str,
    recipe: str,
    fields: Mapping[str, Any],
    recipe_fields: Mapping[str, Any],
    settings: Sequence[str],
) -> TrainingConfig:
    """The configuration of a file, or that of names, with what the options say instead."""
    from fastmask.training import Recipe, TrainingConfig, make_training_config

    if source is None:
        if not (model or fields.get("pretrained")):
            raise ValueError("--model is missing (or --pretrained, the folder of a network)")
        config = make_training_config(data, model, recipe, **fields)
    else:
        config = TrainingConfig.load(source).replace(**({"data": data} if data else {}), **fields)
        if model:
            places = {name: getattr(config, name) for name in ("kind", "task", "skip_invalid", "train_split")}
            config = config.replace(model=make_training_config(config.data, model, config.recipe, **places).model)
        if recipe:
            config = config.replace(recipe=Recipe.preset(recipe))
    return _with_settings(config, recipe_fields, settings)


def _with_settings(config: TrainingConfig, recipe_fields: Mapping[str, Any], settings: Sequence[str]) -> TrainingConfig:
    """The configuration with fields of its recipe, and then fields by their paths, set together: what one rules out may
    be what another allows. Values of settings are JSON, or strings where they are not.
    """
    from fastmask.training.config import with_short_warmup

    values = config.to_dict()
    values["recipe"] |= with_short_warmup(config.recipe, recipe_fields)
    for setting in settings:
        path, equals, text = setting.partition("=")
        *folders, name = path.split(".")
        place: Any = values
        for folder in folders:
            place = place.get(folder) if isinstance(place, dict) else None
        known = isinstance(place, dict) and (name in place or "backbone_options" in folders)
        if not equals or not known:
            raise ValueError(
                f"--set {setting}: expected KEY=VALUE with a field of config.json, such as recipe.steps=1000"
            )
        try:
            place[name] = json.loads(text)
        except json.JSONDecodeError:
            place[name] = text
    return type(config).from_dict(values)


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
