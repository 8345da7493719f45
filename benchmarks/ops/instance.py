"""Instance segmentation of images from the network's logits: binary masks, and run lengths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness.machine import Work
from benchmarks.harness.providers import fastmask_backend
from benchmarks.harness.registry import Case, Operation, Provider, Unavailable
from benchmarks.ops.inputs import InferenceInputs, build_predictions
from fastmask import instance_inference

# A COCO image: 80 classes of things, the 100 best pairs, as many of them as there are queries.
COCO = {"images": 1, "queries": 100, "classes": 80, "grid": (200, 304), "size": (800, 1216)}
QUICK = COCO | {"queries": 20, "grid": (32, 40), "size": (128, 160), "objects": 8, "confident": 8}
BATCH = COCO | {"images": 8, "objects": 20, "confident": 100}
CASES = (
    Case("quick", QUICK, ("quick",)),
    Case("800x1216, masks", COCO | {"objects": 20, "confident": 100}, ("cpu",), ("float32", "bfloat16")),
    Case("800x1216, run lengths", COCO | {"objects": 20, "confident": 100, "output": "rle"}, ("cpu",)),
    Case("800x1216, masks of noise", COCO | {"objects": 20, "confident": 100, "masks": "noise"}, ("cpu",)),
    Case("B8 800x1216, masks", BATCH, ("gpu",), ("bfloat16",)),
    Case("B8 800x1216, run lengths", BATCH | {"output": "rle"}, ("gpu",), ("bfloat16",)),
)


@dataclass(frozen=True)
class InstanceInputs:
    """Predictions, and the form of the result: "masks" or "rle"."""

    predictions: InferenceInputs
    output: str

    @property
    def top_k(self) -> int:
        return self.predictions.class_logits.shape[1]


def make_inputs(sizes: Any, dtype: torch.dtype, device: torch.device) -> InstanceInputs:
    sizes = dict(sizes)
    output = sizes.pop("output", "masks")
    return InstanceInputs(build_predictions(dtype, device, **sizes), output)


class Instances(NamedTuple):
    """What a provider found, by which rule: for each image the scores and areas of instances that are not empty."""

    rule: str
    images: list[tuple[Tensor, Tensor]]


class InstanceAgreement:
    """Results are right when each image has as many instances as the reference in float64 finds by the provider's own
    rule, with the same scores, and as many pixels in all but for one in a thousand: borders move with rounding.

    Scores agree to 1e-5, as transformers rounds them to 1e-6.
    """

    def __init__(self, inputs: InstanceInputs) -> None:
        inputs = InstanceInputs(inputs.predictions.to(torch.float64), "masks")
        self.expected = cache(lambda rule: from_fastmask(run_fastmask(inputs, rule, "reference"), rule))

    def disagreement(self, result: Instances, error_factor: float) -> str | None:
        expected = self.expected(result.rule)
        for (scores, areas), (wanted, wanted_areas) in zip(result.images, expected.images, strict=True):
            if len(scores) != len(wanted):
                return f"has {len(scores)} instances; expected {len(wanted)}"
            if len(scores) == 0:
                continue
            error = (scores.double().cpu().sort().values - wanted.cpu().sort().values).abs().max().item()
            if not error <= 1e-5:
                return f"scores are off by {error:.2e}; at most 1e-5 is allowed"
            difference = abs(areas.sum().item() - wanted_areas.sum().item())
            if difference > 1e-3 * wanted_areas.sum().item():
                return f"masks differ by {difference} pixels of {wanted_areas.sum().item()}"
        return None


def run_fastmask(inputs: InstanceInputs, rule: str, backend: str) -> list[dict[str, Any]]:
    predictions = inputs.predictions
    return instance_inference(
        predictions.class_logits,
        predictions.mask_logits,
        predictions.size,
        rule=rule,
        top_k=inputs.top_k,
        output=inputs.output,
        backend=backend,
    )


def rle_area(rle: dict[str, Any]) -> int:
    from pycocotools import mask

    return int(mask.area(rle))


def from_fastmask(raw: list[dict[str, Any]], rule: str) -> Instances:
    images = []
    for result in raw:
        if "masks" in result:
            areas = result["masks"].sum((1, 2))
        else:
            areas = torch.tensor([rle_area(rle) for rle in result["rle"]], device=result["scores"].device)
        images.append((result["scores"][areas > 0], areas[areas > 0]))
    return Instances(rule, images)


def with_rule(backend: str, rule: str) -> Provider:
    def prepare(inputs: InstanceInputs, backend: str) -> Callable[[], Any]:
        require_pycocotools(inputs)
        return lambda: run_fastmask(inputs, rule, backend)

    return fastmask_backend(
        backend,
        "instance_masks",
        "predictions.mask_logits",
        prepare,
        lambda raw, _: from_fastmask(raw, rule),
        f", rule {rule}",
    )


def require_pycocotools(inputs: InstanceInputs) -> None:
    """Run lengths are read by it, whoever made them."""
    if inputs.output == "rle":
        import pycocotools.mask  # noqa: F401


def prepare_transformers(inputs: InstanceInputs) -> Callable[[], Any]:
    """All instances, also those of low scores. Logits in float32: its results have no better dtype."""
    from transformers import MaskFormerImageProcessor

    if inputs.output == "rle":
        raise Unavailable("transformers gives run lengths of a map of segments alone, not of masks")
    processor, predictions = MaskFormerImageProcessor(), inputs.predictions
    outputs = SimpleNamespace(
        class_queries_logits=predictions.class_logits.float(), masks_queries_logits=predictions.mask_logits.float()
    )
    return lambda: processor.post_process_instance_segmentation(
        outputs,
        threshold=0.0,
        target_sizes=[predictions.size] * len(predictions.class_logits),
        return_binary_maps=True,
    )


def from_transformers(raw: list[dict[str, Any]], inputs: InstanceInputs) -> Instances:
    images = []
    for image in raw:
        scores = torch.tensor([info["score"] for info in image["segments_info"]])
        images.append((scores, image["segmentation"].sum((1, 2)) if len(scores) else scores))
    return Instances("huggingface", images)


def eager_image(
    class_logits: Tensor, mask_logits: Tensor, size: tuple[int, int], top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(scores, labels, masks) of one image as eager code does it: all masks upsampled, then picked."""
    masks = F.interpolate(mask_logits[None], size, mode="bilinear", align_corners=False)[0]
    probabilities = class_logits.softmax(-1)[:, :-1]
    values, index = probabilities.flatten().topk(top_k)
    x = masks[index // probabilities.shape[1]]
    inside = (x > 0).float()
    mask_scores = (x.sigmoid() * inside).flatten(1).sum(1) / (inside.flatten(1).sum(1) + 1e-6)
    return values * mask_scores, index % probabilities.shape[1], inside.bool()


def prepare_eager(inputs: InstanceInputs) -> Callable[[], Any]:
    """Run lengths by pycocotools."""
    class_logits, mask_logits = inputs.predictions.class_logits.float(), inputs.predictions.mask_logits.float()
    if inputs.output == "rle":
        from pycocotools import mask as coco

    @torch.no_grad()
    def call() -> list[dict[str, Any]]:
        results = []
        for image in zip(class_logits, mask_logits, strict=True):
            scores, _, masks = eager_image(*image, inputs.predictions.size, inputs.top_k)
            if inputs.output == "rle":
                masks = [coco.encode(np.asfortranarray(mask.byte().cpu().numpy())) for mask in masks]
            results.append({"scores": scores, inputs.output: masks})
        return results

    return call


def work(inputs: InstanceInputs) -> Work:
    """The logits of the queries picked read, at most all; masks written as bytes, run lengths as next to nothing."""
    predictions = inputs.predictions
    pixels = len(predictions.class_logits) * inputs.top_k * predictions.size[0] * predictions.size[1]
    return Work(bytes=predictions.mask_logits.nbytes + (pixels if inputs.output == "masks" else 0))


OPERATION = Operation(
    title="Instance segmentation at the images' size",
    cases=CASES,
    providers=(
        *(with_rule(backend, rule) for backend in ("native", "triton") for rule in ("mask2former", "huggingface")),
        Provider("eager original", prepare_eager, lambda raw, _: from_fastmask(raw, "mask2former")),
        Provider("transformers", prepare_transformers, from_transformers),
        with_rule("reference", "mask2former"),
    ),
    baseline="eager original",
    make_inputs=make_inputs,
    oracle=InstanceAgreement,
    work=work,
)
