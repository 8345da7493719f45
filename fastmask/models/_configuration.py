"""Configurations: plain data with checked types and ranges, saved as JSON files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from fastmask.files import read_json
from fastmask.models import efficientnet

if TYPE_CHECKING:
    from typing_extensions import Self

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SMALL_BACKBONES = ("tiny", efficientnet.NAME)


@dataclass(frozen=True)
class PlainConfig:
    """Base class of frozen dataclasses of plain data. It checks the types of all fields, and writes and reads them as
    JSON. A field that is itself such a dataclass is not checked again.
    """

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if not isinstance(value, PlainConfig):
                object.__setattr__(self, f.name, _checked(f.name, str(f.type), value))

    def require_at_least(self, minimum: int, *names: str) -> None:
        """Checks that the fields of these names are at least ``minimum``.

        Raises:
            ValueError: a field is smaller; the message names it.
        """
        for name in names:
            require(getattr(self, name) >= minimum, name, getattr(self, name), f"at least {minimum}")

    def replace(self, **changes: Any) -> Self:
        """The same configuration with some fields changed."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """All fields, in JSON's types: tuples become lists."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_dict`. A field with a default may be missing.

        Raises:
            ValueError: keys are unknown or missing; the message names them.
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
    def load(cls, path: str | Path) -> Self:
        """Reads what :meth:`save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is not JSON, or its keys are not those of a configuration; the message names the file.
        """
        values = read_config(path)
        try:
            return cls.from_dict(values)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{path}: {error}") from error

    @classmethod
    def _from_preset(cls, presets: Mapping[str, Mapping[str, Any]], name: str, overrides: Mapping[str, Any]) -> Self:
        if name not in presets:
            raise ValueError(f"unknown preset {name!r}; known are {', '.join(presets)}")
        return cls(**{**presets[name], **overrides})


@dataclass(frozen=True)
class ModelConfig(PlainConfig):
    """Base class of the networks' configurations. Their JSON form names the network.

    Args:
        num_classes: K.
        class_names: one name for each class, or empty.
    """

    # The network's name: "type" in the JSON.
    model_type: ClassVar[str]
    # The fields of the configurations that :meth:`preset` knows, by name.
    presets: ClassVar[Mapping[str, Mapping[str, Any]]]

    num_classes: int
    class_names: tuple[str, ...] = field(default=(), kw_only=True)

    @property
    def recipe(self) -> str:
        """The name of the recipe that the network's paper uses for ADE20K; "finetune" if the network has no paper."""
        return "finetune"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(1, "num_classes")
        require(
            len(self.class_names) in (0, self.num_classes),
            "class_names",
            f"{len(self.class_names)} names",
            f"{self.num_classes} (num_classes) or none",
        )

    @classmethod
    def preset(cls, name: str, num_classes: int, **overrides: Any) -> Self:
        """The configuration of a preset.

        Args:
            name: one of ``presets``; "tiny" is for tests and demonstrations.
            num_classes: K.
            overrides: fields to change.

        Raises:
            ValueError: an unknown name; the message lists the known ones.
        """
        return cls._from_preset(cls.presets, name, {"num_classes": num_classes, **overrides})

    def to_dict(self) -> dict[str, Any]:
        """The network's "type" and all fields, in JSON's types: tuples become lists."""
        return {"type": self.model_type, **super().to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_dict`. The type, and fields with a default, may be missing.

        Raises:
            ValueError: the type is another network's, or keys are unknown or missing; the message names them.
        """
        kind = values.get("type", cls.model_type)
        require(kind == cls.model_type, "type", repr(kind), f"{cls.model_type!r}, as for every {cls.__name__}")
        return super().from_dict({name: value for name, value in values.items() if name != "type"})

    def require_outside_classes(self, name: str) -> None:
        """Checks that a field that marks pixels without a class is not a class itself.

        Raises:
            ValueError: the field lies in ``0..K-1``.
        """
        value = getattr(self, name)
        require(not 0 <= value < self.num_classes, name, value, f"outside of the classes 0..{self.num_classes - 1}")


@dataclass(frozen=True)
class PixelDecoderConfig(ModelConfig):
    """Base class of the configurations of networks with a backbone, a pixel decoder and a transformer decoder. The
    defaults are those of the ResNet-50 models in MaskFormer's paper (arXiv:2107.06278, section 4.1, and the authors'
    configuration files).

    Args:
        backbone: a name that :func:`fastmask.models.build_backbone` knows, or "custom" for a module of your own.
        backbone_options: fields of the backbone's ``transformers`` configuration to set, such as ``drop_path_rate``.
        hidden_dim: channels of the transformer decoder, a multiple of 4 and of ``num_heads``.
        mask_dim: channels of the pixel embeddings and of the mask embeddings, which are multiplied with each other.
        pixel_decoder_dim: channels of the feature pyramid, a multiple of 32; with encoder layers also of ``num_heads``.
        encoder_layers: transformer layers in the pixel decoder, on the coarsest map; the paper's panoptic models have
            6.
        decoder_layers: number of layers of the transformer decoder.
        num_heads: attention heads of the encoder and the decoder.
        feedforward_dim: hidden channels of the MLPs in the encoder and the decoder.
        dropout: dropout probability in the encoder and the decoder.
        deep_supervision: predict and supervise after each decoder layer instead of only after the last.
        size_divisibility: images are padded at the bottom and right to a multiple of this.
        pixel_mean: mean of each channel, subtracted from images in 0..1; by default the pretrained backbone's.
        pixel_std: standard deviation of each channel, which divides the difference; by default the pretrained
            backbone's.
    """

    backbone: str = "resnet50"
    backbone_options: Mapping[str, Any] = field(default_factory=dict)
    hidden_dim: int = 256
    mask_dim: int = 256
    pixel_decoder_dim: int = 256
    encoder_layers: int = 0
    decoder_layers: int = 6
    num_heads: int = 8
    feedforward_dim: int = 2048
    dropout: float = 0.1
    deep_supervision: bool = True
    size_divisibility: int = 32
    pixel_mean: tuple[float, ...] = ()
    pixel_std: tuple[float, ...] = ()

    @property
    def recipe(self) -> str:
        if self.backbone in SMALL_BACKBONES:
            return super().recipe
        return "maskformer-ade20k-swin" if self.backbone.startswith("swin") else "maskformer-ade20k"

    def __post_init__(self) -> None:
        for name, values in pixel_statistics(self.backbone).items():
            if not getattr(self, name):
                object.__setattr__(self, name, values)
        super().__post_init__()
        check_pixel_statistics(self.pixel_mean, self.pixel_std)
        self.require_at_least(1, "hidden_dim", "mask_dim", "pixel_decoder_dim", "decoder_layers", "num_heads")
        self.require_at_least(1, "feedforward_dim", "size_divisibility")
        self.require_at_least(0, "encoder_layers")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "in [0, 1)")
        require(self.pixel_decoder_dim % 32 == 0, "pixel_decoder_dim", self.pixel_decoder_dim, "a multiple of 32")
        multiple = math.lcm(4, self.num_heads)
        for name in ["hidden_dim", *(["pixel_decoder_dim"] if self.encoder_layers else [])]:
            require(getattr(self, name) % multiple == 0, name, getattr(self, name), f"a multiple of {multiple}")


# Fields that the "tiny" presets share.
TINY: dict[str, Any] = {
    "backbone": "tiny",
    "hidden_dim": 96,
    "mask_dim": 64,
    "pixel_decoder_dim": 64,
    "decoder_layers": 3,
    "num_heads": 4,
    "feedforward_dim": 256,
    "dropout": 0.0,
}


def pixel_statistics(backbone: str) -> dict[str, tuple[float, ...]]:
    """The pixel statistics of a backbone's pretrained weights: ImageNet's, or those of EfficientNet-lite0."""
    if backbone == efficientnet.NAME:
        return {"pixel_mean": efficientnet.PIXEL_MEAN, "pixel_std": efficientnet.PIXEL_STD}
    return {"pixel_mean": IMAGENET_MEAN, "pixel_std": IMAGENET_STD}


def check_pixel_statistics(mean: Sequence[float], std: Sequence[float]) -> None:
    """Checks that both have one value for each channel, and that the deviations are positive.

    Raises:
        ValueError: they do not.
    """
    require(len(mean) >= 1, "pixel_mean", mean, "one value for each channel")
    expected = f"{len(mean)} positive values, as many as pixel_mean"
    require(len(std) == len(mean) and min(std) > 0, "pixel_std", std, expected)


def read_config(path: str | Path) -> dict[str, Any]:
    """Reads the object in a configuration file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not JSON or does not hold an object; the message names it.
    """
    values = read_json(Path(path))
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; expected a configuration's keys")
    return values


def require(holds: bool, name: str, value: Any, expected: str) -> None:
    """Raises the ValueError for a field that is out of range, unless ``holds``."""
    if not holds:
        raise ValueError(f"{name} is {value}; expected {expected}")


def _checked(name: str, annotation: str, value: Any) -> Any:
    """The value in the type of its field, converted from the types that JSON or a caller may use instead."""
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
    if annotation == "float" and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    known = {"int": int, "float": float, "bool": bool, "str": str}[annotation]
    if not isinstance(value, known) or (isinstance(value, bool) and known is not bool):
        raise TypeError(f"{name} must be of type {annotation}, got {value!r}")
    return value
