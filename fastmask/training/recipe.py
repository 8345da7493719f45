"""Training recipes as plain data: optimizer, schedule, batch and augmentation; the papers' recipes are presets."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fastmask.data.transforms import Transform, detr_augmentation, jitter_augmentation, semantic_augmentation
from fastmask.models._configuration import PlainConfig, require

OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("poly", "two-stage-poly", "steps", "constant")
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
        layer_decay: the factor of the learning rate from each block of the backbone to the one before it, for networks
            whose backbone has equal blocks; what precedes the blocks learns like the first. 1 for no decay.
        decay_query_blocks: with ``layer_decay``, whether it applies to the blocks of an EoMT that process queries, too;
            otherwise these have the full learning rate.
        momentum: the momentum of "sgd".
        nesterov: use Nesterov's form of momentum with "sgd".
        schedule: "poly", "two-stage-poly", "steps" or "constant", see
            :func:`fastmask.training.learning_rate_factor`.
        power: the exponent of the two "poly" schedules, and of annealing.
        min_learning_rate: the learning rate at the end of "poly"; those of other groups are in proportion.
        milestones: where "steps" lowers the learning rate, as shares of ``steps``, ascending.
        gamma: the factor of "steps" at each milestone.
        warmup_steps: the number of steps in which the learning rate rises linearly to its full value.
        warmup_factor: the share of the learning rate at which the rise begins; "two-stage-poly" begins at 0.
        backbone_warmup_steps: with "two-stage-poly", the number of steps after ``warmup_steps`` in which the backbone's
            learning rate rises; before, the backbone rests.
        anneal_starts: for an EoMT, when the probability of masked attention begins to fall from 1, for each of its
            blocks with queries, as shares of ``steps``, ascending; () for no annealing. See
            :func:`fastmask.training.mask_probabilities`.
        anneal_ends: when each of these probabilities reaches 0, as shares of ``steps``.
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
        colors: jitter colors, with "jitter"; "semantic" always does.
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
    layer_decay: float = 1.0
    decay_query_blocks: bool = True
    momentum: float = 0.9
    nesterov: bool = False
    schedule: str = "poly"
    power: float = 0.9
    min_learning_rate: float = 0.0
    milestones: tuple[float, ...] = ()
    gamma: float = 0.1
    warmup_steps: int = 0
    warmup_factor: float = 1e-6
    backbone_warmup_steps: int = 0
    anneal_starts: tuple[float, ...] = ()
    anneal_ends: tuple[float, ...] = ()
    clip_norm: float = 0.01
    ema: float = 0.0
    steps: int = 160_000
    batch_size: int = 16
    augmentation: str = "semantic"
    crop: tuple[int, ...] = (512, 512)
    short_side: int = 512
    max_side: int = 2048
    scales: tuple[float, ...] = (0.5, 2.0)
    colors: bool = False
    max_category_share: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES), ("augmentation", AUGMENTATIONS)):
            value = getattr(self, name)
            require(value in choices, name, repr(value), f"one of {', '.join(choices)}")
        self.require_at_least(1, "steps", "batch_size", "short_side", "max_side")
        self.require_at_least(0, "warmup_steps", "backbone_warmup_steps")
        self._require_finite(
            "learning_rate weight_decay norm_weight_decay embed_weight_decay backbone_multiplier layer_decay momentum "
            "power min_learning_rate gamma warmup_factor clip_norm ema".split()
        )
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "more than 0")
        for name in ("momentum", "ema"):
            require(getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
        require(not self.nesterov or self.momentum > 0, "nesterov", True, "False without momentum")
        within = self.min_learning_rate <= self.learning_rate
        require(within, "min_learning_rate", self.min_learning_rate, f"at most learning_rate {self.learning_rate}")
        require(self.warmup_steps < self.steps, "warmup_steps", self.warmup_steps, f"fewer than steps {self.steps}")
        two_stages = self.schedule == "two-stage-poly"
        name, fewer = "backbone_warmup_steps", f"fewer than steps {self.steps}, with warmup_steps {self.warmup_steps}"
        require(self.warmup_steps + self.backbone_warmup_steps < self.steps, name, self.backbone_warmup_steps, fewer)
        require(
            two_stages or not self.backbone_warmup_steps, name, self.backbone_warmup_steps, '0 without "two-stage-poly"'
        )
        require(0 < self.layer_decay <= 1, "layer_decay", self.layer_decay, "in (0, 1]")
        require(self.warmup_factor <= 1, "warmup_factor", self.warmup_factor, "in [0, 1]")
        ascending = all(a < b for a, b in zip((0, *self.milestones), (*self.milestones, 1), strict=True))
        require(ascending, "milestones", self.milestones, "shares between 0 and 1, ascending")
        self._check_annealing()
        missing = self.schedule == "steps" and not self.milestones
        require(not missing, "milestones", self.milestones, 'one or more for schedule "steps"')
        pair = len(self.crop) == 2 and min(self.crop) >= 1
        require(pair, "crop", self.crop, "(height, width), each at least 1")
        pair = len(self.scales) == 2 and 0 < self.scales[0] <= self.scales[1] < math.inf
        require(pair, "scales", self.scales, "the smallest and the largest, more than 0")
        in_range = 0 < self.max_category_share <= 1
        require(in_range, "max_category_share", self.max_category_share, "in (0, 1]")

    def _check_annealing(self) -> None:
        starts, ends = self.anneal_starts, self.anneal_ends
        require(list(starts) == sorted(starts), "anneal_starts", starts, "shares of steps, ascending")
        require(all(0 <= start < 1 for start in starts), "anneal_starts", starts, "shares in [0, 1)")
        require(len(ends) == len(starts), "anneal_ends", ends, f"{len(starts)} shares, as many as anneal_starts")
        later = all(start < end <= 1 for start, end in zip(starts, ends, strict=True))
        require(
            later and list(ends) == sorted(ends),
            "anneal_ends",
            ends,
            f"ascending, after anneal_starts {starts}, at most 1",
        )

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
            return jitter_augmentation((height, width), (least, greatest), colors=self.colors)
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
                "eomt-" and "ade20k", "ade20k-640" (panoptic), "cityscapes", "coco" or "coco-2x" (for 3 blocks with
                queries, as the small and base presets have); "eomt-dinov3-" and "ade20k", "coco" or "coco-2x";
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

# EoMT: the authors' configs/, training/ and datasets/, of 16 images a step. Steps are epochs of whole batches of 20,210
# images (ADE20K), 2,975 (Cityscapes) and 118,287 (COCO).
_EOMT: dict[str, Any] = {
    "weight_decay": 0.05,
    "norm_weight_decay": 0.05,
    "embed_weight_decay": 0.05,
    "backbone_multiplier": 1.0,
    "layer_decay": 0.8,
    "schedule": "two-stage-poly",
    "warmup_steps": 500,
    "backbone_warmup_steps": 1000,
    "augmentation": "jitter",
}
_EOMT_DINOV3: dict[str, Any] = {**_EOMT, "learning_rate": 2e-4, "warmup_steps": 2000, "backbone_warmup_steps": 3000}
_EOMT_COCO: dict[str, Any] = {"crop": (640, 640), "scales": (0.1, 2.0)}


def _annealed(steps: int, starts: Iterable[int], ends: Iterable[int]) -> dict[str, Any]:
    """The fields of a recipe whose annealing is given in steps."""
    return {
        "steps": steps,
        "anneal_starts": tuple(step / steps for step in starts),
        "anneal_ends": tuple(step / steps for step in ends),
    }


_EOMT_ADE20K = _annealed(39_153, (6520, 13_040, 19_560, 26_080), (13_040, 19_560, 26_080, 32_600))

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
    "eomt-ade20k": {**_EOMT, **_EOMT_ADE20K, "colors": True},
    "eomt-ade20k-640": {**_EOMT, **_EOMT_ADE20K, **_EOMT_COCO, "colors": True},
    "eomt-cityscapes": {
        **_EOMT,
        **_annealed(19_795, (3317, 6634, 9951, 13_268), (6634, 9951, 13_268, 16_585)),
        "crop": (1024, 1024),
        "colors": True,
    },
    "eomt-coco": {
        **_EOMT,
        **_EOMT_COCO,
        **_annealed(88_704, (14_782, 29_564, 44_346, 59_128), (29_564, 44_346, 59_128, 73_910)),
    },
    "eomt-coco-2x": {
        **_EOMT,
        **_EOMT_COCO,
        **_annealed(177_408, (29_564, 73_910, 118_256), (59_128, 103_474, 147_820)),
    },
    # Their file also has lr_mult 0.1, which their code does not apply.
    "eomt-dinov3-ade20k": {
        **_EOMT_DINOV3,
        **_annealed(20_208, (0, 6520, 9780, 13_040), (3000, 9780, 13_040, 16_300)),
        "layer_decay": 1.0,
        "colors": True,
    },
    "eomt-dinov3-coco": {
        **_EOMT_DINOV3,
        **_EOMT_COCO,
        **_annealed(88_704, (0, 29_564, 44_346, 59_128), (3000, 44_346, 59_128, 73_910)),
        "decay_query_blocks": False,
    },
    "eomt-dinov3-coco-2x": {
        **_EOMT_DINOV3,
        **_EOMT_COCO,
        **_annealed(177_408, (0, 73_910, 118_256), (3000, 103_474, 147_820)),
        "decay_query_blocks": False,
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
