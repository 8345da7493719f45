"""MaskFormer: per-pixel segmentation as the classification of masks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmask.functional import mask_products, merge_views
from fastmask.mask_term import MaskTerm
from fastmask.models.base import Images, PixelDecoderModel
from fastmask.models.config import MaskFormerConfig
from fastmask.models.images import ImageBatch, Size, fit_targets
from fastmask.models.inference import TASKS, check_sizes, infer
from fastmask.models.views import EvaluationViews
from fastmask.modules.criterion import SetCriterion
from fastmask.modules.masked_predictor import MaskedTransformerPredictor
from fastmask.modules.matcher import FixedMatcher, HungarianMatcher, Matcher
from fastmask.modules.predictor import TransformerPredictor
from fastmask.targets import Targets

MASKED_LEVELS = 3  # feature levels that masked attention reads, coarse to fine


class MaskFormer(PixelDecoderModel):
    """Mask classification for semantic, panoptic and instance segmentation (Cheng et al., arXiv:2107.06278); with
    ``masked_attention=True``, the transformer decoder of Mask2Former (Cheng et al., arXiv:2112.01527).

    ``MaskFormer(config)``, or ``MaskFormer(num_classes=150, backbone="swin-tiny", ...)`` with the fields of
    :class:`MaskFormerConfig` as keywords.

    Args:
        config: the configuration; None to give its fields as keywords.
        backbone: a name, as in the configuration; or a module that returns a list or tuple of maps at the strides 4,
            8, 16 and 32, from fine to coarse (with a configuration, only a module).
        backbone_channels: the channels of these maps; by default the module's attribute ``channels``.
        pretrained_backbone: a folder or hub id from which ``transformers`` reads the backbone; "imagenet" for
            EfficientNet-lite0, whose weights are a package.
        options: fields of the configuration.

    Raises:
        TypeError: both a configuration and fields, neither, or a field of the wrong type.
        ValueError: a value out of range, or an unknown backbone; the message lists the known ones.
    """

    config_class = MaskFormerConfig
    class_weights = ("predictor.class_embed.",)
    unsaved = ("criterion.",)
    config: MaskFormerConfig

    def _build_head(self) -> None:
        config = self.config
        options = self._transformer_options | {"num_classes": config.num_classes, "num_queries": config.num_queries}
        if config.masked_attention:
            options["input_dim"] = config.pixel_decoder_dim
            options["num_levels"] = min(MASKED_LEVELS, len(self.channels), config.decoder_layers)
        predictor = MaskedTransformerPredictor if config.masked_attention else TransformerPredictor
        self.predictor = predictor(**options)
        self.criterion = _make_criterion(self.config)

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
        *,
        window: tuple[int, int] | None = None,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        view_batch: int = 1,
        **options: Any,
    ) -> list[Any]:
        """Results at the size asked for. Runs in evaluation mode, without gradients, and computes masks after the last
        decoder layer only; a semantic map never needs the mask logits of the whole image at once.

        With a window, several scales or ``flip`` a semantic map is the average of the scores of several views, as the
        papers report it (see :func:`fastmask.functional.merge_views`); scores of the whole image do not exist unless
        they are asked for.

        Args:
            images: as for a call of the model.
            task: "semantic", "general" (a semantic map by the hard assignment of pixels to queries), "panoptic" or
                "instance".
            sizes: (height, width) of the results, for all images or for each; by default each image's own.
            window: (size, stride) of square windows in which each image is predicted, in pixels of the image as scaled;
                None for whole images.
            scales: how much to enlarge each image; (0.5, 0.75, 1, 1.25, 1.5, 1.75) is usual.
            flip: predict mirror images as well.
            view_batch: how many views to predict at a time.
            options: further arguments of :func:`fastmask.semantic_inference`, :func:`fastmask.general_inference`,
                :func:`fastmask.panoptic_inference` or :func:`fastmask.instance_inference`, such as ``threshold``.
                ``stuff_classes`` is the configuration's unless given.

        Returns:
            One entry an image. semantic: ``(H, W)`` labels, or ``(K, H, W)`` scores with ``output="scores"``. general:
            ``(H, W)`` labels. panoptic: ``(segmentation (H, W), segments_info)``. instance: a dict of "scores",
            "labels" and "masks".

        Raises:
            TypeError: images of another type or dtype, or an option that the task does not have.
            ValueError: an unknown task, sizes that do not fit the images, or windows, scales or mirror images that
                are out of range or asked for in another task than "semantic".
        """
        _check_tasks([task])
        views = EvaluationViews(window, tuple(scales), flip, view_batch)
        if views.single:
            return self.predict_tasks(images, {task: options}, sizes)[task]
        if task != "semantic":
            raise ValueError(f'window, scales and flip go with task "semantic", got {task!r}')
        batch = self._batch(images)
        sizes = check_sizes(sizes, batch.sizes)
        images = (pixels[:, :h, :w] for pixels, (h, w) in zip(batch.pixels, batch.sizes, strict=True))
        with self._evaluating():
            return [
                merge_views(views.of(image, size, self.final_logits), size, **options)
                for image, size in zip(images, sizes, strict=True)
            ]

    @torch.inference_mode()
    def predict_tasks(
        self,
        images: Images,
        tasks: Mapping[str, Mapping[str, Any]],
        sizes: Size | Sequence[Size] | None = None,
    ) -> dict[str, list[Any]]:
        """What :meth:`predict` gives for each of several tasks, from one pass of the network over whole images.

        Args:
            images, sizes: as for :meth:`predict`.
            tasks: the options of each task, by the task's name.

        Raises:
            TypeError, ValueError: as for :meth:`predict`.
        """
        _check_tasks(tasks)
        batch = self._batch(images)
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
        """The predictions of the last decoder layer alone.

        Args:
            images: ``(B, C, H, W)`` in 0..1.

        Returns:
            class logits ``(B, N, K+1)``, mask logits ``(B, N, h, w)``, and the (height, width) of the padded input that
            these cover.
        """
        batch = self._batch(images)
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
        return self.pixel_decoder.mask_features(maps[-1]), maps[: self.predictor.num_levels]

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
        if task not in TASKS:
            raise ValueError(f"unknown task {task!r}; expected one of {', '.join(TASKS)}")


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
