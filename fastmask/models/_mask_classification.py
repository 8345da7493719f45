"""What the networks that classify masks have in common: calls, losses and results."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from fastmask.functional import mask_products, merge_views
from fastmask.mask_term import MaskTerm
from fastmask.models._base import PretrainedModel
from fastmask.models._configuration import ModelConfig, require
from fastmask.models._images import ImageBatch, Images, Size, fit_targets
from fastmask.models._inference import INFERENCE_BY_TASK, check_sizes, infer
from fastmask.models._views import EvaluationViews
from fastmask.modules.criterion import SetCriterion
from fastmask.modules.matcher import HungarianMatcher, Matcher
from fastmask.modules.point_sampling import PointSampling
from fastmask.modules.predictions import Predictions
from fastmask.ops._checks import check_point_sampling
from fastmask.targets import Targets


@dataclass(frozen=True)
class MaskClassificationConfig(ModelConfig):
    """Base class of the configurations of these networks: queries, losses and costs. The defaults are MaskFormer's.

    Args:
        num_queries: N.
        class_weight: weight of the classification loss.
        mask_weight: weight of the mask loss.
        dice_weight: weight of the dice loss.
        no_object_weight: weight of the "no object" class in the classification loss.
        class_cost: weight of the class probability in the matching cost.
        mask_cost: weight of the mask term in the matching cost.
        dice_cost: weight of the dice term in the matching cost.
        ignore_void: exclude unlabeled pixels, and the padding of images, from mask losses and matching costs;
            otherwise they are background of every mask, as in the authors' code. :mod:`fastmask.training` sets it.
        stuff_classes: the classes whose regions panoptic inference merges; all others are things.
    """

    num_queries: int = 100
    class_weight: float = 1.0
    mask_weight: float = 20.0
    dice_weight: float = 1.0
    no_object_weight: float = 0.1
    class_cost: float = 1.0
    mask_cost: float = 20.0
    dice_cost: float = 1.0
    ignore_void: bool = False
    stuff_classes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(1, "num_queries")
        for f in fields(self):
            if f.name.endswith(("_weight", "_cost")) or f.name.startswith("focal_"):
                value = getattr(self, f.name)
                require(value >= 0 and math.isfinite(value), f.name, value, "finite and at least 0")
        wrong = [c for c in self.stuff_classes if not 0 <= c < self.num_classes]
        require(not wrong, "stuff_classes", wrong, f"in 0..{self.num_classes - 1}")

    @property
    def num_predictions(self) -> int:
        """L, the number of supervised predictions."""
        raise NotImplementedError

    @property
    def mask_term(self) -> MaskTerm:
        """How losses and matching costs compare masks."""
        raise NotImplementedError

    @property
    def points(self) -> PointSampling | None:
        """The random points at which masks are compared; None for all pixels."""
        return None

    @property
    def thing_classes(self) -> tuple[int, ...]:
        """The classes that are not stuff."""
        return tuple(c for c in range(self.num_classes) if c not in self.stuff_classes)


@dataclass(frozen=True)
class PointSampledConfig(MaskClassificationConfig):
    """The losses and costs of Mask2Former (arXiv:2112.01527, section 3.3): cross-entropy and dice at random points.

    Args:
        num_points: the number of points P at which a predicted mask and its target are compared.
        oversample_ratio: candidates per point of the losses, at least 1.
        importance_sample_ratio: the share of the losses' points, 0..1, that are chosen where the mask is uncertain.
    """

    class_weight: float = 2.0
    mask_weight: float = 5.0
    dice_weight: float = 5.0
    class_cost: float = 2.0
    mask_cost: float = 5.0
    dice_cost: float = 5.0
    num_points: int = 12544
    oversample_ratio: float = 3.0
    importance_sample_ratio: float = 0.75

    def __post_init__(self) -> None:
        super().__post_init__()
        check_point_sampling(self.num_points, self.oversample_ratio, self.importance_sample_ratio)

    @property
    def mask_term(self) -> MaskTerm:
        return MaskTerm("bce", ignore_void=self.ignore_void)

    @property
    def points(self) -> PointSampling:
        return PointSampling(self.num_points, self.oversample_ratio, self.importance_sample_ratio)


class MaskClassificationModel(PretrainedModel):
    """Base class of the networks that predict one class distribution and one mask for each of N queries.

    A subclass builds ``preprocessor`` and ``criterion`` (see :func:`make_criterion`) and defines ``_predict``.
    """

    tasks = tuple(INFERENCE_BY_TASK)
    views = ("window", "scales", "flip")
    unsaved = ("criterion.",)
    config: MaskClassificationConfig
    criterion: SetCriterion

    def _predict(self, batch: ImageBatch, *, all_layers: bool) -> tuple[Tensor, Tensor, Tensor]:
        """``class_logits (L, B, N, K+1)``, ``mask_embed (L, B, N, C)`` and ``pixel_embed (B, C, h, w)``."""
        raise NotImplementedError

    def _predict_layers(self, batch: ImageBatch) -> list[tuple[Tensor, Tensor, Tensor]]:
        """The supervised predictions, as of :meth:`_predict`; in groups of layers if their pixel embeddings differ."""
        return [self._predict(batch, all_layers=self.config.num_predictions > 1)]

    def forward(
        self, images: Images, targets: Targets | Sequence[Mapping[str, Tensor]] | None = None
    ) -> dict[str, Any]:
        """Predictions, or losses if there are targets.

        Args:
            images: ``(B, C, H, W)`` floating point in 0..1, or a list of ``(C, H_b, W_b)`` of any sizes, which are
                padded at the bottom and right and masked; height and width of the batch become multiples of
                ``size_divisibility``. The model normalizes the images itself. EoMT differs, see its description.
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
        groups = self._predict_layers(batch)
        if targets is not None:
            predictions = [Predictions(classes, None, (masks, pixels)) for classes, masks, pixels in groups]
            return self._weighted_losses(predictions, targets)
        class_logits = _joined([classes for classes, _, _ in groups])
        return _outputs(class_logits, _joined([mask_products(masks, pixels) for _, masks, pixels in groups]))

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
        check_tasks([task])
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
        """The results of :meth:`predict` for several tasks, from one pass of the network over whole images (an
        :class:`fastmask.EoMT` needs another pass for "semantic").

        Args:
            images, sizes: as for :meth:`predict`.
            tasks: the options of each task, by the task's name.

        Raises:
            TypeError, ValueError: as for :meth:`predict`.
        """
        check_tasks(tasks)
        batch = self.preprocessor(images)
        sizes = check_sizes(sizes, batch.sizes)
        with self._evaluating():
            return self._results(batch, tasks, sizes)

    def _results(
        self, batch: ImageBatch, tasks: Mapping[str, Mapping[str, Any]], sizes: Sequence[Size]
    ) -> dict[str, list[Any]]:
        """The results of :meth:`predict_tasks`, in evaluation mode."""
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

    def _weighted_losses(self, predictions: Sequence[Predictions], targets: Targets) -> dict[str, Tensor]:
        """The criterion's losses of groups of layers, times their weights."""
        weights = self.criterion.weight_dict
        losses = self.criterion(predictions, targets)
        return {name: value * weights[name] for name, value in losses.items() if name in weights}


def _joined(layers: list[Tensor]) -> Tensor:
    """Groups of layers as one tensor; a single group is not copied."""
    return torch.cat(layers) if len(layers) > 1 else layers[0]


def _outputs(class_logits: Tensor, mask_logits: Tensor) -> dict[str, Any]:
    """The predictions of L stacked layers, as :meth:`MaskClassificationModel.forward` returns them."""
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


def make_criterion(config: MaskClassificationConfig, matcher: Matcher | None = None) -> SetCriterion:
    """The criterion of a configuration; by default with its Hungarian matcher."""
    term, points = config.mask_term, config.points
    weights = {"loss_ce": config.class_weight, "loss_mask": config.mask_weight, "loss_dice": config.dice_weight}
    earlier = range(config.num_predictions - 1)
    weights |= {f"{name}_{layer}": weight for layer in earlier for name, weight in list(weights.items())}
    if matcher is None:
        matcher = HungarianMatcher(config.class_cost, config.mask_cost, config.dice_cost, term=term, points=points)
    return SetCriterion(
        config.num_classes, matcher, weights, config.no_object_weight, ["labels", "masks"], term=term, points=points
    )


def check_tasks(tasks: Iterable[str]) -> None:
    """Raises a ValueError for a task that is not one of ``INFERENCE_BY_TASK``."""
    for task in tasks:
        if task not in INFERENCE_BY_TASK:
            raise ValueError(f"unknown task {task!r}; expected one of {', '.join(INFERENCE_BY_TASK)}")
