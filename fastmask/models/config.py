"""The one description of a MaskFormer: architecture, losses and classes, as plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from fastmask.models.base_config import PixelDecoderConfig, require

MATCHINGS = ("bipartite", "fixed")


@dataclass(frozen=True)
class MaskFormerConfig(PixelDecoderConfig):
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
        ignore_void: unlabelled pixels, and the padding of images, count in no mask loss and no matching cost; otherwise
            they are background of every mask, as in the authors' code. :mod:`fastmask.training` sets it.
        stuff_classes: the classes whose regions panoptic inference merges; all others are things.
        class_names: one name for each class, or empty.
        size_divisibility: images are padded at the bottom and right to a multiple of this.
        pixel_mean: per channel, subtracted from images in 0..1; by default what the backbone's pretrained weights want.
        pixel_std: per channel, divides what remains; by default likewise.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value out of range.
    """

    model_type = "MaskFormer"

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
    ignore_void: bool = False
    stuff_classes: tuple[int, ...] = ()
    class_names: tuple[str, ...] = ()
    size_divisibility: int = 32
    pixel_mean: tuple[float, ...] = ()
    pixel_std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(1, "num_queries")
        for f in fields(self):
            if f.name.endswith(("_weight", "_cost")) or f.name.startswith("focal_"):
                value = getattr(self, f.name)
                require(value >= 0 and math.isfinite(value), f.name, value, "finite and at least 0")
        require(self.matching in MATCHINGS, "matching", repr(self.matching), f"one of {', '.join(MATCHINGS)}")
        if self.matching == "fixed":
            expected = f"{self.num_classes} (num_classes), as fixed matching needs"
            require(self.num_queries == self.num_classes, "num_queries", self.num_queries, expected)
        wrong = [c for c in self.stuff_classes if not 0 <= c < self.num_classes]
        require(not wrong, "stuff_classes", wrong, f"in 0..{self.num_classes - 1}")

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
        """A configuration by name: "tiny" for tests and demonstrations, one of the paper's models, or a small one that
        can be trained without a GPU.

        Args:
            name: "tiny", "maskformer-r50", "-r101", "-r101c", "maskformer-swin-tiny", "-small", "-base", "-large", or
                "maskformer-efficientnet-lite0".
            num_classes: K.
            overrides: fields to set otherwise.

        Raises:
            ValueError: an unknown name.
        """
        return MaskFormerConfig._from_preset(PRESETS, name, {"num_classes": num_classes, **overrides})


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
    # Three quarters of a training step on a CPU are the backbone's; 128 channels at stride 4 would take a third more.
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
