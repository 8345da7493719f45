"""What all configurations share, as plain data that is checked, replaced and kept as JSON; then what networks share."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from fastmask.models import efficientnet

Config = TypeVar("Config", bound="PlainConfig")

CUSTOM_BACKBONE = "custom"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class PlainConfig:
    """Base of frozen dataclasses of plain data. It checks the types of all fields, and keeps them as JSON. A field that
    is such a dataclass itself has been checked already.
    """

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if not isinstance(value, PlainConfig):
                object.__setattr__(self, f.name, _checked(f.name, f.type, value))

    def require_at_least(self, least: int, *names: str) -> None:
        """Refuses fields of these names that are smaller.

        Raises:
            ValueError: a smaller one; the message names it.
        """
        for name in names:
            require(getattr(self, name) >= least, name, getattr(self, name), f"at least {least}")

    def replace(self: Config, **changes: Any) -> Config:
        """The same configuration with some fields changed."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Every field, as JSON knows them: tuples become lists."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
        """The inverse of :meth:`to_dict`. A field with a default may be missing.

        Raises:
            ValueError: keys that are unknown or missing; the message names them.
        """
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        required = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
        missing = [name for name in required if name not in values]
        problems = [f"unknown keys {', '.join(unknown)}"] if unknown else []
        problems += [f"missing keys {', '.join(missing)}"] if missing else []
        if problems:
            raise ValueError(f"not a {cls.__name__}: {'; '.join(problems)}")
        return cls(**values)

    def save(self, path: str | Path) -> None:
        """Writes the configuration as a JSON file."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls: type[Config], path: str | Path) -> Config:
        """Reads what :meth:`save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is not JSON, or its keys are not those of a configuration; the message names the file.
        """
        values = read_json(path)
        try:
            return cls.from_dict(values)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{path}: {error}") from error

    @classmethod
    def _from_preset(
        cls: type[Config], presets: Mapping[str, Mapping[str, Any]], name: str, overrides: Mapping[str, Any]
    ) -> Config:
        if name not in presets:
            raise ValueError(f"unknown preset {name!r}; known are {', '.join(presets)}")
        return cls(**{**presets[name], **overrides})


class ModelConfig(PlainConfig):
    """Base of the frozen dataclasses that networks are built from. Kept as JSON, they say which network is theirs."""

    # The network's name: "type" in the JSON.
    model_type: ClassVar[str]

    num_classes: int
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(1, "num_classes")
        require(
            len(self.class_names) in (0, self.num_classes),
            "class_names",
            f"{len(self.class_names)} names",
            f"{self.num_classes} (num_classes) or none",
        )

    def to_dict(self) -> dict[str, Any]:
        """The network's "type", and every field as JSON knows them: tuples become lists."""
        return {"type": self.model_type, **super().to_dict()}

    @classmethod
    def from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
        """The inverse of :meth:`to_dict`. The type, and a field with a default, may be missing.

        Raises:
            ValueError: another network's type, or keys that are unknown or missing; the message names them.
        """
        kind = values.get("type", cls.model_type)
        require(kind == cls.model_type, "type", repr(kind), f"{cls.model_type!r}, as for every {cls.__name__}")
        return super().from_dict({name: value for name, value in values.items() if name != "type"})

    def require_outside_classes(self, name: str) -> None:
        """Refuses a field that should mark the absence of a class and is a class.

        Raises:
            ValueError: it lies in ``0..K-1``.
        """
        value = getattr(self, name)
        require(not 0 <= value < self.num_classes, name, value, f"outside of the classes 0..{self.num_classes - 1}")


class ImageModelConfig(ModelConfig):
    """Base of the configurations of networks that segment images."""

    pixel_mean: tuple[float, ...]
    pixel_std: tuple[float, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.pixel_mean) >= 1, "pixel_mean", self.pixel_mean, "one value a channel")
        require(
            len(self.pixel_std) == len(self.pixel_mean) and min(self.pixel_std) > 0,
            "pixel_std",
            self.pixel_std,
            f"{len(self.pixel_mean)} positive values, as many as pixel_mean",
        )


class PixelDecoderConfig(ImageModelConfig):
    """Base of the configurations of networks with a backbone, a pixel decoder and a transformer decoder."""

    backbone: str
    backbone_options: Mapping[str, Any]
    hidden_dim: int
    mask_dim: int
    pixel_decoder_dim: int
    encoder_layers: int
    decoder_layers: int
    num_heads: int
    feedforward_dim: int
    dropout: float
    size_divisibility: int

    def __post_init__(self) -> None:
        for name, values in pixel_statistics(self.backbone).items():
            if not getattr(self, name):
                object.__setattr__(self, name, values)
        super().__post_init__()
        self.require_at_least(1, "hidden_dim", "mask_dim", "pixel_decoder_dim", "decoder_layers", "num_heads")
        self.require_at_least(1, "feedforward_dim", "size_divisibility")
        self.require_at_least(0, "encoder_layers")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "in [0, 1)")
        require(self.pixel_decoder_dim % 32 == 0, "pixel_decoder_dim", self.pixel_decoder_dim, "a multiple of 32")
        multiple = math.lcm(4, self.num_heads)
        for name in ["hidden_dim", *(["pixel_decoder_dim"] if self.encoder_layers else [])]:
            require(getattr(self, name) % multiple == 0, name, getattr(self, name), f"a multiple of {multiple}")


def pixel_statistics(backbone: str) -> dict[str, tuple[float, ...]]:
    """The pixel statistics of a backbone's pretrained weights: ImageNet's, or those of EfficientNet-lite0."""
    if backbone == efficientnet.NAME:
        return {"pixel_mean": efficientnet.PIXEL_MEAN, "pixel_std": efficientnet.PIXEL_STD}
    return {"pixel_mean": IMAGENET_MEAN, "pixel_std": IMAGENET_STD}


def read_json(path: str | Path) -> dict[str, Any]:
    """What a configuration's file holds.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not JSON, or no object; the message names it.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; expected a configuration's keys")
    return values


def require(holds: bool, name: str, value: Any, expected: str) -> None:
    """Raises the ValueError of a field out of range unless ``holds``."""
    if not holds:
        raise ValueError(f"{name} is {value}; expected {expected}")


def _checked(name: str, annotation: str, value: Any) -> Any:
    """The value in its field's own type, from any type that JSON or a caller may reasonably use for it."""
    if annotation.startswith("tuple"):
        item = annotation.removeprefix("tuple[").partition(",")[0]
        if not isinstance(value, list | tuple):
            raise TypeError(f"{name} must be a list or tuple of {item}, got {type(value).__name__}")
        return tuple(_checked(f"{name}[{i}]", item, v) for i, v in enumerate(value))
    if annotation.startswith("Mapping"):
        if not isinstance(value, Mapping):
            raise TypeError(f"{name} must be a dict, got {type(value).__name__}")
        try:
            return json.loads(json.dumps(dict(value)))
        except TypeError as error:
            raise TypeError(f"{name} must hold JSON values only: {error}") from error
    kinds = {"int": int, "float": (int, float), "bool": bool, "str": str}[annotation]
    if not isinstance(value, kinds) or (isinstance(value, bool) and annotation != "bool"):
        raise TypeError(f"{name} must be of type {annotation}, got {value!r}")
    return float(value) if annotation == "float" else value
