"""Creates networks by name, from the presets of all families, and loads saved networks of any family."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from fastmask.models import eomt, mask2former, maskformer, per_pixel, segmenter, sound
from fastmask.models._base import PretrainedModel
from fastmask.models._configuration import ModelConfig, read_config
from fastmask.models.eomt import EoMT
from fastmask.models.mask2former import Mask2Former
from fastmask.models.maskformer import MaskFormer
from fastmask.models.per_pixel import PerPixelBaseline
from fastmask.models.segmenter import Segmenter
from fastmask.models.sound import SoundEventDetector
from fastmask.models.weight_files import CONFIG_FILE, WEIGHTS_FILE, listed

MODELS: dict[str, type[PretrainedModel]] = {
    model.config_class.model_type: model
    for model in (MaskFormer, Mask2Former, EoMT, Segmenter, PerPixelBaseline, SoundEventDetector)
}
# The subfolders of a training run that hold a network, the preferred one first.
SAVED_IN_RUN = ("best", "model")
DEFAULT_FAMILY = "maskformer"
LARGEST_BYTE = 255
# The presets of each family. A name in several families gets the family's name as a prefix.
FAMILIES = {
    DEFAULT_FAMILY: (MaskFormer, maskformer.PRESETS),
    "mask2former": (Mask2Former, mask2former.PRESETS),
    "eomt": (EoMT, eomt.PRESETS),
    "segmenter": (Segmenter, segmenter.PRESETS),
    "per-pixel": (PerPixelBaseline, per_pixel.PRESETS),
    "sound": (SoundEventDetector, sound.PRESETS),
}
SHARED_NAMES = ("tiny", "base")
_PRESETS = {
    f"{family}-{name}" if name in SHARED_NAMES else name: (model, name)
    for family, (model, presets) in FAMILIES.items()
    for name in presets
}


def preset_names() -> list[str]:
    """The names that :func:`make_model` knows; "tiny" also stands for "maskformer-tiny"."""
    return list(_PRESETS)


def make_config(
    name: str,
    num_classes: int | None = None,
    *,
    class_names: Sequence[str] = (),
    stuff_classes: Sequence[int] = (),
    **overrides: Any,
) -> ModelConfig:
    """The configuration of a preset of any family.

    Args:
        name: one of :func:`preset_names`, or "tiny" for "maskformer-tiny".
        num_classes: K; by default the number of ``class_names``.
        class_names: one name for each class, or none.
        stuff_classes: the classes that are stuff; ignored by families that do not distinguish things and stuff.
        overrides: fields to change.

    Raises:
        ValueError: an unknown name (the message lists the known ones), or a value out of range.
        TypeError: neither ``num_classes`` nor ``class_names``, a field that the family does not have, or a value of the
            wrong type.
    """
    model, own_name = _find_preset(name)
    if num_classes is None and not class_names:
        raise TypeError("num_classes or class_names must be given")
    known = {f.name for f in fields(model.config_class)}
    unknown = sorted(set(overrides) - known)
    if unknown:
        raise TypeError(f"a {model.__name__} has no {', '.join(unknown)}; its fields are {', '.join(sorted(known))}")
    if "stuff_classes" in known:
        overrides["stuff_classes"] = tuple(stuff_classes)
    num_classes = len(class_names) if num_classes is None else num_classes
    if "ignore_index" in known and num_classes > LARGEST_BYTE:
        overrides.setdefault("ignore_index", -1)  # the default, 255, is a class
    return model.config_class.preset(own_name, num_classes, class_names=tuple(class_names), **overrides)


def make_model(name: str, num_classes: int | None = None, **options: Any) -> PretrainedModel:
    """Creates a network with random weights from a preset of any family.

    Args:
        name, num_classes: as for :func:`make_config`.
        options: further arguments of :func:`make_config`, and those of the network's constructor:
            ``pretrained_backbone``, and modules such as ``backbone`` or ``frame_encoder``.

    Raises:
        TypeError, ValueError: as for :func:`make_config` and the network's constructor.
    """
    model, _ = _find_preset(name)
    modules = _split_modules(model, options)
    return model(make_config(name, num_classes, **options), **modules)


def load_model(folder: str | Path, **options: Any) -> PretrainedModel:
    """Loads a network of any family from a folder that ``save_pretrained`` wrote, or from the folder of a training run.

    Args:
        folder: as for :func:`model_folder`.
        options: arguments of :meth:`fastmask.models._base.PretrainedModel.from_pretrained`, such as modules that the
            network was built with.

    Raises:
        FileNotFoundError: no such folder, or no network in it.
        ValueError: a file is unreadable, belongs to no known network or does not fit the others; the message names it.
    """
    folder = model_folder(folder)
    return saved_type(folder).from_pretrained(folder, **options)


def model_folder(path: str | Path) -> Path:
    """The folder that holds the network: ``path`` itself or, for a training run, its subfolder "best" or else "model".

    Raises:
        FileNotFoundError: no such folder, or no network in it.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"no folder {path}")
    for folder in (path, *(path / name for name in SAVED_IN_RUN)):
        if (folder / WEIGHTS_FILE).is_file():
            return folder
    content = sorted(file.name for file in path.iterdir())
    raise FileNotFoundError(
        f"{path} has no {WEIGHTS_FILE}, and neither has {' or '.join(SAVED_IN_RUN)} in it; it holds "
        f"{listed(content) or 'nothing'}"
    )


def load_config(folder: str | Path) -> ModelConfig:
    """The configuration of the network that :func:`load_model` reads.

    Raises:
        FileNotFoundError, ValueError: as for :func:`load_model`.
    """
    folder = model_folder(folder)
    return saved_type(folder).config_class.load(folder / CONFIG_FILE)


def task_of_run(path: str | Path) -> str | None:
    """The task of the training run in a folder, such as "panoptic", if its config.json has one; None for a network's
    own folder.

    Raises:
        FileNotFoundError: no such folder, or no network in it.
        ValueError: the run's config.json is not JSON.
    """
    config = Path(path) / CONFIG_FILE
    if model_folder(path) == Path(path) or not config.is_file():
        return None
    return read_config(config).get("task") or None


def saved_type(folder: str | Path) -> type[PretrainedModel]:
    """The class of the network that a folder holds, by its config.json. In files without a "type", which earlier
    versions wrote, the fields decide.

    Raises:
        FileNotFoundError: no config.json.
        ValueError: the file is not JSON or belongs to no known network; the message names it.
    """
    path = Path(folder) / CONFIG_FILE
    values = read_config(path)
    try:
        return _type_of(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def model_to_dict(model: PretrainedModel | ModelConfig) -> dict[str, Any]:
    """A network's configuration in JSON's types: its "type", a key of ``MODELS``, and all fields."""
    return (model if isinstance(model, ModelConfig) else model.config).to_dict()


def config_from_dict(values: Mapping[str, Any]) -> ModelConfig:
    """The configuration from which :func:`model_to_dict` made the dict.

    Raises:
        TypeError, ValueError: an unknown type, or keys or values that do not fit its configuration.
    """
    return _type_of(values).config_class.from_dict(values)


def model_from_dict(values: Mapping[str, Any], **modules: Any) -> PretrainedModel:
    """Creates a network with random weights from a configuration that :func:`model_to_dict` wrote.

    Args:
        values: "type" and fields.
        modules: arguments of the network's constructor other than its configuration.

    Raises:
        TypeError, ValueError: as for :func:`config_from_dict`.
    """
    return _type_of(values)(config_from_dict(values), **modules)


def _find_preset(name: str) -> tuple[type[PretrainedModel], str]:
    full_name = f"{DEFAULT_FAMILY}-{name}" if name in SHARED_NAMES else name
    if full_name not in _PRESETS:
        raise ValueError(f"unknown model {name!r}; known are {', '.join(_PRESETS)}")
    return _PRESETS[full_name]


def _split_modules(model: type[PretrainedModel], options: dict[str, Any]) -> dict[str, Any]:
    """Removes the constructor's arguments from ``options`` and returns them; those that are also fields only if they
    are modules.
    """
    of_config = {f.name for f in fields(model.config_class)}
    of_constructor = set(inspect.signature(model).parameters) - {"config", "options"}
    taken = [
        name
        for name, value in options.items()
        if name in of_constructor and (name not in of_config or isinstance(value, nn.Module))
    ]
    return {name: options.pop(name) for name in taken}


def _type_of(values: Mapping[str, Any]) -> type[PretrainedModel]:
    if "type" in values:
        if values["type"] not in MODELS:
            raise ValueError(f"type is {values['type']!r}; expected one of {', '.join(MODELS)}")
        return MODELS[values["type"]]
    if "model_type" in values:
        raise ValueError(
            f"this is a configuration of transformers, of model type {values['model_type']!r}; fastmask convert reads "
            "those of 'maskformer', 'mask2former', 'eomt' and 'eomt_dinov3'"
        )
    for model in MODELS.values():
        if set(values) <= {f.name for f in fields(model.config_class)}:
            return model
    raise ValueError(f"these are not the fields of a {' or '.join(MODELS)}, and no type says which it is")
