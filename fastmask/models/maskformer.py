"""MaskFormer: configuration, presets, network and prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastmask.mask_term import MaskTerm
from fastmask.models._base import PixelDecoderModel
from fastmask.models._configuration import SMALL_BACKBONES, TINY, PixelDecoderConfig, require
from fastmask.models._images import ImageBatch
from fastmask.models._mask_classification import MaskClassificationConfig, MaskClassificationModel, make_criterion
from fastmask.modules.masked_predictor import MaskedTransformerPredictor
from fastmask.modules.matcher import FixedMatcher
from fastmask.modules.pixel_decoder import PixelDecoder
from fastmask.modules.predictions import Predictions
from fastmask.modules.predictor import TransformerPredictor
from fastmask.targets import Targets

MATCHINGS = ("bipartite", "fixed")


PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {**TINY, "num_queries": 25},
    "maskformer-r50": {"backbone": "resnet50"},
    "maskformer-r101": {"backbone": "resnet101"},
    "maskformer-r101c": {"backbone": "resnet101c"},
    **{
        f"maskformer-swin-{size}": {"backbone": f"swin-{size}", "backbone_options": {"drop_path_rate": 0.3}}
        for size in ("tiny", "small", "base", "large")
    },
    **{
        f"maskformer-{family}-{size}": {"backbone": f"{family}-{size}", "size_divisibility": divisibility}
        for family, divisibility in (("dinov2", 28), ("dinov3", 32))
        for size in ("small", "base", "large")
    },
    # On a CPU the backbone takes three quarters of a training step; 128 channels at stride 4 would add a third.
    "maskformer-efficientnet-lite0": {
        "backbone": "efficientnet-lite0",
        "num_queries": 50,
        "hidden_dim": 128,
        "mask_dim": 64,
        "pixel_decoder_dim": 64,
        "decoder_layers": 3,
        "feedforward_dim": 512,
        "dropout": 0.0,
    },
}


@dataclass(frozen=True)
class MaskFormerConfig(MaskClassificationConfig, PixelDecoderConfig):
    """Everything that :class:`fastmask.MaskFormer` is built from. Its presets are "tiny", the paper's "maskformer-r50",
    "-r101", "-r101c", "maskformer-swin-tiny", "-small", "-base" and "-large", "maskformer-dinov2-small", "-base"
    and "-large", the same with "dinov3", and the small "maskformer-efficientnet-lite0", which can be trained without a
    GPU.

    Args:
        num_classes: K, without "no object".
        masked_attention: the decoder of Mask2Former (arXiv:2112.01527, section 3.2) instead of MaskFormer's: queries
            attend where their masks are foreground, to the three coarsest maps of the feature pyramid in turn, and
            there is a prediction before the first layer too.
        matching: "bipartite", or "fixed" (compared in the paper's section 4.3): query k predicts class k, so there must
            be as many queries as classes, and targets are merged by class.
        focal_alpha: alpha of the focal loss and cost.
        focal_gamma: gamma of the focal loss and cost.
        num_queries, class_weight, ...: the fields of
            :class:`fastmask.models._mask_classification.MaskClassificationConfig`.
        backbone, hidden_dim, ...: the fields of :class:`fastmask.models._configuration.PixelDecoderConfig`, and
            ``class_names``: one name for each class, or empty.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value out of range.
    """

    model_type = "MaskFormer"
    presets = PRESETS

    masked_attention: bool = False
    matching: str = "bipartite"
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.matching in MATCHINGS, "matching", repr(self.matching), f"one of {', '.join(MATCHINGS)}")
        if self.matching == "fixed":
            expected = f"{self.num_classes} (num_classes), as fixed matching needs"
            require(self.num_queries == self.num_classes, "num_queries", self.num_queries, expected)

    @property
    def recipe(self) -> str:
        masked = self.masked_attention and self.backbone not in SMALL_BACKBONES
        return "mask2former-ade20k" if masked else super().recipe

    @property
    def num_predictions(self) -> int:
        return self.decoder_layers + self.masked_attention if self.deep_supervision else 1

    @property
    def mask_term(self) -> MaskTerm:
        return MaskTerm("focal", self.focal_alpha, self.focal_gamma, self.ignore_void)


MASKED_LEVELS = 3  # feature levels that masked attention reads, coarse to fine


class MaskFormer(MaskClassificationModel, PixelDecoderModel):
    """Mask classification for semantic, panoptic and instance segmentation (Cheng et al., arXiv:2107.06278); with
    ``masked_attention=True``, the transformer decoder of Mask2Former (Cheng et al., arXiv:2112.01527).

    Call ``MaskFormer(config)``, or ``MaskFormer(num_classes=150, backbone="swin-tiny", ...)`` with the fields of
    :class:`MaskFormerConfig` as keywords.

    Args:
        config: the configuration; None to give its fields as keywords.
        backbone: a name, as in the configuration; or a module that returns a list or tuple of maps at the strides 4,
            8, 16 and 32, from fine to coarse (with a configuration, only a module).
        backbone_channels: the channels of these maps; by default the module's attribute ``channels``.
        pretrained_backbone: a folder or hub id from which ``transformers`` reads the backbone; "imagenet" for
            EfficientNet-lite0, whose weights come from a package.
        options: fields of the configuration.

    Raises:
        TypeError: both a configuration and fields, neither, or a field of the wrong type.
        ValueError: a value out of range, or an unknown backbone; the message lists the known ones.
    """

    config_class = MaskFormerConfig
    class_weights = ("predictor.class_embed.",)
    config: MaskFormerConfig
    pixel_decoder: PixelDecoder

    def _build_head(self) -> None:
        config = self.config
        options = self._transformer_options | {"num_classes": config.num_classes, "num_queries": config.num_queries}
        if config.masked_attention:
            options["input_dim"] = config.pixel_decoder_dim
            options["num_levels"] = self.num_levels = min(MASKED_LEVELS, len(self.channels), config.decoder_layers)
        predictor = MaskedTransformerPredictor if config.masked_attention else TransformerPredictor
        self.predictor = predictor(**options)
        self.criterion = make_criterion(config, FixedMatcher() if config.matching == "fixed" else None)

    def _predict(self, batch: ImageBatch, *, all_layers: bool) -> tuple[Tensor, Tensor, Tensor]:
        """``class_logits (L, B, N, K+1)``, ``mask_embed (L, B, N, C)`` and ``pixel_embed (B, C, h, w)``."""
        if self.config.masked_attention:
            pixel_embed, levels = self._embed_levels(batch)
            padding_masks = [batch.padding_mask(*level.shape[-2:]) for level in levels]
            class_logits, mask_embed = self.predictor(levels, pixel_embed, padding_masks, all_layers=all_layers)
        else:
            pixel_embed, memory, padding_mask = self._embed_pixels(batch)
            class_logits, mask_embed = self.predictor(memory, padding_mask, all_layers=all_layers)
        return class_logits, mask_embed, pixel_embed

    def _embed_levels(self, batch: ImageBatch) -> tuple[Tensor, list[Tensor]]:
        """``pixel_embed (B, C, h, w)``, and the pyramid's maps that masked attention reads, from coarse to fine."""
        features, padding_mask = self._features(batch)
        maps, _ = self.pixel_decoder.pyramid(features, padding_mask)
        return self.pixel_decoder.mask_features(maps[-1]), maps[: self.num_levels]

    def _weighted_losses(self, predictions: Sequence[Predictions], targets: Targets) -> dict[str, Tensor]:
        if self.config.matching == "fixed":
            targets = targets.merged_by_class()
        return super()._weighted_losses(predictions, targets)
