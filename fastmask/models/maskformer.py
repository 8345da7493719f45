"""MaskFormer: configuration, presets, network and prediction."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from fastmask.functional import mask_products, merge_views
from fastmask.mask_term import MaskTerm
from fastmask.models._base import PixelDecoderModel
from fastmask.models._configuration import SMALL_BACKBONES, TINY, PixelDecoderConfig, require
from fastmask.models._images import ImageBatch, Images, Size, fit_targets
from fastmask.models._inference import INFERENCE_BY_TASK, check_sizes, infer
from fastmask.models._views import EvaluationViews
from fastmask.modules.criterion import SetCriterion
from fastmask.modules.masked_predictor import MaskedTransformerPredictor
from fastmask.modules.matcher import FixedMatcher, HungarianMatcher, Matcher
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
class MaskFormerConfig(PixelDecoderConfig):
    """Everything that :class:`fastmask.MaskFormer` is built from. Its presets are "tiny", the paper's "maskformer-r50",
    "-r101", "-r101c", "maskformer-swin-tiny", "-small", "-base" and "-large", and the small
    "maskformer-efficientnet-lite0", which can be trained without a GPU.

    Args:
        num_classes: K, without "no object".
        num_queries: N.
        masked_attention: the decoder of Mask2Former (arXiv:2112.01527, section 3.2) instead of MaskFormer's: queries
            attend where their masks are foreground, to the three coarsest maps of the feature pyramid in turn, and
            there is a prediction before the first layer too.
        matching: "bipartite", or "fixed" (compared in the paper's section 4.3): query k predicts class k, so there must
            be as many queries as classes, and targets are merged by class.
        class_weight: weight of the classification loss.
        mask_weight: weight of the focal mask loss.
        dice_weight: weight of the dice loss.
        no_object_weight: weight of the "no object" class in the classification loss.
        class_cost: weight of the class probability in the matching cost.
        mask_cost: weight of the focal term in the matching cost.
        dice_cost: weight of the dice term in the matching cost.
        focal_alpha: alpha of the focal loss and cost.
        focal_gamma: gamma of the focal loss and cost.
        ignore_void: exclude unlabeled pixels, and the padding of images, from mask losses and matching costs;
            otherwise they are background of every mask, as in the authors' code. :mod:`fastmask.training` sets it.
        stuff_classes: the classes whose regions panoptic inference merges; all others are things.
        backbone, hidden_dim, ...: the fields of :class:`fastmask.models._configuration.PixelDecoderConfig`, and
            ``class_names``: one name for each class, or empty.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value out of range.
    """

    model_type = "MaskFormer"
    presets = PRESETS

    num_queries: int = 100
    masked_attention: bool = False
    matching: str = "bipartite"
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
    def recipe(self) -> str:
        masked = self.masked_attention and self.backbone not in SMALL_BACKBONES
        return "mask2former-ade20k" if masked else super().recipe

    @property
    def num_predictions(self) -> int:
        """L, the number of supervised predictions."""
        return self.decoder_layers + self.masked_attention if self.deep_supervision else 1

    @property
    def thing_classes(self) -> tuple[int, ...]:
        """The classes that are not stuff."""
        return tuple(c for c in range(self.num_classes) if c not in self.stuff_classes)


MASKED_LEVELS = 3  # feature levels that masked attention reads, coarse to fine


class MaskFormer(PixelDecoderModel):
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
    tasks = tuple(INFERENCE_BY_TASK)
    views = ("window", "scales", "flip")
    class_weights = ("predictor.class_embed.",)
    unsaved = ("criterion.",)
    config: MaskFormerConfig

    def _build_head(self) -> None:
        config = self.config
        options = self._transformer_options | {"num_classes": config.num_classes, "num_queries": config.num_queries}
        if config.masked_attention:
            options["input_dim"] = config.pixel_decoder_dim
            options["num_levels"] = self.num_levels = min(MASKED_LEVELS, len(self.channels), config.decoder_layers)
        predictor = MaskedTransformerPredictor if config.masked_attention else TransformerPredictor
        self.predictor = predictor(**options)
        self.criterion = _make_criterion(self.config)

    def forward(
        self, images: Images, targets: Targets | Sequence[Mapping[str, Tensor]] | None = None
    ) -> dict[str, Any]:
        """Predictions, or losses if there are targets.

        Args:
            images: ``(B, C, H, W)`` floating point in 0..1, or a list of ``(C, H_b, W_b)`` of any sizes, which are
                padded at the bottom and right and masked; height and width of the batch become multiples of
                ``size_divisibility``. The model normalizes the images itself.
            targets: for each image a dict of ``labels (M_b,)`` in ``0..K-1`` and binary ``masks (M_b, H_b, W_b)`` of
                the image's size; or :class:`fastmask.Targets`.

        Returns:
            Without targets: "pred_logits" ``(B, N, K+1)`` and "pred_masks" ``(B, N, h, w)`` of the last decoder layer,
            "aux_outputs", a list with the same for each earlier layer, and "class_logits" ``(L, B, N, K+1)`` and
            "mask_logits" ``(L, B, N, h, w)`` of all layers. The others are views of the last two.

            With targets: the losses "loss_ce", "loss_mask", "loss_dice" and the same with "_0", "_1", ... for the
            layers before the last, each a weighted scalar. Training minimizes their sum.

        Raises:
            TypeError: images or targets of another type or dtype.
            ValueError: shapes that do not match, or labels out of range.
        """
        batch = self.preprocessor(images)
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
        *,
        window: tuple[int, int] | None = None,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        view_batch: int = 1,
        **options: Any,
    ) -> list[Any]:
        """Results at any size. Runs in evaluation mode, without gradients, and computes only the masks of the last
        decoder layer; a semantic map never needs the mask logits of the whole image at once.

        With a window, several scales or ``flip``, a semantic map averages the scores of several views, as in the
        papers' reported results (see :func:`fastmask.functional.merge_views`). It is computed in bands of rows unless
        ``output="scores"``.

        Args:
            images: as for a call of the model.
            task: "semantic", "general" (a semantic map by the hard assignment of pixels to queries), "panoptic" or
                "instance".
            sizes: (height, width) of the results, for all images or for each; by default the images' sizes.
            window: (size, stride) of square windows in which each image is predicted, in pixels of the scaled image;
                None for whole images.
            scales: factors by which to resize each image, usually (0.5, 0.75, 1, 1.25, 1.5, 1.75).
            flip: predict mirror images as well.
            view_batch: number of views to predict at a time.
            options: further arguments of :func:`fastmask.semantic_inference`, :func:`fastmask.general_inference`,
                :func:`fastmask.panoptic_inference` or :func:`fastmask.instance_inference`, such as ``threshold``.
                ``stuff_classes`` is the configuration's unless given.

        Returns:
            One entry for each image. semantic: ``(H, W)`` labels, or ``(K, H, W)`` scores with ``output="scores"``.
            general: ``(H, W)`` labels. panoptic: ``(segmentation (H, W), segments_info)``. instance: a dict of
            "scores", "labels" and "masks".

        Raises:
            TypeError: images of another type or dtype, or an option that the task does not have.
            ValueError: an unknown task, sizes that do not fit the images, or windows, scales or ``flip`` out of range
                or with a task other than "semantic".
        """
        _check_tasks([task])
        views = EvaluationViews(window, tuple(scales), flip, view_batch)
        if views.single:
            return self.predict_tasks(images, {task: options}, sizes)[task]
        if task != "semantic":
            raise ValueError(f'window, scales and flip go with task "semantic", got {task!r}')
        batch = self.preprocessor(images)
        sizes = check_sizes(sizes, batch.sizes)
        crops = (pixels[:, :h, :w] for pixels, (h, w) in zip(batch.pixels, batch.sizes, strict=True))
        with self._evaluating():
            return [
                merge_views(views.of(image, size, self.final_logits), size, **options)
                for image, size in zip(crops, sizes, strict=True)
            ]

    @torch.inference_mode()
    def predict_tasks(
        self,
        images: Images,
        tasks: Mapping[str, Mapping[str, Any]],
        sizes: Size | Sequence[Size] | None = None,
    ) -> dict[str, list[Any]]:
        """The results of :meth:`predict` for several tasks, from one pass of the network over whole images.

        Args:
            images, sizes: as for :meth:`predict`.
            tasks: the options of each task, by the task's name.

        Raises:
            TypeError, ValueError: as for :meth:`predict`.
        """
        _check_tasks(tasks)
        batch = self.preprocessor(images)
        sizes = check_sizes(sizes, batch.sizes)
        with self._evaluating():
            class_logits, mask_embed, pixel_embed = self._predict(batch, all_layers=False)
        results = {}
        for task, options in tasks.items():
            options = dict(options)
            if task in ("panoptic", "instance"):
                options.setdefault("stuff_classes", self.config.stuff_classes)
            results[task] = infer(task, class_logits[-1], (mask_embed[-1], pixel_embed), batch, sizes, **options)
        return results

    def final_logits(self, images: Tensor) -> tuple[Tensor, Tensor, Size]:
        """The predictions of the last decoder layer only.

        Args:
            images: ``(B, C, H, W)`` in 0..1.

        Returns:
            class logits ``(B, N, K+1)``, mask logits ``(B, N, h, w)``, and the (height, width) of the padded input that
            the mask logits cover.
        """
        batch = self.preprocessor(images)
        class_logits, mask_embed, pixel_embed = self._predict(batch, all_layers=False)
        return class_logits[-1], mask_products(mask_embed[-1], pixel_embed), batch.padded_size

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

    def _weighted_losses(
        self, class_logits: Tensor, mask_embed: Tensor, pixel_embed: Tensor, targets: Targets
    ) -> dict[str, Tensor]:
        if self.config.matching == "fixed":
            targets = targets.merged_by_class()
        outputs = {"class_logits": class_logits, "mask_embed": mask_embed, "pixel_embed": pixel_embed}
        weights = self.criterion.weight_dict
        losses = self.criterion(outputs, targets)
        return {name: value * weights[name] for name, value in losses.items() if name in weights}


def _check_tasks(tasks: Iterable[str]) -> None:
    for task in tasks:
        if task not in INFERENCE_BY_TASK:
            raise ValueError(f"unknown task {task!r}; expected one of {', '.join(INFERENCE_BY_TASK)}")


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
        term=_mask_term(config),
    )


def _make_matcher(config: MaskFormerConfig) -> Matcher:
    if config.matching == "fixed":
        return FixedMatcher()
    return HungarianMatcher(config.class_cost, config.mask_cost, config.dice_cost, term=_mask_term(config))


def _mask_term(config: MaskFormerConfig) -> MaskTerm:
    return MaskTerm("focal", config.focal_alpha, config.focal_gamma, config.ignore_void)
