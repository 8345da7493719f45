"""Checkpoints of Segmenter's authors: ``checkpoint.pth`` with the weights, ``variant.yml`` with the architecture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastmask.extras import extra
from fastmask.files import replace_files
from fastmask.integrations.checkpoints.names import rename, to_own
from fastmask.integrations.checkpoints.state_files import read_weights
from fastmask.models._configuration import IMAGENET_MEAN, IMAGENET_STD
from fastmask.models.segmenter import VIT_MEAN, VIT_STD, Segmenter, SegmenterConfig

WEIGHTS_FILE = "checkpoint.pth"
VARIANT_FILE = "variant.yml"
NORMALIZATIONS = {"vit": (VIT_MEAN, VIT_STD), "deit": (IMAGENET_MEAN, IMAGENET_STD)}
# The authors' code fixes these.
EXPANSION = 4
DECODER_HEAD_DIM = 64
IMAGENET_CLASSES = 1000
# Our names are theirs. Their encoder also carries the class heads of its ImageNet pretraining, which segmentation does
# not use.
RULES = [rename(r"(.*)", r"\1")]
IMAGENET_HEADS = r"encoder\.head(_dist)?\.(weight|bias)"
BY_CLASSES = r"decoder\.(cls_emb|mask_norm\.(weight|bias)|head\.(weight|bias))"
SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large"}
REQUIRED = ("d_model", "decoder", "image_size", "n_cls", "n_heads", "n_layers", "normalization", "patch_size")
OPTIONAL = ("backbone", "distilled", "dropout", "drop_path_rate")


def from_original_segmenter(
    path: str | Path,
    *,
    num_classes: int | None = None,
    ignore_mismatched_sizes: bool = False,
    prefix: str = "",
) -> Segmenter:
    """A model of ours with the weights of the authors' Segmenter.

    The class heads of ImageNet pretraining ("encoder.head", "encoder.head_dist") are left out: no pixel depends on
    them.

    Args:
        path: the folder of checkpoint.pth and variant.yml, or the first of the two. Nothing but tensors and plain
            values is unpickled, and nothing but plain values is read from YAML.
        num_classes: K of the model, if it is to differ from the checkpoint's.
        ignore_mismatched_sizes: allow that: weights that belong to classes start at random, with a warning.
        prefix: as for :func:`~fastmask.integrations.checkpoints.state_files.read_weights`.

    Returns:
        the model, on the CPU, in float32 and training mode.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file is unreadable or describes another network; keys are missing or unexpected; shapes differ.
            The message names them.
    """
    path = Path(path)
    if path.is_dir():
        path = path / WEIGHTS_FILE
    config = _read_variant(path.with_name(VARIANT_FILE))
    if num_classes is not None:
        config = config.replace(num_classes=num_classes)
    weights = read_weights(path, prefix)
    model = Segmenter(config)
    replaceable = BY_CLASSES if ignore_mismatched_sizes else ""
    own = to_own(weights, model.weights(), RULES, ignored=IMAGENET_HEADS, replaceable=replaceable, source=str(path))
    model.load_state_dict(own)
    return model


def save_original_segmenter(model: Segmenter, folder: str | Path) -> None:
    """Writes checkpoint.pth and variant.yml, as the authors' code reads them. An interruption leaves an earlier save as
    it was.

    Their code asks for the class heads of ImageNet pretraining, which our model does not have: they are written as
    zeros.

    Raises:
        ValueError: an architecture or normalization that their code cannot build; the message names the field.
    """
    with extra("models"):
        import yaml

    variant = _variant(model.config)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.weights().items()}
    for head in ("encoder.head", "encoder.head_dist")[: 2 if model.config.distilled else 1]:
        weights[f"{head}.weight"] = torch.zeros(IMAGENET_CLASSES, model.config.hidden_dim)
        weights[f"{head}.bias"] = torch.zeros(IMAGENET_CLASSES)
    replace_files(
        Path(folder),
        {
            WEIGHTS_FILE: lambda path: torch.save({"model": weights, "n_cls": model.config.num_classes}, path),
            VARIANT_FILE: lambda path: path.write_text(yaml.safe_dump(variant), encoding="utf-8"),
        },
    )


def _variant(config: SegmenterConfig) -> dict[str, Any]:
    """What variant.yml says of a configuration."""
    fixed = {"feedforward_dim": EXPANSION * config.hidden_dim}
    decoder: dict[str, Any] = {"name": "linear"}
    if config.decoder == "mask":
        fixed["decoder_heads"] = config.hidden_dim // DECODER_HEAD_DIM
        decoder = {
            "name": "mask_transformer",
            "n_layers": config.decoder_layers,
            "dropout": config.decoder_dropout,
            "drop_path_rate": config.decoder_drop_path,
        }
    for name, value in fixed.items():
        if getattr(config, name) != value:
            raise ValueError(f"{name} is {getattr(config, name)}; the authors' code builds {value} only")
    statistics = (config.pixel_mean, config.pixel_std)
    normalization = next((name for name, known in NORMALIZATIONS.items() if known == statistics), None)
    if normalization is None:
        raise ValueError(
            f"pixel_mean and pixel_std are {statistics[0]} and {statistics[1]}; the authors' code knows "
            + " or ".join(f"{mean} and {std} ({name})" for name, (mean, std) in NORMALIZATIONS.items())
        )
    family = "deit_{}_distilled" if config.distilled else "vit_{}"
    size = SIZES.get(config.hidden_dim, config.hidden_dim)
    window = {"window_size": config.window_size or max(config.image_size)}
    window["window_stride"] = config.window_stride if config.window_size else window["window_size"]
    return {
        "net_kwargs": {
            "backbone": f"{family.format(size)}_patch{config.patch_size}_384",
            "image_size": list(config.image_size),
            "patch_size": config.patch_size,
            "d_model": config.hidden_dim,
            "n_heads": config.num_heads,
            "n_layers": config.encoder_layers,
            "n_cls": config.num_classes,
            "normalization": normalization,
            "distilled": config.distilled,
            "dropout": config.dropout,
            "drop_path_rate": config.drop_path,
            "decoder": decoder,
        },
        "dataset_kwargs": {"normalization": normalization},
        "inference_kwargs": {"im_size": min(config.image_size), **window},
    }


def _read_variant(path: Path) -> SegmenterConfig:
    """The configuration that variant.yml describes."""
    with extra("models"):
        import yaml

    class Loader(yaml.SafeLoader):
        """Plain values and Python's tuples, as which the authors' code writes sizes."""

    Loader.add_constructor("tag:yaml.org,2002:python/tuple", Loader.construct_sequence)
    if not path.is_file():
        raise FileNotFoundError(f"no {path}; it describes the network of {WEIGHTS_FILE}")
    try:
        variant = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a YAML file of plain values: {error}") from error
    try:
        return _config(variant)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _config(variant: Any) -> SegmenterConfig:
    if not isinstance(variant, Mapping) or not isinstance(variant.get("net_kwargs"), Mapping):
        raise ValueError("no net_kwargs")
    net, decoder = variant["net_kwargs"], variant["net_kwargs"].get("decoder")
    _check_names("net_kwargs", net, REQUIRED, OPTIONAL)
    if not isinstance(decoder, Mapping) or "name" not in decoder:
        raise ValueError("net_kwargs.decoder has no name")
    if net["normalization"] not in NORMALIZATIONS:
        raise ValueError(f"normalization is {net['normalization']!r}; known are {', '.join(NORMALIZATIONS)}")
    options: dict[str, Any] = {}
    if decoder["name"] == "mask_transformer":
        _check_names("net_kwargs.decoder", decoder, ("name", "n_layers", "dropout", "drop_path_rate"), ("n_cls",))
        options = {
            "decoder": "mask",
            "decoder_layers": decoder["n_layers"],
            "decoder_heads": net["d_model"] // DECODER_HEAD_DIM,
            "decoder_dropout": decoder["dropout"],
            "decoder_drop_path": decoder["drop_path_rate"],
        }
    elif "linear" in decoder["name"]:
        _check_names("net_kwargs.decoder", decoder, ("name",), ("n_cls",))
        options = {"decoder": "linear"}
    else:
        raise ValueError(f"decoder is {decoder['name']!r}; known are mask_transformer and linear")
    inference = variant.get("inference_kwargs") or {}
    if "window_size" in inference:
        options["window_size"] = inference["window_size"]
        options["window_stride"] = inference.get("window_stride", inference["window_size"])
    else:
        options["window_size"] = options["window_stride"] = max(net["image_size"])
    mean, std = NORMALIZATIONS[net["normalization"]]
    return SegmenterConfig(
        net["n_cls"],
        image_size=tuple(net["image_size"]),
        patch_size=net["patch_size"],
        hidden_dim=net["d_model"],
        encoder_layers=net["n_layers"],
        num_heads=net["n_heads"],
        feedforward_dim=EXPANSION * net["d_model"],
        dropout=net.get("dropout", 0.1),
        drop_path=net.get("drop_path_rate", 0.0),
        distilled=net.get("distilled", False),
        pixel_mean=mean,
        pixel_std=std,
        **options,
    )


def _check_names(
    place: str, values: Mapping[str, Any], required: tuple[str, ...], optional: tuple[str, ...] = ()
) -> None:
    missing = [name for name in required if name not in values]
    unknown = sorted(str(name) for name in set(values) - set(required) - set(optional))
    problems = [f"missing keys: {', '.join(missing)}"] if missing else []
    problems += [f"unexpected keys: {', '.join(unknown)}"] if unknown else []
    if problems:
        raise ValueError(f"{place} has {'; '.join(problems)}")
