"""The one description of a MaskFormer: architecture, losses and classes, as plain data."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

CUSTOM_BACKBONE = "custom"
MATCHINGS = ("bipartite", "fixed")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class MaskFormerConfig:
    """Everything that :class:`fastmask.MaskFormer` is built from. The defaults are those of the paper's ResNet-50 model
    (arXiv:2107.06278, section 4.1, and the authors' configuration files).

    Args:
        num_classes: K, without "no object".
        backbone: a name that :func:`fastmask.models.build_backbone` knows, or "custom" for a module of your own.
        backbone_options: fields of the backbone's ``transformers`` configuration to set, such as ``drop_path_rate``.
        num_queries: N.
        hidden_dim: channels of the transformer decoder, a multiple of 4 and of ``num_heads``.
        mask_dim: channels of the pixel and mask embeddings.
        pixel_decoder_dim: channels of the feature pyramid, a multiple of 32 (of 4 and ``num_heads`` too with encoder).
        encoder_layers: transformer layers in the pixel decoder, on the coarsest map; the paper's panoptic models have
            6.
        masked_attention: the decoder of Mask2Former (arXiv:2112.01527, section 3.2) instead of MaskFormer's: queries
            attend where their masks are foreground, to the three coarsest maps of the feature pyramid in turn.
        decoder_layers: of the transformer decoder; with masked attention there is a prediction before the first, too.
        num_heads: attention heads of both transformers.
        feedforward_dim: hidden channels of their perceptrons.
        dropout: of both transformers.
        matching: "bipartite", or "fixed", with which query k answers for class k: as many queries as classes, targets
            merged by class (the comparison of the paper's section 4.3).
        deep_supervision: predict and supervise after each decoder layer instead of after the last alone.
        class_weight: weight of the classification loss.
        mask_weight: weight of the focal mask loss.
        dice_weight: weight of the dice loss.
        no_object_weight: weight of the "no object" class in the classification loss.
        class_cost: weight of the class probability in the matching cost.
        mask_cost: weight of the focal term in the matching cost.
        dice_cost: weight of the dice term in the matching cost.
        focal_alpha: alpha of the focal loss and cost.
        focal_gamma: gamma of the focal loss and cost.
        stuff_classes: the classes whose regions panoptic inference merges; all others are things.
        class_names: one name for each class, or empty.
        size_divisibility: images are padded at the bottom and right to a multiple of this.
        pixel_mean: per channel, subtracted from images in 0..1.
        pixel_std: per channel, divides what remains.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value out of range.
    """

    num_classes: int
    backbone: str = "resnet50"
    backbone_options: Mapping[str, Any] = field(default_factory=dict)
    num_queries: int = 100
    hidden_dim: int = 256
    mask_dim: int = 256
    pixel_decoder_dim: int = 256
    encoder_layers: int = 0
    masked_attention: bool = False
    decoder_layers: int = 6
    num_heads: int = 8
    feedforward_dim: int = 2048
    dropout: float = 0.1
    matching: str = "bipartite"
    deep_supervision: bool = True
    class_weight: float = 1.0
    mask_weight: float = 20.0
    dice_weight: float = 1.0
    no_object_weight: float = 0.1
    class_cost: float = 1.0
    mask_cost: float = 20.0
    dice_cost: float = 1.0
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0
    stuff_classes: tuple[int, ...] = ()
    class_names: tuple[str, ...] = ()
    size_divisibility: int = 32
    pixel_mean: tuple[float, ...] = IMAGENET_MEAN
    pixel_std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        for f in fields(self):
            object.__setattr__(self, f.name, _checked(f.name, f.type, getattr(self, f.name)))
        for name in ("num_queries", "hidden_dim", "mask_dim", "pixel_decoder_dim", "decoder_layers", "num_heads"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("num_classes", "feedforward_dim", "size_divisibility"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _require(self.encoder_layers >= 0, "encoder_layers", self.encoder_layers, "at least 0")
        _require(0 <= self.dropout < 1, "dropout", self.dropout, "in [0, 1)")
        _require(self.pixel_decoder_dim % 32 == 0, "pixel_decoder_dim", self.pixel_decoder_dim, "a multiple of 32")
        attention_dims = ["hidden_dim", *(["pixel_decoder_dim"] if self.encoder_layers else [])]
        for name in attention_dims:
            multiple = math.lcm(4, self.num_heads)
            _require(getattr(self, name) % multiple == 0, name, getattr(self, name), f"a multiple of {multiple}")
        for f in fields(self):
            if f.name.endswith(("_weight", "_cost")) or f.name.startswith("focal_"):
                value = getattr(self, f.name)
                _require(value >= 0 and math.isfinite(value), f.name, value, "finite and at least 0")
        _require(self.matching in MATCHINGS, "matching", repr(self.matching), f"one of {', '.join(MATCHINGS)}")
        if self.matching == "fixed":
            expected = f"{self.num_classes} (num_classes), as fixed matching needs"
            _require(self.num_queries == self.num_classes, "num_queries", self.num_queries, expected)
        wrong = [c for c in self.stuff_classes if not 0 <= c < self.num_classes]
        _require(not wrong, "stuff_classes", wrong, f"in 0..{self.num_classes - 1}")
        _require(
            len(self.class_names) in (0, self.num_classes),
            "class_names",
            f"{len(self.class_names)} names",
            f"{self.num_classes} (num_classes) or none",
        )
        _require(len(self.pixel_mean) >= 1, "pixel_mean", self.pixel_mean, "one value a channel")
        _require(
            len(self.pixel_std) == len(self.pixel_mean) and min(self.pixel_std) > 0,
            "pixel_std",
            self.pixel_std,
            f"{len(self.pixel_mean)} positive values, as many as pixel_mean",
        )

    @property
    def num_predictions(self) -> int:
        """L, how many predictions are supervised."""
        return self.decoder_layers + self.masked_attention if self.deep_supervision else 1

    @property
    def thing_classes(self) -> tuple[int, ...]:
        """The classes that are not stuff."""
        return tuple(c for c in range(self.num_classes) if c not in self.stuff_classes)

    @staticmethod
    def preset(name: str, num_classes: int, **overrides: Any) -> MaskFormerConfig:
        """A configuration by name: "tiny" for tests and demonstrations, or one of the paper's models.

        Args:
            name: "tiny", "maskformer-r50", "-r101", "-r101c", or "maskformer-swin-tiny", "-small", "-base", "-large".
            num_classes: K.
            overrides: fields to set otherwise.

        Raises:
            ValueError: an unknown name.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; known are {', '.join(PRESETS)}")
        return MaskFormerConfig(**{"num_classes": num_classes, **PRESETS[name], **overrides})

    def replace(self, **changes: Any) -> MaskFormerConfig:
        """The same configuration with some fields changed."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Every field, as JSON knows them: tuples become lists."""
        return json.loads(json.dumps(asdict(self)))

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> MaskFormerConfig:
        """The inverse of :meth:`to_dict`. A field with a default may be missing.

        Raises:
            ValueError: keys that are unknown or missing; the message names them.
        """
        names = [f.name for f in fields(MaskFormerConfig)]
        unknown, missing = sorted(set(values) - set(names)), [] if "num_classes" in values else ["num_classes"]
        problems = [f"unknown keys {', '.join(unknown)}"] if unknown else []
        problems += [f"missing keys {', '.join(missing)}"] if missing else []
        if problems:
            raise ValueError(f"not a MaskFormerConfig: {'; '.join(problems)}")
        return MaskFormerConfig(**values)

    def save(self, path: str | Path) -> None:
        """Writes the configuration as a JSON file."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @staticmethod
    def load(path: str | Path) -> MaskFormerConfig:
        """Reads what :meth:`save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is not JSON, or its keys are not those of a configuration; the message names the file.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a JSON file: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path} holds a {type(values).__name__}; expected a configuration's keys")
        try:
            return MaskFormerConfig.from_dict(values)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{path}: {error}") from error


PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "backbone": "tiny",
        "num_queries": 25,
        "hidden_dim": 96,
        "mask_dim": 64,
        "pixel_decoder_dim": 64,
        "decoder_layers": 3,
        "num_heads": 4,
        "feedforward_dim": 256,
        "dropout": 0.0,
    },
    "maskformer-r50": {"backbone": "resnet50"},
    "maskformer-r101": {"backbone": "resnet101"},
    "maskformer-r101c": {"backbone": "resnet101c"},
    **{
        f"maskformer-swin-{size}": {"backbone": f"swin-{size}", "backbone_options": {"drop_path_rate": 0.3}}
        for size in ("tiny", "small", "base", "large")
    },
}


def _require(holds: bool, name: str, value: Any, expected: str) -> None:
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
