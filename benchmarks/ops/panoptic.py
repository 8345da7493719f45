"""Panoptic segmentation of images from the network's logits."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness.machine import Work
from benchmarks.harness.providers import fastmask_backend
from benchmarks.harness.registry import Case, Operation, Provider
from benchmarks.ops.inputs import InferenceInputs, make_predictions
from fastmask import panoptic_inference

# A COCO image; 133 classes, none of them fused: ids that transformers repeats for fused classes could not be compared.
COCO = {"images": 1, "queries": 100, "classes": 133, "grid": (200, 304), "size": (800, 1216)}
QUICK = COCO | {"queries": 20, "grid": (32, 40), "size": (128, 160), "objects": 8, "confident": 8}
CASES = (
    Case("quick", QUICK, ("quick",)),
    Case("800x1216, 15 of 100 kept", COCO | {"objects": 15, "confident": 15}, ("cpu",), ("float32", "bfloat16")),
    Case("800x1216, 30 of 100 kept", COCO | {"objects": 30, "confident": 30}, ("cpu",)),
    Case("800x1216, all 100 kept", COCO | {"objects": 20, "confident": 100}, ("cpu",)),
    Case("800x1216, all 100 kept, noise", COCO | {"objects": 20, "confident": 100, "masks": "noise"}, ("cpu",)),
    Case("B8 800x1216, 30 of 100 kept", COCO | {"images": 8, "objects": 30, "confident": 30}, ("gpu",), ("bfloat16",)),
)
THRESHOLDS = {"threshold": 0.8, "mask_threshold": 0.5}
OVERLAP = 0.8


class Segmented(NamedTuple):
    """What a provider found, by which rule: for each image its map, and its segments' categories by id."""

    rule: str
    images: list[tuple[Tensor, list[int]]]


class SegmentAgreement:
    """Results are right when each image has the segments of the provider's own rule, by the reference in float64, in
    the same order, and at most one pixel in a thousand differs: borders move with rounding."""

    TOLERANCE = 1e-3

    def __init__(self, inputs: InferenceInputs) -> None:
        inputs = inputs.to(torch.float64)
        self.expected = cache(lambda rule: from_fastmask(run_fastmask(inputs, rule, "reference"), rule))

    def disagreement(self, result: Segmented, error_factor: float) -> str | None:
        expected = self.expected(result.rule)
        for (ids, categories), (wanted, wanted_categories) in zip(result.images, expected.images, strict=True):
            if categories != wanted_categories:
                return f"has segments of the categories {categories}; expected {wanted_categories}"
            share = (ids != wanted).float().mean().item()
            if share > self.TOLERANCE:
                return f"differs in {share:.2%} of the pixels; at most {self.TOLERANCE:.2%} may"
        return None


def run_fastmask(inputs: InferenceInputs, rule: str, backend: str) -> list[tuple[Tensor, list[dict[str, Any]]]]:
    return panoptic_inference(
        inputs.class_logits,
        inputs.mask_logits,
        inputs.size,
        rule=rule,
        overlap_threshold=OVERLAP,
        backend=backend,
        **THRESHOLDS,
    )


def from_fastmask(raw: list[tuple[Tensor, list[dict[str, Any]]]], rule: str) -> Segmented:
    return Segmented(rule, [(ids, [info["category_id"] for info in infos]) for ids, infos in raw])


def with_rule(backend: str, rule: str) -> Provider:
    def prepare(inputs: InferenceInputs, backend: str) -> Callable[[], Any]:
        return lambda: run_fastmask(inputs, rule, backend)

    return fastmask_backend(
        backend, "panoptic_winners", "mask_logits", prepare, lambda raw, _: from_fastmask(raw, rule), f", rule {rule}"
    )


def prepare_transformers(inputs: InferenceInputs) -> Callable[[], Any]:
    """Logits in float32: its results have no better dtype."""
    from transformers import MaskFormerImageProcessor

    processor = MaskFormerImageProcessor()
    outputs = SimpleNamespace(
        class_queries_logits=inputs.class_logits.float(), masks_queries_logits=inputs.mask_logits.float()
    )
    return lambda: processor.post_process_panoptic_segmentation(
        outputs,
        overlap_mask_area_threshold=OVERLAP,
        label_ids_to_fuse=set(),
        target_sizes=[inputs.size] * len(outputs.class_queries_logits),
        **THRESHOLDS,
    )


def from_transformers(raw: list[dict[str, Any]], inputs: InferenceInputs) -> Segmented:
    images = [(image["segmentation"], [info["label_id"] for info in image["segments_info"]]) for image in raw]
    return Segmented("huggingface-exact", images)


def eager_image(class_logits: Tensor, mask_logits: Tensor, size: tuple[int, int]) -> tuple[Tensor, list[int]]:
    """One image as eager code does it (MaskFormer, section 3.4): all masks upsampled, then query by query."""
    scores, classes = class_logits.softmax(-1).max(-1)
    masks = F.interpolate(mask_logits[None], size, mode="bilinear", align_corners=False)[0].sigmoid()
    keep = (classes != class_logits.shape[-1] - 1) & (scores > THRESHOLDS["threshold"])
    masks, scores, classes = masks[keep], scores[keep], classes[keep]
    ids = torch.zeros(size, dtype=torch.int32, device=masks.device)
    categories: list[int] = []
    if len(masks) == 0:
        return ids, categories
    winner = (scores[:, None, None] * masks).argmax(0)
    for query, category in enumerate(classes.tolist()):
        won = winner == query
        area, mask_area = won.sum().item(), (masks[query] >= THRESHOLDS["mask_threshold"]).sum().item()
        if area > 0 and mask_area > 0 and area / mask_area >= OVERLAP:
            categories.append(category)
            ids[won] = len(categories)
    return ids, categories


def prepare_eager(inputs: InferenceInputs) -> Callable[[], Any]:
    class_logits, mask_logits = inputs.class_logits.float(), inputs.mask_logits.float()

    @torch.no_grad()
    def call() -> list[tuple[Tensor, list[int]]]:
        return [eager_image(*image, inputs.size) for image in zip(class_logits, mask_logits, strict=True)]

    return call


def work(inputs: InferenceInputs) -> Work:
    """The logits of kept queries read, one id a pixel written; bounds may decide every pixel."""
    pixels = len(inputs.class_logits) * inputs.size[0] * inputs.size[1]
    return Work(bytes=int(inputs.kept.sum()) * inputs.mask_logits[0, 0].nbytes + 4 * pixels)


OPERATION = Operation(
    title="Panoptic segmentation at the images' size",
    cases=CASES,
    providers=(
        *(with_rule(backend, rule) for backend in ("native", "triton") for rule in ("huggingface", "maskformer")),
        Provider("transformers", prepare_transformers, from_transformers),
        Provider("eager original", prepare_eager, lambda raw, _: Segmented("maskformer", raw)),
        with_rule("reference", "maskformer"),
    ),
    baseline="transformers",
    make_inputs=make_predictions,
    oracle=SegmentAgreement,
    work=work,
)
