"""What all networks share: configurations as plain checked data, images in, weights to a folder and back."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from fastmask.files import read_json, replace_files
from fastmask.models import efficientnet, weight_files
from fastmask.models._images import DEVIATIONS, PIXEL_RANGE, ImageBatch, pad_images
from fastmask.models.backbones import backbone_channels as channels_of
from fastmask.models.backbones import build_backbone, describe_backbone, feature_maps
from fastmask.modules.pixel_decoder import PixelDecoder

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
        values = read_config(path)
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


def read_config(path: str | Path) -> dict[str, Any]:
    """What a configuration's file holds.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not JSON, or no object; the message names it.
    """
    values = read_json(Path(path))
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


Images = Tensor | Sequence[Tensor]
Model = TypeVar("Model", bound="PretrainedModel")


class PretrainedModel(nn.Module):
    """Base of every network: weights and configuration to a folder and back.

    Args:
        config: the configuration, of the class ``config_class``.
    """

    config_class: ClassVar[type[ModelConfig]]
    # Prefixes of the weights whose shapes follow the number of classes.
    class_weights: ClassVar[tuple[str, ...]]
    # Prefixes of the weights that usually start pretrained, which recipes may give a learning rate of their own.
    backbone_weights: ClassVar[tuple[str, ...]] = ()
    # What ``predict`` can give, and by which views of an image it can look more than once.
    tasks: ClassVar[tuple[str, ...]] = ("semantic",)
    views: ClassVar[tuple[str, ...]] = ()
    # Prefixes of buffers that follow from the configuration and are not saved.
    unsaved: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors. An interruption leaves an earlier save as it was."""
        weights = self.weights()
        replace_files(
            Path(folder),
            {
                weight_files.WEIGHTS_FILE: lambda path: weight_files.save_weights(weights, path),
                weight_files.CONFIG_FILE: self.config.save,
            },
        )

    @classmethod
    def from_pretrained(
        cls: type[Model],
        folder: str | Path,
        *,
        num_classes: int | None = None,
        ignore_mismatched_sizes: bool = False,
        prefix: str = "",
        **modules: Any,
    ) -> Model:
        """A model from what :meth:`save_pretrained` wrote, on the CPU, in float32 and training mode.

        Args:
            folder: with config.json and model.safetensors.
            num_classes: K of the new model, if it is to differ from the saved one's.
            ignore_mismatched_sizes: allow that: weights that belong to classes start at random, with a warning that
                names them, and class names and stuff classes start empty.
            prefix: what the names of the weights have before them, as "module." if DistributedDataParallel wrapped the
                model; other weights are left out.
            modules: what the model was built with besides its configuration: ``backbone``, the module of a model that
                was saved with a custom backbone, and ``backbone_channels``.

        Raises:
            FileNotFoundError: no such folder or file.
            ValueError: a file is unreadable, its keys are missing or unexpected, or shapes or the number of classes
                differ; the message says which.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder {folder}")
        config = cls.config_class.load(folder / weight_files.CONFIG_FILE)
        new_classes = num_classes is not None and num_classes != config.num_classes
        if new_classes:
            if not ignore_mismatched_sizes:
                raise ValueError(
                    f"num_classes is {num_classes}, but {folder} was saved with {config.num_classes}; "
                    "ignore_mismatched_sizes=True starts a new class head"
                )
            of_classes = {name: () for name in ("class_names", "stuff_classes") if hasattr(config, name)}
            config = config.replace(num_classes=num_classes, **of_classes)
        path = folder / weight_files.WEIGHTS_FILE
        weights = weight_files.without_prefix(weight_files.load_weights(path), prefix, str(path))
        model = cls(config, **modules)
        own = model.weights()
        mismatched = weight_files.check_keys(own, weights, path)
        for name in mismatched:
            if not (new_classes and name.startswith(cls.class_weights)):
                raise ValueError(
                    f"{path} has {name} of shape {tuple(weights[name].shape)}; "
                    f"{folder / weight_files.CONFIG_FILE} asks for {tuple(own[name].shape)}"
                )
        if mismatched:
            warnings.warn(
                f"not loaded from {path}, but started at random: {', '.join(sorted(mismatched))}", stacklevel=2
            )
            weights = {name: tensor for name, tensor in weights.items() if name not in mismatched}
        model.load_state_dict(weights, strict=False)
        return model

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As PyTorch's own.

        Raises:
            RuntimeError: keys or shapes differ; of names that a wrapper of the model put a prefix before, the message
                says how to strip it.
        """
        if strict and (prefix := weight_files.wrapping_prefix(self.state_dict(), state_dict)):
            raise RuntimeError(
                f"the names in state_dict begin with {prefix!r}, as a wrapper of the {type(self).__name__} has them; "
                f"{{name.removeprefix({prefix!r}): value for name, value in state_dict.items()}} strips it"
            )
        return super().load_state_dict(state_dict, strict, assign)

    def weights(self) -> dict[str, Tensor]:
        """The state dict without buffers that follow from the configuration."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith(self.unsaved)}

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Evaluation mode for a while; each module then gets back its own mode."""
        training = [module for module in self.modules() if module.training]
        self.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True


class SegmentationModel(PretrainedModel):
    """Base of every network that segments images.

    Args:
        config: the configuration, of the class ``config_class``.
    """

    config_class: ClassVar[type[ImageModelConfig]]
    config: ImageModelConfig
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, config: ImageModelConfig) -> None:
        super().__init__(config)
        self.register_buffer("pixel_mean", torch.tensor(config.pixel_mean)[:, None, None], persistent=False)
        self.register_buffer("pixel_std", torch.tensor(config.pixel_std)[:, None, None], persistent=False)

    def _pad(self, images: Images, divisibility: int) -> ImageBatch:
        """Images in one batch, whose sides are multiples of ``divisibility``."""
        config = self.config
        batch = pad_images(images, divisibility, len(config.pixel_mean))
        limit = max(mean + DEVIATIONS * std for mean, std in zip(config.pixel_mean, config.pixel_std, strict=True))
        PIXEL_RANGE.check(batch.pixels, limit)
        return batch

    def _normalize(self, batch: ImageBatch) -> Tensor:
        """Pixels of mean 0 and deviation 1, in the model's dtype; padding stays 0, as in the original."""
        pixels = (batch.pixels - self.pixel_mean.float()) / self.pixel_std.float()
        return batch.zero_padding(pixels).to(self.pixel_mean.dtype)


class PixelDecoderModel(SegmentationModel):
    """Base of the networks of MaskFormer's paper (arXiv:2107.06278): a backbone and a pixel decoder.

    The arguments are those of :class:`fastmask.MaskFormer`.
    """

    config_class: ClassVar[type[PixelDecoderConfig]]
    backbone_weights = ("backbone.",)
    config: PixelDecoderConfig

    def __init__(
        self,
        config: PixelDecoderConfig | None = None,
        *,
        backbone: str | nn.Module | None = None,
        backbone_channels: Sequence[int] | None = None,
        pretrained_backbone: str | None = None,
        **options: Any,
    ) -> None:
        config = self._make_config(config, backbone, options)
        if isinstance(backbone, nn.Module):
            if pretrained_backbone is not None:
                raise TypeError("pretrained_backbone goes with a backbone by name, not with a module")
        elif config.backbone == CUSTOM_BACKBONE:
            raise ValueError(f"the configuration's backbone is {CUSTOM_BACKBONE!r}; pass the module as backbone=")
        else:
            backbone = build_backbone(config.backbone, config.backbone_options, pretrained=pretrained_backbone)
            if pretrained_backbone is not None:
                name, backbone_options = describe_backbone(backbone)
                config = config.replace(backbone=name, backbone_options=backbone_options)
        patch_size = getattr(getattr(backbone, "config", None), "patch_size", None)
        if isinstance(patch_size, int) and config.size_divisibility % patch_size:
            raise ValueError(
                f"size_divisibility is {config.size_divisibility}; expected a multiple of the patch size {patch_size} "
                f"of backbone {config.backbone!r}"
            )
        super().__init__(config)
        self.backbone = backbone
        self.channels = channels_of(backbone, backbone_channels)
        self.pixel_decoder = PixelDecoder(
            self.channels,
            config.pixel_decoder_dim,
            config.mask_dim,
            encoder_layers=config.encoder_layers,
            num_heads=config.num_heads,
            feedforward_dim=config.feedforward_dim,
            dropout=config.dropout,
        )
        self._build_head()

    def _build_head(self) -> None:
        """Adds what makes predictions of pixel embeddings and memory; ``config`` and ``channels`` are set."""
        raise NotImplementedError

    @property
    def _transformer_options(self) -> dict[str, Any]:
        """What the transformer decoder is built with, besides its classes and queries."""
        config = self.config
        return {
            "input_dim": config.pixel_decoder_dim if config.encoder_layers else self.channels[-1],
            "hidden_dim": config.hidden_dim,
            "mask_dim": config.mask_dim,
            "decoder_layers": config.decoder_layers,
            "num_heads": config.num_heads,
            "feedforward_dim": config.feedforward_dim,
            "dropout": config.dropout,
        }

    def _batch(self, images: Images) -> ImageBatch:
        return self._pad(images, self.config.size_divisibility)

    def _features(self, batch: ImageBatch) -> tuple[list[Tensor], Tensor | None]:
        """The backbone's maps, and the mask of padding of the coarsest."""
        features = feature_maps(self.backbone, self._normalize(batch), self.channels)
        return features, batch.padding_mask(*features[-1].shape[-2:])

    def _embed_pixels(self, batch: ImageBatch) -> tuple[Tensor, Tensor, Tensor | None]:
        """``pixel_embed (B, mask_dim, h, w)``, and ``memory (B, C, h', w')`` with the mask of its padding."""
        features, padding_mask = self._features(batch)
        pixel_embed, memory = self.pixel_decoder(features, padding_mask)
        return pixel_embed, memory, padding_mask

    @classmethod
    def _make_config(
        cls, config: PixelDecoderConfig | None, backbone: str | nn.Module | None, options: Mapping[str, Any]
    ) -> PixelDecoderConfig:
        if isinstance(backbone, str):
            options = {**options, "backbone": backbone}
        elif backbone is not None and not isinstance(backbone, nn.Module):
            raise TypeError(f"backbone must be a name or a module, got {type(backbone).__name__}")
        config = config_or_fields(cls, config, options)
        if isinstance(backbone, nn.Module):
            return config.replace(backbone=CUSTOM_BACKBONE, backbone_options={})
        return config


def config_or_fields(model: type[PretrainedModel], config: ModelConfig | None, options: Mapping[str, Any]) -> Any:
    """The configuration that a model's constructor was given, or the one that its keywords make.

    Raises:
        TypeError: both, neither, or something else than a configuration of this model.
    """
    kind = model.config_class
    if config is None:
        return kind(**options)
    if not isinstance(config, kind):
        raise TypeError(f"config must be a {kind.__name__}, got {type(config).__name__}; give its fields as keywords")
    if options:
        raise TypeError(f"{model.__name__} got a config and its fields {', '.join(options)}; use config.replace(...)")
    return config
