"""Base classes of the networks: saving and loading, and the features of a backbone and a pixel decoder."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from fastmask.files import replace_files
from fastmask.models import weight_files
from fastmask.models._configuration import ModelConfig, PixelDecoderConfig
from fastmask.models._images import ImageBatch, ImagePreprocessor
from fastmask.models.backbones import backbone_channels as channels_of
from fastmask.models.backbones import build_backbone, describe_backbone, feature_maps
from fastmask.models.model_card import ModelCard
from fastmask.modules.pixel_decoder import PixelDecoder

if TYPE_CHECKING:
    from typing_extensions import Self

CUSTOM_BACKBONE = "custom"


class PretrainedModel(nn.Module):
    """Base class of every network. It saves weights and configuration to a folder and loads them from there.

    Args:
        config: an instance of ``config_class``.
    """

    config_class: ClassVar[type[ModelConfig]]
    # Prefixes of the weights whose shapes depend on the number of classes.
    class_weights: ClassVar[tuple[str, ...]]
    # Prefixes of the weights that usually start pretrained; recipes may give them a separate learning rate.
    backbone_weights: ClassVar[tuple[str, ...]] = ()
    # A regular expression for the names of weights in the backbone's equal blocks, whose group is the block's number;
    # recipes may lower the learning rate from block to block.
    backbone_blocks: ClassVar[str] = ""
    # The tasks of ``predict``, and its arguments that average the predictions of several views of an image.
    tasks: ClassVar[tuple[str, ...]] = ("semantic",)
    views: ClassVar[tuple[str, ...]] = ()
    # Prefixes of buffers that follow from the configuration and are not saved.
    unsaved: ClassVar[tuple[str, ...]] = ()
    # Only networks that segment images have one.
    preprocessor: ImagePreprocessor
    # Each network defines ``predict``, ``predict_tasks`` if it has several tasks, and ``final_logits``: the logits of
    # the last layer, followed for images by the input size that they cover.
    predict: Callable[..., Any]
    predict_tasks: Callable[..., Any]
    final_logits: Callable[..., Any]

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    def save_pretrained(self, folder: str | Path, card: ModelCard | None = None) -> None:
        """Writes config.json, model.safetensors and a model card, README.md. An interrupted save leaves the previous
        one intact, and a README.md that fastmask did not write is kept.

        Args:
            folder: the folder to write to; it is created if needed.
            card: facts about the model's training, scores and license.
        """
        weights, folder = self.weights(), Path(folder)
        replace_files(
            folder,
            {
                weight_files.WEIGHTS_FILE: lambda path: weight_files.save_weights(weights, path),
                weight_files.CONFIG_FILE: self.config.save,
                **(card or ModelCard()).writers(self, folder),
            },
        )

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        num_classes: int | None = None,
        ignore_mismatched_sizes: bool = False,
        prefix: str = "",
        **modules: Any,
    ) -> Self:
        """Loads a model that :meth:`save_pretrained` wrote, on the CPU, in float32 and training mode.

        Args:
            folder: contains config.json and model.safetensors.
            num_classes: K of the new model, if it differs from the saved model's.
            ignore_mismatched_sizes: allow a different ``num_classes``: weights that depend on it start at random, with
                a warning that names them, and class names and stuff classes start empty.
            prefix: a prefix to strip from the names of the weights, such as "module." if DistributedDataParallel
                wrapped the model; weights without it are ignored.
            modules: constructor arguments other than the configuration: ``backbone``, the module of a model that was
                saved with a custom backbone, and ``backbone_channels``.

        Raises:
            FileNotFoundError: no such folder or file.
            ValueError: a file is unreadable, keys are missing or unexpected, or shapes or the number of classes differ;
                the message names them.
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
            emptied = {name: () for name in ("class_names", "stuff_classes") if hasattr(config, name)}
            config = config.replace(num_classes=num_classes, **emptied)
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
        """Like :meth:`torch.nn.Module.load_state_dict`.

        Raises:
            RuntimeError: keys or shapes differ; if a wrapper of the model prefixed all names, the message says how to
                strip the prefix.
        """
        if strict and (prefix := weight_files.wrapping_prefix(self.state_dict(), state_dict)):
            raise RuntimeError(
                f"the names in state_dict begin with {prefix!r}, which a wrapper of the {type(self).__name__} adds; "
                f"{{name.removeprefix({prefix!r}): value for name, value in state_dict.items()}} strips it"
            )
        return super().load_state_dict(state_dict, strict, assign)

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.parameters()).device

    def weights(self) -> dict[str, Tensor]:
        """The state dict without the buffers that can be derived from the configuration."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith(self.unsaved)}

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Evaluation mode inside the context; each module's mode is restored afterwards."""
        training = [module for module in self.modules() if module.training]
        self.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True


class PixelDecoderModel(PretrainedModel):
    """Base class of the networks in MaskFormer's paper (arXiv:2107.06278): a backbone and a pixel decoder.

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
        self.preprocessor = ImagePreprocessor(config.pixel_mean, config.pixel_std, config.size_divisibility)
        self.backbone = backbone
        self.channels = channels_of(backbone, backbone_channels)
        self.pixel_decoder = self._make_pixel_decoder()
        self._build_head()

    def _make_pixel_decoder(self) -> nn.Module:
        """The pixel decoder; ``config`` and ``channels`` are set."""
        config = self.config
        return PixelDecoder(
            self.channels, config.pixel_decoder_dim, encoder_layers=config.encoder_layers, **self._layer_options
        )

    def _build_head(self) -> None:
        """Adds the modules after the pixel decoder; ``config`` and ``channels`` are set."""
        raise NotImplementedError

    @property
    def _layer_options(self) -> dict[str, Any]:
        """The arguments that the pixel decoder and the transformer decoder share."""
        return {name: getattr(self.config, name) for name in ("mask_dim", "num_heads", "feedforward_dim", "dropout")}

    @property
    def _transformer_options(self) -> dict[str, Any]:
        """Arguments of the transformer decoder, except the numbers of classes and queries."""
        config = self.config
        return {
            **self._layer_options,
            "input_dim": config.pixel_decoder_dim if config.encoder_layers else self.channels[-1],
            "hidden_dim": config.hidden_dim,
            "decoder_layers": config.decoder_layers,
        }

    def _features(self, batch: ImageBatch) -> tuple[list[Tensor], Tensor | None]:
        """The backbone's feature maps, and the padding mask of the coarsest one."""
        features = feature_maps(self.backbone, self.preprocessor.normalize(batch), self.channels)
        return features, batch.padding_mask(*features[-1].shape[-2:])

    def _embed_pixels(self, batch: ImageBatch) -> tuple[Tensor, Tensor, Tensor | None]:
        """``pixel_embed (B, mask_dim, h, w)``, and ``memory (B, C, h', w')`` with its padding mask."""
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
    """The configuration passed to a model's constructor, or one made of the constructor's keywords.

    Raises:
        TypeError: both or neither were passed, or ``config`` is not a configuration of this model.
    """
    kind = model.config_class
    if config is None:
        return kind(**options)
    if not isinstance(config, kind):
        raise TypeError(f"config must be a {kind.__name__}, got {type(config).__name__}; give its fields as keywords")
    if options:
        raise TypeError(f"{model.__name__} got a config and its fields {', '.join(options)}; use config.replace(...)")
    return config
