"""Structures (a) to (d) on images: the networks, the data, and one evaluation that serves every comparison."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from benchmarks.ablations.findings import GENERAL
from benchmarks.ablations.naming import ThingNames
from benchmarks.ablations.query_classes import QueryClasses
from benchmarks.ablations.variants import BIPARTITE, CLASS_WEIGHT, FIXED, PER_PIXEL, Run, Settings, Variant
from fastmask.cli.pretrain import MODEL
from fastmask.data import (
    Augmented,
    Compose,
    ResizeShortSide,
    SceneDataset,
    SegmentationDataset,
    check_datasets,
    collate,
    open_dataset,
)
from fastmask.data.open import number_of_icons
from fastmask.metrics import PanopticMetrics, SemanticMetrics
from fastmask.models import EoMTConfig, MaskFormer, MaskFormerConfig, PerPixelBaseline, PerPixelBaselineConfig
from fastmask.models._mask_classification import MaskClassificationConfig, MaskClassificationModel
from fastmask.models._registry import MODELS, make_config
from fastmask.targets import Targets
from fastmask.training.sampler import StepSampler

TINY = "tiny"  # the backbone in whose place structures have that of the demo's network
# The class probability of a segment in panoptic results; low, since short training gives few confident classes.
PANOPTIC_THRESHOLD = 0.2


def open_images(settings: Settings, split: str, task: str) -> SegmentationDataset:
    """The data set of a task; scenes in the size of the settings.

    Raises:
        FileNotFoundError, ValueError: as :func:`fastmask.data.open_dataset`.
    """
    if settings.composed:
        icons = number_of_icons(settings.data)
        return SceneDataset(split, size=(settings.size, settings.size), task=task, icons=icons)
    return open_dataset(settings.data, split, task=task)


def check_images(settings: Settings) -> None:
    """Raises one ValueError that names every broken file of both splits; only headers are read."""
    if not settings.composed:
        check_datasets((open_images(settings, split, "semantic") for split in ("train", "val")), full=False)


def has_panoptic_truth(settings: Settings) -> bool:
    """Whether the truth separates things, so that panoptic segmentation can be learned."""
    try:
        open_images(settings, "train", "panoptic")
    except ValueError:
        return False
    return True


def training_batches(settings: Settings, run: Run, workers: int, start: int = 0) -> Iterator[Any]:
    """The batches of a run from step ``start`` on. They depend only on the seed: all variants get the same ones in the
    same order."""
    dataset = open_images(settings, "train", run.variant.task)
    augmented = Augmented(dataset, settings.recipe(settings.choices(BIPARTITE)[0]).transform() or Compose(()), run.seed)
    sampler = StepSampler(len(augmented), settings.batch_size, run.seed, start, settings.steps)
    return iter(DataLoader(augmented, batch_sampler=sampler, collate_fn=collate, num_workers=workers))


def validation_batches(settings: Settings, task: str, workers: int) -> DataLoader:
    """The first images of the validation split; all but scenes are resized to the short side of the settings."""
    dataset = open_images(settings, "val", task)
    if not settings.composed:
        dataset = Augmented(dataset, ResizeShortSide((settings.size,)))
    subset = Subset(dataset, range(min(len(dataset), settings.val_samples)))
    return DataLoader(subset, settings.batch_size, collate_fn=collate, num_workers=workers)


def network_config(settings: Settings, num_classes: int, layers: int = 0, **changes: Any) -> MaskClassificationConfig:
    """The configuration of the preset for images of the settings' size.

    Args:
        settings: the preset's name and the size.
        num_classes: K.
        layers: as in a variant; 0 for the preset's number.
        changes: fields to change.

    Raises:
        ValueError: an unknown name, one of another family, or a value out of range.
    """
    preset = make_config(settings.model, num_classes)
    if not isinstance(preset, MaskClassificationConfig):
        raise ValueError(f"model is {settings.model!r}; expected a preset of MaskFormer, Mask2Former or EoMT")
    if settings.masked_attention:
        if not isinstance(preset, MaskFormerConfig):
            raise ValueError(f"masked_attention is True for model {settings.model!r}; expected a preset of MaskFormer")
        changes["masked_attention"] = True
    name = "decoder_layers"
    if isinstance(preset, EoMTConfig):
        name = "query_blocks"
        changes |= {"image_size": settings.size, "mask_probabilities": ()}  # by default one for each block
    return preset.replace(**changes, **({name: layers} if layers else {}))


def num_layers(config: MaskClassificationConfig) -> int:
    """The number of decoder layers, or of an EoMT's blocks with queries."""
    return config.query_blocks if isinstance(config, EoMTConfig) else config.decoder_layers


def most_layers(config: MaskClassificationConfig) -> float:
    """The largest possible :func:`num_layers`."""
    return config.encoder_layers if isinstance(config, EoMTConfig) else math.inf


def has_demo_backbone(config: MaskClassificationConfig) -> bool:
    """Whether networks have the backbone of the demo's network in place of the preset's."""
    return getattr(config, "backbone", "") == TINY


def check_weights(settings: Settings, config: MaskClassificationConfig) -> None:
    """Raises a FileNotFoundError that names a missing file of weights for the demo's backbone."""
    if has_demo_backbone(config) and settings.pretrained and not Path(settings.pretrained).is_file():
        raise FileNotFoundError(f"{settings.pretrained} is missing; benchmarks.ablations.backbone makes such a file")


def make_network(
    settings: Settings,
    variant: Variant,
    class_names: tuple[str, ...],
    stuff: tuple[int, ...],
    class_weight: float = CLASS_WEIGHT,
) -> Any:
    """A network of the preset with the variant's settings; structures are equal in everything that they share."""
    config = network_config(
        settings,
        len(class_names),
        variant.layers,
        class_names=class_names,
        stuff_classes=stuff,
        class_weight=class_weight,
        num_queries=variant.queries or len(class_names),
        **({"matching": "fixed"} if variant.structure == FIXED else {}),
    )
    from_demo = has_demo_backbone(config)
    if from_demo:
        demo = MaskFormer.from_pretrained(MODEL)
        config = replace(config, backbone=demo.config.backbone, backbone_options=demo.config.backbone_options)
    modules = {"pretrained_backbone": settings.pretrained} if settings.pretrained and not from_demo else {}
    if variant.structure in (FIXED, BIPARTITE):
        network: nn.Module = MODELS[config.model_type](config, **modules)
    else:
        own = {f.name for f in fields(PerPixelBaselineConfig)} - {"transformer_decoder", "ignore_index"}
        shared = {name: getattr(config, name) for name in own}
        plus = variant.structure != PER_PIXEL
        shared |= {"transformer_decoder": plus, "ignore_index": void_class(config.num_classes)}
        network = PerPixelBaseline(PerPixelBaselineConfig(**shared), **modules)
    if from_demo:
        weights = load_file(settings.pretrained) if settings.pretrained else demo.backbone.state_dict()
        network.backbone.load_state_dict(weights)
    return network.to(memory_format=torch.channels_last)


@torch.inference_mode()
def evaluate_images(
    network: MaskClassificationModel | PerPixelBaseline, batches: DataLoader, variant: Variant, stuff: tuple[int, ...]
) -> tuple[dict[str, float], QueryClasses | None]:
    """Metrics in 0..1, and the classes that each query predicted, from one pass over the images.

    "mIoU", and "PQ_st": PQ with each class of an image as one segment, by which the paper compares label maps. For mask
    classification also the same by general inference, with the prefix "general "; "PQ" if the truth is panoptic; and
    those of :class:`ThingNames`.
    """
    network.eval()
    num_classes = network.config.num_classes
    prefixes, queries = {"semantic": ""}, None
    if isinstance(network, MaskClassificationModel):
        prefixes["general"] = GENERAL
        queries = QueryClasses(network.config.num_queries, num_classes)
    void = void_class(num_classes)
    tasks: dict[str, dict[str, float]] = {"semantic": {}, "general": {"ignore_index": void}}
    semantic = {rule: SemanticMetrics(num_classes, ignore_index=void, boundary_share=None) for rule in prefixes}
    by_class = {rule: PanopticMetrics(num_classes, range(num_classes)) for rule in prefixes}
    panoptic, names = PanopticMetrics(num_classes, stuff), ThingNames(num_classes, stuff)
    if variant.task == "panoptic":
        tasks["panoptic"] = {"threshold": PANOPTIC_THRESHOLD}
    for images, targets in batches:
        images = [image.to(network.device) for image in images]
        if queries is None:
            results = {"semantic": network.predict(images)}
        else:
            results = network.predict_tasks(images, tasks)
            queries.update(network(images)["pred_logits"])
        merged = targets.merged_by_class()
        classes = merged.class_map(void)
        for b, labels in enumerate(results["semantic"]):
            names.update(labels.cpu(), classes[b, : labels.shape[0], : labels.shape[1]])
        for rule in prefixes:
            _count(semantic[rule], by_class[rule], results[rule], merged, classes)
        for b, (ids, infos) in enumerate(results.get("panoptic", ())):
            truth = targets.segments[b, : ids.shape[0], : ids.shape[1]]
            panoptic.update((ids, infos), truth, targets.labels[b])
    metrics = {f"{prefix}mIoU": semantic[rule].compute()["mIoU"] for rule, prefix in prefixes.items()}
    metrics |= {f"{prefix}PQ_st": by_class[rule].compute()["PQ"] for rule, prefix in prefixes.items()}
    if variant.task == "panoptic":
        metrics["PQ"] = panoptic.compute()["PQ"]
    return metrics | names.compute(), queries


def _count(
    semantic: SemanticMetrics, by_class: PanopticMetrics, labels: list[Tensor], merged: Targets, classes: Tensor
) -> None:
    for b, found in enumerate(labels):
        height, width = found.shape
        found = found.cpu()
        semantic.update(found, classes[b, :height, :width])
        segments = merged.segments[b, :height, :width]
        by_class.update(class_segments(found, semantic.num_classes), segments, merged.labels[b])


def void_class(num_classes: int) -> int:
    """The class of void pixels in label maps, outside of 0..K-1."""
    return max(255, num_classes)


def class_segments(labels: Tensor, num_classes: int) -> tuple[Tensor, list[dict[str, int]]]:
    """A label map ``(H, W)`` as a panoptic result with a segment for each class; other values belong to no segment."""
    found = np.unique(labels.numpy()).tolist()
    return labels, [{"id": label, "category_id": label} for label in found if label < num_classes]
