"""The smallest networks of each family, and how they learn a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastmask.models import EoMT, Mask2Former, MaskFormer, PerPixelBaseline, Segmenter, SoundEventDetector
from fastmask.targets import Targets

CLASSES = 4


class Convolutions(nn.Module):
    """The smallest backbone: a convolution for each of the strides 4 to 32, without normalization; ``output`` makes the
    container of the maps."""

    def __init__(self, output: Callable[[Any], Any] = list) -> None:
        super().__init__()
        self.channels = (8, 8, 16, 16)
        self.output = output
        strides, inputs = (4, 2, 2, 2), (3, *self.channels)
        self.stages = nn.ModuleList(
            nn.Conv2d(inputs[i], self.channels[i], 2 * stride - 1, stride, stride // 2)
            for i, stride in enumerate(strides)
        )

    def forward(self, pixels: Tensor) -> Any:
        maps = [pixels]
        for stage in self.stages:
            maps.append(stage(maps[-1]).tanh())
        return self.output(maps[1:])


def randomize(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """``module`` with weights that are all random."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return module


def learn(model: nn.Module, inputs: Any, targets: Any, steps: int, learning_rate: float = 1e-3) -> list[float]:
    """Trains a model on one batch; its total loss at each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    totals = []
    for _ in range(steps):
        total = sum(model(inputs, targets).values())
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        totals.append(total.item())
    return totals


def class_maps(sizes: list[tuple[int, int]], ignored: float = 0.2) -> list[Tensor]:
    """Classes of pixels, some 255."""
    maps = [torch.randint(0, CLASSES, size) for size in sizes]
    return [classes.masked_fill(torch.rand(classes.shape) < ignored, 255) for classes in maps]


def mask_targets(sizes: list[tuple[int, int]], counts: list[int]) -> list[dict[str, Tensor]]:
    """Masks that overlap, ``counts[b]`` of image b."""
    return [
        {"labels": torch.randint(0, CLASSES, (count,)), "masks": torch.rand(count, *size) < 0.3}
        for size, count in zip(sizes, counts, strict=True)
    ]


@dataclass(frozen=True)
class Family:
    """A family of models, or one form of it.

    Args:
        kind: the model.
        options: of the tiny preset.
        parts: modules that the constructor takes, made anew for each model.
        of_classes: the weights that depend on the number of classes, as a regular expression.
        logits: the output to compare.
    """

    kind: type
    options: dict[str, Any]
    of_classes: str
    parts: dict[str, Callable[[], nn.Module]] = field(default_factory=dict)
    logits: str = "logits"

    def make(self, **options: Any) -> nn.Module:
        """A model whose weights have been shaken, so that pixels and queries differ in their logits."""
        config = self.kind.config_class.preset("tiny", CLASSES, **{**self.options, **options})
        model = self.kind(config, **self.made_parts())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        return model

    def made_parts(self) -> dict[str, nn.Module]:
        return {name: make() for name, make in self.parts.items()}

    def lists(self) -> tuple[list[Tensor] | Tensor, Any]:
        """Two inputs of different sizes, where there are such, and their targets, which are lists."""
        if self.kind is SoundEventDetector:
            events = [{"labels": [1, 3], "onsets": [0.1, 0.3], "offsets": [0.2, 0.6]}, {"labels": [2]}]
            return torch.randn(2, 12_800), events
        sizes = [(64, 96), (50, 40)]
        targets = mask_targets(sizes, [3, 1]) if self.kind in (MaskFormer, Mask2Former, EoMT) else class_maps(sizes)
        return [torch.rand(3, *size) for size in sizes], targets

    def batch(self) -> tuple[Tensor, Any]:
        """Inputs of one size, and their targets in the container."""
        if self.kind is SoundEventDetector:
            waveforms, events = self.lists()
            return waveforms, self.make().targets_of(events, torch.empty(2, CLASSES, 20))
        images = torch.rand(2, 3, 64, 96)
        return images, Targets.from_segmentation(torch.stack(class_maps([(64, 96)] * 2)), CLASSES)


BACKBONE = {"backbone": Convolutions}
SMALL = {"decoder_layers": 1, "num_heads": 2, "encoder_layers": 1}
EOMT = {"num_queries": 6, "encoder_layers": 2, "query_blocks": 1, "rescale": 1.0, "num_points": 4096}
FAMILIES = {
    "maskformer": Family(
        MaskFormer,
        {"num_queries": 6, **SMALL},
        "predictor.class_embed.bias, predictor.class_embed.weight",
        BACKBONE,
        "mask_logits",
    ),
    "mask2former": Family(
        Mask2Former,
        {"num_queries": 6, "num_points": 64, "encoder_feedforward_dim": 32, **SMALL},
        "predictor.class_embed.bias, predictor.class_embed.weight",
        BACKBONE,
        "mask_logits",
    ),
    "eomt": Family(EoMT, EOMT, "class_embed.bias, class_embed.weight", logits="mask_logits"),
    "eomt with dinov3": Family(
        EoMT, {**EOMT, "encoder": "dinov3"}, "class_embed.bias, class_embed.weight", logits="mask_logits"
    ),
    "segmenter": Family(
        Segmenter,
        {**SMALL, "distilled": True},
        "decoder.cls_emb, decoder.mask_norm.bias, decoder.mask_norm.weight",
    ),
    "linear segmenter": Family(Segmenter, {**SMALL, "decoder": "linear"}, "decoder.head.bias, decoder.head.weight"),
    "per pixel": Family(PerPixelBaseline, SMALL, "classifier.bias, classifier.weight", BACKBONE),
    "per pixel+": Family(
        PerPixelBaseline, {**SMALL, "transformer_decoder": True}, "predictor.query_embed.weight", BACKBONE
    ),
    "sound": Family(
        SoundEventDetector,
        {"channels": (8, 8, 16, 16), "decoder_layers": 1},
        "predictor.query_embed.weight",
        logits="mask_logits",
    ),
}
