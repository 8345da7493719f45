"""Training recipes as plain data: optimizer, schedule, batch and augmentation; the papers' recipes are presets."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fastmask.data.transforms import Transform, detr_augmentation, jitter_augmentation, semantic_augmentation
from fastmask.models._configuration import PlainConfig, require

OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("poly", "steps", "constant")
AUGMENTATIONS = ("semantic", "jitter", "detr", "none")


@dataclass(frozen=True)
class Recipe(PlainConfig):
    """Everything that determines how a network is trained, except the network, the data and the machine. The defaults
    are those of MaskFormer's ResNet-50 on ADE20K (arXiv:2107.06278, section 4.1, and the authors' configuration files).

    Args:
        optimizer: "adamw" or "sgd".
        learning_rate: the learning rate of all parts except the backbone, before warm-up and decay.
        weight_decay: the decay of weights and biases; decoupled from the gradient with "adamw", part of it with "sgd".
        norm_weight_decay: the decay of the gains and biases of normalization layers.
        embed_weight_decay: the decay of learned queries, tokens and positions.
        backbone_multiplier: the factor of the backbone's learning rate.
        momentum: the momentum of "sgd".
        nesterov: use Nesterov's form of momentum with "sgd".
        schedule: "poly", "steps" or "constant", see :func:`fastmask.training.learning_rate_factor`.
        power: the exponent of "poly".
        min_learning_rate: the learning rate at the end of "poly"; those of other groups are in proportion.
        milestones: where "steps" lowers the learning rate, as shares of ``steps``, ascending.
        gamma: the factor of "steps" at each milestone.
        warmup_steps: the number of steps in which the learning rate rises linearly to its full value.
        warmup_factor: the share of the learning rate at which the rise begins.
        clip_norm: the largest Euclidean norm of the gradient over all parameters; 0 for no limit.
        ema: the decay d, such as 0.999, of an exponential moving average of the weights, a = d a + (1 - d) w after each
            step, which is evaluated and saved as the network; 0 to evaluate and save the weights themselves. Floating
            point buffers, such as the statistics of batch norm, are averaged, too.
        steps: the number of steps of the optimizer.
        batch_size: the number of images in a step, on all devices and in all micro-batches together.
        augmentation: "semantic", "jitter", "detr" or "none": ``semantic_augmentation``, ``jitter_augmentation`` and
            ``detr_augmentation`` of :mod:`fastmask.data`.
        crop: (height, width) of a training image, with "semantic" and "jitter".
        short_side: the shorter side of an image at scale 1, with "semantic" and "detr".
        max_side: the limit of the longer side, with "semantic" and "detr".
        scales: the smallest and the largest random scale.
        max_category_share: the largest share of a crop's labeled pixels for one class, with "semantic"; 1 for no limit.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value out of range.
    """

    optimizer: str = "adamw"
    learning_rate: float = 1e-4
    weight_decay: float = 1e-4
    norm_weight_decay: float = 0.0
    embed_weight_decay: float = 0.0
    backbone_multiplier: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    schedule: str = "poly"
    power: float = 0.9
    min_learning_rate: float = 0.0
    milestones: tuple[float, ...] = ()
    gamma: float = 0.1
    warmup_steps: int = 0
    warmup_factor: float = 1e-6
    clip_norm: float = 0.01
    ema: float = 0.0
    steps: int = 160_000
    batch_size: int = 16
    augmentation: str = "semantic"
    crop: tuple[int, ...] = (512, 512)
    short_side: int = 512
    max_side: int = 2048
    scales: tuple[float, ...] = (0.5, 2.0)
    max_category_share: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES), ("augmentation", AUGMENTATIONS)):
            value = getattr(self, name)
            require(value in choices, name, repr(value), f"one of {', '.join(choices)}")
        self.require_at_least(1, "steps", "batch_size", "short_side", "max_side")
        self.require_at_least(0, "warmup_steps")
        self._require_finite(
            "learning_rate weight_decay norm_weight_decay embed_weight_decay backbone_multiplier momentum power "
            "min_learning_rate gamma warmup_factor clip_norm ema".split()
        )
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "more than 0")
        for name in ("momentum", "ema"):
            require(getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
        require(not self.nesterov or self.momentum > 0, "nesterov", True, "False without momentum")
        within = self.min_learning_rate <= self.learning_rate
        require(within, "min_learning_rate", self.min_learning_rate, f"at most learning_rate {self.learning_rate}")
        require(self.warmup_steps < self.steps, "warmup_steps", self.warmup_steps, f"fewer than steps {self.steps}")
        require(self.warmup_factor <= 1, "warmup_factor", self.warmup_factor, "in [0, 1]")
        ascending = all(a < b for a, b in zip((0, *self.milestones), (*self.milestones, 1), strict=True))
        require(ascending, "milestones", self.milestones, "shares between 0 and 1, ascending")
        missing = self.schedule == "steps" and not self.milestones
        require(not missing, "milestones", self.milestones, 'one or more for schedule "steps"')
        pair = len(self.crop) == 2 and min(self.crop) >= 1
        require(pair, "crop", self.crop, "(height, width), each at least 1")
        pair = len(self.scales) == 2 and 0 < self.scales[0] <= self.scales[1] < math.inf
        require(pair, "scales", self.scales, "the smallest and the largest, more than 0")
        in_range = 0 < self.max_category_share <= 1
        require(in_range, "max_category_share", self.max_category_share, "in (0, 1]")

    def _require_finite(self, names: Iterable[str]) -> None:
        for name in names:
            value = getattr(self, name)
            require(value >= 0 and math.isfinite(value), name, value, "finite and at least 0")

    def transform(self) -> Transform | None:
        """The augmentation, for :class:`fastmask.data.Augmented`; None for "none"."""
        height, width = self.crop
        least, greatest = self.scales
        if self.augmentation == "semantic":
            return semantic_augmentation(
                (height, width),
                short_side=self.short_side,
                max_side=self.max_side,
                scales=(least, greatest),
                max_category_share=self.max_category_share,
            )
        if self.augmentation == "jitter":
            return jitter_augmentation((height, width), (least, greatest))
        if self.augmentation == "detr":
            return detr_augmentation(short_side=self.short_side, max_side=self.max_side, scales=(least, greatest))
        return None

    @staticmethod
    def preset(name: str, **overrides: Any) -> Recipe:
        """A recipe by name: one of the papers', with the values of the authors' configuration files for a data set; or
        "finetune", for a few hundred images and a pretrained backbone.

        Args:
            name: "maskformer-" and "ade20k", "ade20k-swin" (tiny and small), "ade20k-swin-640" (base and large),
                "ade20k-full", "ade20k-panoptic", "cityscapes", "mapillary", "coco-stuff-10k", "coco-panoptic" or
                "coco-panoptic-swin"; "segmenter-" and "ade20k", "pascal-context" or "cityscapes"; "mask2former-" and
                "ade20k", "ade20k-640" (panoptic, instance, and large backbones), "cityscapes", "mapillary" or "coco";
                "finetune".
            overrides: fields to change.

        Raises:
            ValueError: an unknown name.
        """
        return Recipe._from_preset(PRESETS, name, overrides)


# MaskFormer with Swin: the authors' configs/ade20k-150/swin and configs/coco-panoptic/swin.
_SWIN: dict[str, Any] = {
    "learning_rate": 6e-5,
    "weight_decay": 0.01,
    "backbone_multiplier": 1.0,
    "warmup_steps": 1500,
}
_640: dict[str, Any] = {"crop": (640, 640), "short_side": 640, "max_side": 2560}
_CITYSCAPES: dict[str, Any] = {"crop": (512, 1024), "short_side": 1024, "max_side": 4096, "steps": 90_000}
_MAPILLARY: dict[str, Any] = {"short_side": 2048, "max_side": 8192, "steps": 300_000}
# MaskFormer's configs/coco-panoptic/Base-COCO-PanopticSegmentation.yaml: 300 epochs; the rate falls after 200.
_COCO_PANOPTIC: dict[str, Any] = {
    "schedule": "steps",
    "milestones": (369_600 / 554_400,),
    "steps": 554_400,
    "batch_size": 64,
    "augmentation": "detr",
    "short_side": 800,
    "max_side": 1333,
    "scales": (0.6, 1.0),
}
# Segmenter: the authors' segm/train.py and segm/config.yml. Their optimizer comes from timm 0.4.12, whose "sgd" has
# Nesterov momentum. The steps are the paper's (section 4.2): 64, 256 and 216 epochs.
_SEGMENTER: dict[str, Any] = {
    "optimizer": "sgd",
    "learning_rate": 1e-3,
    "weight_decay": 0.0,
    "nesterov": True,
    "backbone_multiplier": 1.0,
    "min_learning_rate": 1e-5,
    "clip_norm": 0.0,
    "batch_size": 8,
    "max_side": 4096,
    "max_category_share": 0.75,
}
# Mask2Former: the authors' Base-*.yaml under configs/; Swin has the same values there.
_MASK2FORMER: dict[str, Any] = {"weight_decay": 0.05}

PRESETS: dict[str, dict[str, Any]] = {
    "maskformer-ade20k": {},
    "maskformer-ade20k-swin": _SWIN,
    "maskformer-ade20k-swin-640": {**_SWIN, **_640},
    "maskformer-ade20k-full": {"steps": 200_000},
    "maskformer-ade20k-panoptic": {**_640, "steps": 720_000},
    "maskformer-cityscapes": _CITYSCAPES,
    "maskformer-mapillary": {**_MAPILLARY, "crop": (1280, 1280)},
    "maskformer-coco-stuff-10k": {**_640, "scales": (0.5, 1.5), "steps": 60_000, "batch_size": 32},
    "maskformer-coco-panoptic": _COCO_PANOPTIC,
    "maskformer-coco-panoptic-swin": {**_COCO_PANOPTIC, **_SWIN},
    "segmenter-ade20k": _SEGMENTER,
    "segmenter-pascal-context": {
        **_SEGMENTER,
        "steps": 80_000,
        "batch_size": 16,
        "crop": (480, 480),
        "short_side": 520,
        "max_side": 8320,
    },
    "segmenter-cityscapes": {
        **_SEGMENTER,
        "learning_rate": 1e-2,
        "steps": 80_000,
        "crop": (768, 768),
        "short_side": 1024,
    },
    "mask2former-ade20k": _MASK2FORMER,
    "mask2former-ade20k-640": {**_MASK2FORMER, **_640},
    "mask2former-cityscapes": {**_MASK2FORMER, **_CITYSCAPES},
    "mask2former-mapillary": {**_MASK2FORMER, **_MAPILLARY, "crop": (1024, 1024)},
    # 50 epochs, for panoptic and instance segmentation.
    "mask2former-coco": {
        **_MASK2FORMER,
        "schedule": "steps",
        "milestones": (327_778 / 368_750, 355_092 / 368_750),
        "steps": 368_750,
        "augmentation": "jitter",
        "crop": (1024, 1024),
        "scales": (0.1, 2.0),
    },
    # Found by short trials on CamVid with a pretrained EfficientNet-lite0 on one CPU core.
    "finetune": {
        "learning_rate": 1e-3,
        "weight_decay": 0.05,
        "backbone_multiplier": 0.5,
        "warmup_steps": 100,
        "steps": 2000,
        "batch_size": 4,
        "crop": (256, 320),
        "short_side": 360,
        "scales": (0.6, 1.5),
        "max_category_share": 0.75,
    },
}
