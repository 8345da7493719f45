"""MaskFormer: per-pixel segmentation as the classification of masks."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastmask.functional import mask_products
from fastmask.models import checkpoint
from fastmask.models.backbone import backbone_channels as channels_of
from fastmask.models.backbone import build_backbone, describe_backbone, feature_maps
from fastmask.models.config import CUSTOM_BACKBONE, MaskFormerConfig
from fastmask.models.images import ImageBatch, Size, fit_targets, pad_images
from fastmask.models.inference import TASKS, check_sizes, infer
from fastmask.modules.criterion import SetCriterion
from fastmask.modules.masked_predictor import MaskedTransformerPredictor
from fastmask.modules.matcher import FixedMatcher, HungarianMatcher, Matcher
from fastmask.modules.pixel_decoder import PixelDecoder
from fastmask.modules.predictor import TransformerPredictor
from fastmask.targets import Targets

Images = Tensor | Sequence[Tensor]
CRITERION_PREFIX = "criterion."
MASKED_LEVELS = 3  # feature levels that masked attention reads, coarse to fine


class MaskFormer(nn.Module):
    """Mask classification for semantic, panoptic and instance segmentation (Cheng et al., arXiv:2107.06278); with
    ``masked_attention=True``, the transformer decoder of Mask2Former (Cheng et al., arXiv:2112.01527).

    ``MaskFormer(config)``, or ``MaskFormer(num_classes=150, backbone="swin-tiny", ...)`` with the fields of
    :class:`MaskFormerConfig` as keywords.

    Args:
        config: the configuration; None to give its fields as keywords.
        backbone: a name, as in the configuration; or a module that returns a list or tuple of maps at the strides 4,
            8, 16 and 32, from fine to coarse (with a configuration, only a module).
        backbone_channels: the channels of these maps; by default the module's attribute ``channels``.
        pretrained_backbone: a folder or hub id from which ``transformers`` reads the backbone.
        options: fields of the configuration.

    Raises:
        TypeError: both a configuration and fields, neither, or a field of the wrong type.
        ValueError: a value out of range, or an unknown backbone; the message lists the known ones.
    """

    def __init__(
        self,
        config: MaskFormerConfig | None = None,
        *,
        backbone: str | nn.Module | None = None,
        backbone_channels: Sequence[int] | None = None,
        pretrained_backbone: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        config = _make_config(config, backbone, options)
        if isinstance(backbone, nn.Module):
            if pretrained_backbone is not None:
                raise TypeError("pretrained_backbone goes with a backbone by name, not with a module")
            self.backbone = backbone
        elif config.backbone == CUSTOM_BACKBONE:
            raise ValueError(f"the configuration's backbone is {CUSTOM_BACKBONE!r}; pass the module as backbone=")
        else:
            self.backbone = build_backbone(config.backbone, config.backbone_options, pretrained=pretrained_backbone)
            if pretrained_backbone is not None:
                name, backbone_options = describe_backbone(self.backbone)
                config = config.replace(backbone=name, backbone_options=backbone_options)
        patch_size = getattr(getattr(self.backbone, "config", None), "patch_size", None)
        if isinstance(patch_size, int) and config.size_divisibility % patch_size:
            raise ValueError(
                f"size_divisibility is {config.size_divisibility}; expected a multiple of the patch size {patch_size} "
                f"of backbone {config.backbone!r}"
            )
        self.config = config
        self.channels = channels_of(self.backbone, backbone_channels)
        transformer = {
            "num_heads": config.num_heads,
            "feedforward_dim": config.feedforward_dim,
            "dropout": config.dropout,
        }
        self.pixel_decoder = PixelDecoder(
            self.channels,
            config.pixel_decoder_dim,
            config.mask_dim,
            encoder_layers=config.encoder_layers,
            **transformer,
        )
        self.predictor = self._make_predictor(
            num_classes=config.num_classes,
            num_queries=config.num_queries,
            hidden_dim=config.hidden_dim,
            mask_dim=config.mask_dim,
            decoder_layers=config.decoder_layers,
            **transformer,
        )
        self.criterion = _make_criterion(config)
        self.register_buffer("pixel_mean", torch.tensor(config.pixel_mean)[:, None, None], persistent=False)
        self.register_buffer("pixel_std", torch.tensor(config.pixel_std)[:, None, None], persistent=False)

    def forward(
        self, images: Images, targets: Targets | Sequence[Mapping[str, Tensor]] | None = None
    ) -> dict[str, Any]:
        """Predictions, or losses if there are targets.

        Args:
            images: ``(B, C, H, W)`` floating point in 0..1, or a list of ``(C, H_b, W_b)`` of any sizes, which are
                padded at the bottom and right with a mask; height and width of the batch become multiples of
                ``size_divisibility``. Normalisation happens inside.
            targets: one dict an image, of ``labels (M_b,)`` in ``0..K-1`` and binary ``masks (M_b, H_b, W_b)`` of the
                image's size; or :class:`fastmask.Targets`.

        Returns:
            Without targets: "pred_logits" ``(B, N, K+1)`` and "pred_masks" ``(B, N, h, w)`` of the last decoder layer,
            "aux_outputs" with the same of each layer before, and "class_logits" ``(L, B, N, K+1)`` and "mask_logits"
            ``(L, B, N, h, w)`` of all layers, of which the others are views.

            With targets: the losses "loss_ce", "loss_mask", "loss_dice" and the same with "_0", "_1", ... for the
            layers before the last, each a scalar that is multiplied by its weight already: their sum is what to
            minimise.

        Raises:
            TypeError: images or targets of another type or dtype.
            ValueError: shapes that do not fit each other, or labels out of range.
        """
        batch = self._batch(images)
        if targets is not None:
            targets = fit_targets(targets, batch, self.config.num_classes)
        class_logits, mask_embed, pixel_embed = self._predict(batch, all_layers=self.config.deep_supervision)
        if targets is not None:
            return self._weighted_losses(class_logits, mask_embed, pixel_embed, targets)
        mask_logits = mask_products(mask_embed, pixel_embed)
        return {
            "pred_logits": class_logits[-1],
            "pred_masks": mask_logits[-1],
            "aux_outputs": [
                {"pred_logits": classes, "pred_masks": masks}
                for classes, masks in zip(class_logits[:-1], mask_logits[:-1], strict=True)
            ],
            "class_logits": class_logits,
            "mask_logits": mask_logits,
        }

    @torch.inference_mode()
    def predict(
        self,
        images: Images,
        task: str = "semantic",
        sizes: Size | Sequence[Size] | None = None,
        **options: Any,
    ) -> list[Any]:
        """Results at the size asked for. Runs in evaluation mode, without gradients, and computes masks after the last
        decoder layer only.

        Args:
            images: as for a call of the model.
            task: "semantic", "panoptic" or "instance".
            sizes: (height, width) of the results, for all images or for each; by default each image's own.
            options: further arguments of :func:`fastmask.semantic_inference`, :func:`fastmask.panoptic_inference` or
                :func:`fastmask.instance_inference`, such as ``threshold``. ``stuff_classes`` is the configuration's
                unless given.

        Returns:
            One entry an image. semantic: ``(H, W)`` labels, or ``(K, H, W)`` scores with ``output="scores"``. panoptic:
            ``(segmentation (H, W), segments_info)``. instance: a dict of "scores", "labels" and "masks".

        Raises:
            TypeError: images of another type or dtype, or an option that the task does not have.
            ValueError: an unknown task, or sizes that do not fit the images.
        """
        if task not in TASKS:
            raise ValueError(f"unknown task {task!r}; expected one of {', '.join(TASKS)}")
        batch = self._batch(images)
        sizes = check_sizes(sizes, batch.sizes)
        with _evaluating(self):
            class_logits, mask_embed, pixel_embed = self._predict(batch, all_layers=False)
            mask_logits = mask_products(mask_embed[-1], pixel_embed)
        if task != "semantic":
            options.setdefault("stuff_classes", self.config.stuff_classes)
        return infer(task, class_logits[-1], mask_logits, batch, sizes, **options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors. An interruption leaves an earlier save as it was."""
        weights = self.weights()
        checkpoint.replace_files(
            Path(folder),
            {
                checkpoint.WEIGHTS_FILE: lambda path: checkpoint.save_weights(weights, path),
                checkpoint.CONFIG_FILE: self.config.save,
            },
        )

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        num_classes: int | None = None,
        ignore_mismatched_sizes: bool = False,
        backbone: nn.Module | None = None,
        backbone_channels: Sequence[int] | None = None,
    ) -> MaskFormer:
        """A model from what :meth:`save_pretrained` wrote, on the CPU, in float32 and training mode.

        Args:
            folder: with config.json and model.safetensors.
            num_classes: K of the new model, if it is to differ from the saved one's.
            ignore_mismatched_sizes: allow that: the class head starts at random, with a warning that names its weights,
                and class names and stuff classes start empty.
            backbone: the module of a model that was saved with a custom backbone.
            backbone_channels: of that module.

        Raises:
            FileNotFoundError: no such folder or file.
            ValueError: a file is unreadable, its keys are missing or unexpected, or shapes or the number of classes
                differ; the message says which.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder {folder}")
        config = MaskFormerConfig.load(folder / checkpoint.CONFIG_FILE)
        new_classes = num_classes is not None and num_classes != config.num_classes
        if new_classes:
            if not ignore_mismatched_sizes:
                raise ValueError(
                    f"num_classes is {num_classes}, but {folder} was saved with {config.num_classes}; "
                    "ignore_mismatched_sizes=True starts a new class head"
                )
            config = config.replace(num_classes=num_classes, class_names=(), stuff_classes=())
        path = folder / checkpoint.WEIGHTS_FILE
        weights = checkpoint.load_weights(path)
        model = cls(config, backbone=backbone, backbone_channels=backbone_channels)
        own = model.weights()
        for name in checkpoint.check_keys(own, weights, path):
            if not (new_classes and name.startswith("predictor.class_embed.")):
                raise ValueError(
                    f"{path} has {name} of shape {tuple(weights[name].shape)}; "
                    f"{folder / checkpoint.CONFIG_FILE} asks for {tuple(own[name].shape)}"
                )
        if new_classes:
            fresh = [name for name in weights if name.startswith("predictor.class_embed.")]
            warnings.warn(f"not loaded from {path}, but started at random: {', '.join(fresh)}", stacklevel=2)
            weights = {name: tensor for name, tensor in weights.items() if name not in fresh}
        model.load_state_dict(weights, strict=False)
        return model

    def weights(self) -> dict[str, Tensor]:
        """The state dict without the criterion's buffers, which follow from the configuration."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith(CRITERION_PREFIX)}

    def _batch(self, images: Images) -> ImageBatch:
        return pad_images(images, self.config.size_divisibility, len(self.config.pixel_mean))

    def _predict(self, batch: ImageBatch, *, all_layers: bool) -> tuple[Tensor, Tensor, Tensor]:
        """``class_logits (L, B, N, K+1)``, ``mask_embed (L, B, N, C)`` and ``pixel_embed (B, C, h, w)``."""
        features = feature_maps(self.backbone, self._normalise(batch), self.channels)
        padding_mask = batch.padding_mask(*features[-1].shape[-2:])
        if self.config.masked_attention:
            maps, _ = self.pixel_decoder.pyramid(features, padding_mask)
            pixel_embed = self.pixel_decoder.mask_features(maps[-1])
            levels = maps[: self.predictor.num_levels]
            padding_masks = [batch.padding_mask(*level.shape[-2:]) for level in levels]
            class_logits, mask_embed = self.predictor(levels, pixel_embed, padding_masks, all_layers=all_layers)
        else:
            pixel_embed, memory = self.pixel_decoder(features, padding_mask)
            class_logits, mask_embed = self.predictor(memory, padding_mask, all_layers=all_layers)
        return class_logits, mask_embed, pixel_embed

    def _make_predictor(self, **options: Any) -> MaskedTransformerPredictor | TransformerPredictor:
        config = self.config
        if config.masked_attention:
            levels = min(MASKED_LEVELS, len(self.channels), config.decoder_layers)
            return MaskedTransformerPredictor(config.pixel_decoder_dim, num_levels=levels, **options)
        return TransformerPredictor(config.pixel_decoder_dim if config.encoder_layers else self.channels[-1], **options)

    def _weighted_losses(
        self, class_logits: Tensor, mask_embed: Tensor, pixel_embed: Tensor, targets: Targets
    ) -> dict[str, Tensor]:
        if self.config.matching == "fixed":
            targets = targets.merged_by_class()
        outputs = {"class_logits": class_logits, "mask_embed": mask_embed, "pixel_embed": pixel_embed}
        weights = self.criterion.weight_dict
        losses = self.criterion(outputs, targets)
        return {name: value * weights[name] for name, value in losses.items() if name in weights}

    def _normalise(self, batch: ImageBatch) -> Tensor:
        """Pixels of mean 0 and deviation 1, in the model's dtype; padding stays 0, as in the original."""
        pixels = (batch.pixels - self.pixel_mean.float()) / self.pixel_std.float()
        return batch.zero_padding(pixels).to(self.pixel_mean.dtype)


@contextmanager
def _evaluating(model: nn.Module):
    """Evaluation mode for a while; each module then gets back its own mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _make_config(
    config: MaskFormerConfig | None, backbone: str | nn.Module | None, options: Mapping[str, Any]
) -> MaskFormerConfig:
    if config is not None and not isinstance(config, MaskFormerConfig):
        raise TypeError(f"config must be a MaskFormerConfig, got {type(config).__name__}; give its fields as keywords")
    if config is not None and (options or isinstance(backbone, str)):
        given = [*options, *(["backbone"] if isinstance(backbone, str) else [])]
        raise TypeError(f"MaskFormer got a config and its fields {', '.join(given)}; use config.replace(...)")
    if backbone is not None and not isinstance(backbone, str | nn.Module):
        raise TypeError(f"backbone must be a name or a module, got {type(backbone).__name__}")
    if isinstance(backbone, str):
        return MaskFormerConfig(**options, backbone=backbone)
    if config is None:
        config = MaskFormerConfig(**options)
    return config if backbone is None else config.replace(backbone=CUSTOM_BACKBONE, backbone_options={})


def _make_criterion(config: MaskFormerConfig) -> SetCriterion:
    weights = {"loss_ce": config.class_weight, "loss_mask": config.mask_weight, "loss_dice": config.dice_weight}
    earlier = range(config.num_predictions - 1)
    weights |= {f"{name}_{layer}": weight for layer in earlier for name, weight in list(weights.items())}
    return SetCriterion(
        config.num_classes,
        matcher=_make_matcher(config),
        weight_dict=weights,
        eos_coef=config.no_object_weight,
        losses=["labels", "masks"],
    )


def _make_matcher(config: MaskFormerConfig) -> Matcher:
    focal = {"alpha": config.focal_alpha, "gamma": config.focal_gamma}
    if config.matching == "fixed":
        return FixedMatcher(**focal)
    return HungarianMatcher(config.class_cost, config.mask_cost, config.dice_cost, **focal)
