"""Images to label maps by a whole MaskFormer, weights and activations in the dtype of the case.

Both sides resize the scores, as transformers' post-processing does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.harness.graphs import captured
from benchmarks.harness.machine import Work
from benchmarks.harness.providers import compiled, require_backend
from benchmarks.harness.registry import Operation, Provider
from benchmarks.networks.models import (
    CASES,
    NetworkInputs,
    as_transformers,
    forward_flops,
    make_inputs,
    normalized,
    weight_bytes,
)
from fastmask import semantic_inference

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
ORDER = "scores"
Maps = list[Tensor]


class SmallRegret:
    """The labels' scores, by the float32 network and the reference, are on average the best ones to a tolerance: with
    random weights, and in bfloat16, the best classes lie too close for equal labels."""

    def __init__(self, inputs: NetworkInputs) -> None:
        model = copy.deepcopy(inputs.model).eval()
        with torch.no_grad():
            outputs = model(inputs.images)
            self.scores = [
                semantic_inference(classes[None], masks[None], inputs.size, order=ORDER, output="scores",
                                   backend="reference")[0]
                for classes, masks in zip(outputs["pred_logits"], outputs["pred_masks"], strict=True)
            ]  # fmt: skip
        self.tolerance = TOLERANCES[inputs.dtype]

    def disagreement(self, result: Maps, error_factor: float) -> str | None:
        if [labels.shape for labels in result] != [scores.shape[1:] for scores in self.scores]:
            return f"label maps have shapes {[tuple(labels.shape) for labels in result]}"
        for image, (labels, scores) in enumerate(zip(result, self.scores, strict=True)):
            best = scores.amax(0).double().mean()
            found = scores.gather(0, labels[None].long()).double().mean()
            if not 1 - found / best <= error_factor * self.tolerance:  # so that NaN fails
                return f"the labels of image {image} reach {found / best:.4f} of the best score"
        return None


def work(inputs: NetworkInputs) -> Work:
    """The network forward, and the product of class and mask scores; weights read and labels written once."""
    size = torch.finfo(inputs.dtype).bits // 8
    height, width = inputs.size
    scored = inputs.images.shape[0] * (height // 4) * (width // 4) * inputs.model.config.num_queries
    return Work(
        bytes=weight_bytes(inputs) * size // 4 + inputs.images.nbytes + inputs.images[:, 0].numel(),
        flops=forward_flops(inputs) + 2 * scored * inputs.model.config.num_classes,
    )


def own_model(inputs: NetworkInputs) -> nn.Module:
    device = inputs.images.device
    require_backend("semantic_inference", "triton" if device.type == "cuda" else "native", inputs.images)
    return copy.deepcopy(inputs.model).to(inputs.dtype).eval()


def prepare_fastmask(inputs: NetworkInputs) -> Callable[[], Maps]:
    model = own_model(inputs)
    return lambda: model.predict(inputs.images, order=ORDER)


def prepare_graph(inputs: NetworkInputs) -> Callable[[], Maps]:
    return captured(prepare_fastmask(inputs), inputs.images.device)


def prepare_compiled_fastmask(inputs: NetworkInputs) -> Callable[[], Maps]:
    """The network compiled, by its forward; the last step is an operator of its own."""
    network = compiled(own_model(inputs), inputs.images.device)

    @torch.no_grad()
    def call() -> Maps:
        outputs = network(inputs.images)
        return list(semantic_inference(outputs["pred_logits"], outputs["pred_masks"], inputs.size, order=ORDER))

    return call


def transformers_call(inputs: NetworkInputs, wrap: Callable[[nn.Module], Callable[..., object]]) -> Callable[[], Maps]:
    from transformers import MaskFormerImageProcessor

    processor = MaskFormerImageProcessor()
    network = wrap(as_transformers(inputs.model, auxiliary_loss=False).to(inputs.dtype))
    pixels = normalized(inputs).to(inputs.dtype)
    sizes = [inputs.size] * len(pixels)

    @torch.no_grad()
    def call() -> Maps:
        return processor.post_process_semantic_segmentation(network(pixel_values=pixels), sizes)

    return call


def prepare_transformers(inputs: NetworkInputs) -> Callable[[], Maps]:
    return transformers_call(inputs, lambda model: model)


def prepare_compiled_transformers(inputs: NetworkInputs) -> Callable[[], Maps]:
    def wrap(model: nn.Module) -> Callable[..., object]:
        torch.compiler.reset()
        return torch.compile(model)

    return transformers_call(inputs, wrap)


OPERATION = Operation(
    title="Images to semantic label maps of their size by a whole MaskFormer; memory beyond the weights",
    cases=CASES,
    providers=(
        Provider("fastmask", prepare_fastmask),
        Provider("fastmask, CUDA graph", prepare_graph, keeps_memory=True),
        Provider("fastmask, torch.compile", prepare_compiled_fastmask, compiles=True),
        Provider("transformers", prepare_transformers),
        Provider("transformers, torch.compile", prepare_compiled_transformers, compiles=True),
    ),
    baseline="transformers",
    make_inputs=make_inputs,
    oracle=SmallRegret,
    work=work,
)
