"""Semantic labels at the image's size, from class and mask logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness.machine import Work
from benchmarks.harness.providers import compiled, fastmask_backends
from benchmarks.harness.registry import Case, Operation, Provider, Unavailable
from benchmarks.ops.inputs import make_scene
from fastmask import semantic_inference

OBJECTS = 20  # queries that are objects; where the others are not, they are sure of it by 0.99
QUICK = {"images": 2, "classes": 7, "grid": (12, 17), "size": (48, 60), "kind": "trained no-object"}
ADE = {"images": 1, "classes": 150, "grid": (128, 128), "size": (512, 512)}
CITYSCAPES = {"images": 1, "classes": 19, "grid": (256, 512), "size": (1024, 2048)}


def cases(name: str, sizes: Mapping[str, Any], suite: str, dtype: str) -> list[Case]:
    kinds = {"noise": "noise", "noise, 80 no-object": "noise no-object", "trained, 80 no-object": "trained no-object"}
    return [Case(f"{name}, {words}", sizes | {"kind": kind}, (suite,), (dtype,)) for words, kind in kinds.items()]


CASES = (
    Case("quick", QUICK, ("quick",)),
    Case("quick, scores resized", QUICK | {"kind": "noise", "order": "scores"}, ("quick",)),
    *cases("512x512 K150", ADE, "cpu", "float32"),
    Case("512x512 K150, scores resized", ADE | {"kind": "noise", "order": "scores"}, ("cpu",)),
    *cases("1024x2048 K19", CITYSCAPES, "cpu", "float32"),
    *cases("B8 512x512 K150", ADE | {"images": 8}, "gpu", "bfloat16"),
    Case("2048x4096 K150", ADE | {"grid": (512, 1024), "size": (2048, 4096), "kind": "noise"}, ("gpu",), ("bfloat16",)),
)


@dataclass(frozen=True)
class SemanticInputs:
    """What one image's network says: ``class_logits (B, N, K+1)``, ``mask_logits (B, N, h, w)``."""

    class_logits: Tensor
    mask_logits: Tensor
    size: tuple[int, int]
    order: str


def make_inputs(sizes: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> SemanticInputs:
    """Noise, or smooth masks of the segments of a scene; with all queries alike, or all but OBJECTS no-object."""
    generator = torch.Generator().manual_seed(0)
    queries, classes, grid = 100, sizes["classes"], sizes["grid"]
    class_logits = torch.randn(sizes["images"], queries, classes + 1, generator=generator)
    if sizes["kind"].startswith("trained"):
        segments = F.one_hot(make_scene(OBJECTS, sizes["size"], generator).long(), 256)[..., :OBJECTS]
        soft = F.adaptive_avg_pool2d(segments.permute(2, 0, 1).float(), grid)
        coarse = F.interpolate(torch.randn(sizes["images"], queries, 9, 9, generator=generator), grid, mode="bicubic")
        mask_logits = 4 * coarse - 4
        mask_logits[:, :OBJECTS] = 12 * (2 * soft - 1) + coarse[:, :OBJECTS]
        mask_logits += 0.3 * torch.randn(mask_logits.shape, generator=generator)
        kinds = torch.randint(classes, (sizes["images"], OBJECTS, 1), generator=generator)
        class_logits[:, :OBJECTS].scatter_add_(-1, kinds, torch.full(kinds.shape, 8.0))
    else:
        mask_logits = 4 * torch.randn(sizes["images"], queries, *grid, generator=generator)
    if sizes["kind"].endswith("no-object"):
        rest = class_logits[:, OBJECTS:]
        rest[..., -1] = rest[..., :-1].logsumexp(-1) + torch.logit(torch.tensor(0.99))
    return SemanticInputs(
        class_logits.to(device, dtype), mask_logits.to(device, dtype), sizes["size"], sizes.get("order", "masks")
    )


class LabelOracle:
    """Labels are right wherever the float64 margin exceeds what the scores of two classes may be off."""

    def __init__(self, inputs: SemanticInputs) -> None:
        exact = scores_by_query(inputs, torch.float64)
        self.error = float((scores_by_query(inputs, torch.float32) - exact).abs().max())
        self.rounding = torch.finfo(torch.float32).eps * float(exact.max())
        best = exact.topk(2, dim=1)
        self.labels, self.margin = best.indices[:, 0], best.values[:, 0] - best.values[:, 1]

    def disagreement(self, result: Tensor, error_factor: float) -> str | None:
        if result.shape != self.labels.shape:
            return f"labels have shape {tuple(result.shape)}; expected {tuple(self.labels.shape)}"
        wrong = (result.long() != self.labels) & (self.margin > 2 * error_factor * (self.error + self.rounding))
        return f"{int(wrong.sum())} labels are wrong" if wrong.any() else None


def scores_by_query(inputs: SemanticInputs, dtype: torch.dtype) -> Tensor:
    """``(B, K, H, W)`` in ``dtype``, a query at a time to save memory."""
    probabilities = inputs.class_logits.to(dtype).softmax(-1)[..., :-1]
    pixels = inputs.size if inputs.order == "masks" else inputs.mask_logits.shape[2:]
    scores = probabilities.new_zeros((*probabilities.shape[::2], *pixels))
    for n in range(probabilities.shape[1]):
        logits = inputs.mask_logits[:, n : n + 1].to(dtype)
        masks = logits if inputs.order == "scores" else resize(logits, inputs.size)
        for b, one in enumerate(scores):
            one.flatten(1).addr_(probabilities[b, n], masks[b].sigmoid().flatten())
    return resize(scores, inputs.size)


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)


def work(inputs: SemanticInputs) -> Work:
    """Logits read and labels written once; a sigmoid (exp and reciprocal; with the interpolation, 18 operations of a
    CPU) of each query at each pixel that is scored, and the product with the class probabilities."""
    batch_size, queries, classes = inputs.class_logits.shape
    pixels = batch_size * inputs.size[0] * inputs.size[1]
    scored = pixels if inputs.order == "masks" else inputs.mask_logits[:, 0].numel()
    return Work(
        bytes=inputs.mask_logits.nbytes + pixels,
        specials=2 * scored * queries if inputs.mask_logits.is_cuda else 0,
        operations=0 if inputs.mask_logits.is_cuda else 18 * scored * queries,
        flops=2 * scored * queries * (classes - 1),
    )


def prepare_fastmask(inputs: SemanticInputs, backend: str) -> Callable[[], Tensor]:
    arguments = inputs.class_logits, inputs.mask_logits, inputs.size
    return lambda: semantic_inference(*arguments, order=inputs.order, backend=backend)


*KERNELS, _ = fastmask_backends("semantic_inference", "mask_logits", prepare_fastmask)


def original(class_logits: Tensor, mask_logits: Tensor, size: tuple[int, int], order: str) -> Tensor:
    """The original's code (order "masks"), or Hugging Face's: float32 as they have it."""
    class_logits, mask_logits = class_logits.float(), mask_logits.float()
    if order == "masks":
        mask_logits = resize(mask_logits, size)
    scores = torch.einsum("bqc,bqhw->bchw", class_logits.softmax(-1)[..., :-1], mask_logits.sigmoid())
    return (scores if order == "masks" else resize(scores, size)).argmax(1)


def prepare_eager(inputs: SemanticInputs) -> Callable[[], Tensor]:
    return torch.no_grad()(lambda: original(inputs.class_logits, inputs.mask_logits, inputs.size, inputs.order))


def prepare_compiled(inputs: SemanticInputs) -> Callable[[], Tensor]:
    function = compiled(original, inputs.mask_logits.device)
    return torch.no_grad()(lambda: function(inputs.class_logits, inputs.mask_logits, inputs.size, inputs.order))


def prepare_transformers(inputs: SemanticInputs) -> Callable[[], list[Tensor]]:
    if inputs.order != "scores":
        raise Unavailable("transformers resizes the scores")
    from transformers import MaskFormerImageProcessor

    processor = MaskFormerImageProcessor()
    outputs = SimpleNamespace(
        class_queries_logits=inputs.class_logits.float(), masks_queries_logits=inputs.mask_logits.float()
    )
    sizes = [inputs.size] * len(inputs.class_logits)
    return torch.no_grad()(lambda: processor.post_process_semantic_segmentation(outputs, sizes))


OPERATION = Operation(
    title="Semantic labels at the image's size from 100 queries",
    cases=CASES,
    providers=(
        *KERNELS,
        Provider("PyTorch original", prepare_eager),
        Provider("torch.compile", prepare_compiled, compiles=True),
        Provider("transformers", prepare_transformers, lambda raw, _: torch.stack(raw)),
    ),
    baseline="PyTorch original",
    make_inputs=make_inputs,
    oracle=LabelOracle,
    work=work,
)
