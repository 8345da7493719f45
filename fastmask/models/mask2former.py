"""Mask2Former: configuration, presets and network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastmask.models._base import PixelDecoderModel
from fastmask.models._configuration import SMALL_BACKBONES, TINY, PixelDecoderConfig
from fastmask.models._images import ImageBatch
from fastmask.models._mask_classification import MaskClassificationModel, PointSampledConfig, make_criterion
from fastmask.modules.deformable_pixel_decoder import DeformablePixelDecoder
from fastmask.modules.masked_predictor import MaskedTransformerPredictor

# Backbones that the paper trains on ADE20K with crops of 640 x 640 pixels.
LARGE_BACKBONES = ("swin-base", "swin-large")

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {**TINY, "num_queries": 25, "encoder_layers": 2, "encoder_feedforward_dim": 128, "num_points": 1024},
    "mask2former-r50": {"backbone": "resnet50"},
    "mask2former-r101": {"backbone": "resnet101"},
    **{
        f"mask2former-swin-{size}": {"backbone": f"swin-{size}", "backbone_options": {"drop_path_rate": 0.3}}
        for size in ("tiny", "small", "base", "large")
    },
}


@dataclass(frozen=True)
class Mask2FormerConfig(PointSampledConfig, PixelDecoderConfig):
    """Everything that :class:`fastmask.Mask2Former` is built from. Its presets are "tiny" and the paper's
    "mask2former-r50", "-r101", "mask2former-swin-tiny", "-small", "-base" and "-large". The defaults are those of the
    authors' ResNet-50 on ADE20K.

    Args:
        num_classes: K, without "no object".
        encoder_layers: the number of layers of deformable attention in the pixel decoder.
        encoder_feedforward_dim: hidden channels of the MLPs in these layers; ``feedforward_dim`` is that of the
            transformer decoder.
        encoder_points: the number of points that a head of these layers reads of each map.
        decoder_layers: layers of the transformer decoder; there is a prediction before the first layer too.
        num_queries, num_points, class_weight, ...: the fields of
            :class:`fastmask.models._mask_classification.PointSampledConfig`.
        backbone, hidden_dim, ...: the fields of :class:`fastmask.models._configuration.PixelDecoderConfig`, and
            ``class_names``: one name for each class, or empty.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value out of range.
    """

    model_type = "Mask2Former"
    presets = PRESETS

    encoder_layers: int = 6
    encoder_feedforward_dim: int = 1024
    encoder_points: int = 4
    decoder_layers: int = 9
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(1, "encoder_layers", "encoder_feedforward_dim", "encoder_points")

    @property
    def recipe(self) -> str:
        if self.backbone in SMALL_BACKBONES:
            return super().recipe
        return "mask2former-ade20k-640" if self.backbone in LARGE_BACKBONES else "mask2former-ade20k"

    @property
    def num_predictions(self) -> int:
        return self.decoder_layers + 1 if self.deep_supervision else 1


class Mask2Former(MaskClassificationModel, PixelDecoderModel):
    """Mask classification for semantic, panoptic and instance segmentation with masked attention (Cheng et al.,
    arXiv:2112.01527): a pixel decoder of multi-scale deformable attention, a transformer decoder whose queries attend
    where their own masks are foreground, and losses at random points.

    Call ``Mask2Former(config)``, or ``Mask2Former(num_classes=150, backbone="swin-tiny", ...)`` with the fields of
    :class:`Mask2FormerConfig` as keywords; the other arguments and the errors are those of
    :class:`fastmask.MaskFormer`. The backbone must give at least two maps.
    """

    config_class = Mask2FormerConfig
    class_weights = ("predictor.class_embed.",)
    config: Mask2FormerConfig
    pixel_decoder: DeformablePixelDecoder

    def _make_pixel_decoder(self) -> DeformablePixelDecoder:
        config = self.config
        return DeformablePixelDecoder(
            self.channels,
            config.pixel_decoder_dim,
            encoder_layers=config.encoder_layers,
            num_points=config.encoder_points,
            **self._layer_options | {"feedforward_dim": config.encoder_feedforward_dim},
        )

    def _build_head(self) -> None:
        config = self.config
        self.num_levels = min(self.pixel_decoder.num_levels, config.decoder_layers)
        self.predictor = MaskedTransformerPredictor(
            num_classes=config.num_classes,
            num_queries=config.num_queries,
            num_levels=self.num_levels,
            **self._transformer_options,
        )
        self.criterion = make_criterion(config)

    def _predict(self, batch: ImageBatch, *, all_layers: bool) -> tuple[Tensor, Tensor, Tensor]:
        features, _ = self._features(batch)
        padding_masks = [batch.padding_mask(*feature.shape[-2:]) for feature in features]
        pixel_embed, levels = self.pixel_decoder(features, padding_masks)
        used = slice(self.num_levels)
        class_logits, mask_embed = self.predictor(
            levels[used], pixel_embed, padding_masks[::-1][used], all_layers=all_layers
        )
        return class_logits, mask_embed, pixel_embed
