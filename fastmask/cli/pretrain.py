"""Trains the tiny backbone to name garments and textures, for the demo to start from.

Published models start from a backbone that has learned to name the objects of ImageNet; three minutes are too short to
learn that as well. This script gives the demo's backbone a start of the same kind, from small scenes of the training
split alone: each segment is named from the features averaged over its true mask, at every stride. It writes the weights
that the demo reads.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy
from tqdm import tqdm

from fastmask.data import CLASS_NAMES, ComposedScenes, collate_scenes
from fastmask.models import MaskFormer, MaskFormerConfig
from fastmask.models.backbones import feature_maps
from fastmask.targets import Targets

WEIGHTS = Path(__file__).parent / "tiny_backbone.safetensors"
SIZE = 64
SEED = 1  # other scenes than those that the demo trains on
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.05


def main(
    steps: Annotated[int, typer.Option(help="Training steps.")] = 2500,
    batch_size: Annotated[int, typer.Option(help="Scenes in a step.")] = 32,
    output: Annotated[Path, typer.Option(help="The file to write.")] = WEIGHTS,
) -> None:
    """Train the tiny backbone on small scenes of the training split."""
    torch.manual_seed(SEED)
    model = MaskFormer(MaskFormerConfig.preset("tiny", len(CLASS_NAMES)))
    backbone = model.backbone.to(memory_format=torch.channels_last).train()
    heads = nn.ModuleList(nn.Linear(channels, len(CLASS_NAMES)) for channels in model.channels)
    parameters = [*backbone.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    scenes = ComposedScenes("train", length=steps * batch_size, size=(SIZE, SIZE), seed=SEED)
    correct = 0.0
    for step in (bar := tqdm(range(steps), desc="naming segments")):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(step / 50, 1.0) * 0.5 * (1 + math.cos(math.pi * step / steps))
        images, targets = collate_scenes([scenes[step * batch_size + i] for i in range(batch_size)])
        pixels = (images - model.pixel_mean) / model.pixel_std
        logits = name_segments(feature_maps(backbone, pixels, model.channels), heads, targets)
        loss = sum(cross_entropy(level.transpose(1, 2), targets.labels, ignore_index=-1) for level in logits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        named = targets.labels >= 0
        hits = (logits[-1].argmax(-1) == targets.labels)[named].float().mean().item()
        correct = hits if step == 0 else 0.98 * correct + 0.02 * hits
        bar.set_postfix(loss=f"{loss.item():.2f}", correct=f"{correct:.2f}")
    weights = {
        name: (value.half() if value.is_floating_point() else value).contiguous()
        for name, value in backbone.state_dict().items()
    }
    save_file(weights, output)


def name_segments(features: list[Tensor], heads: nn.ModuleList, targets: Targets) -> list[Tensor]:
    """``(B, M, K)`` class logits of each segment at each stride, from the features averaged over its true mask."""
    masks = targets.dense_masks().float()
    logits = []
    for level, head in zip(features, heads, strict=True):
        weights = adaptive_avg_pool2d(masks, level.shape[-2:])
        weights = weights / weights.sum((-2, -1), keepdim=True).clamp(min=1e-6)
        logits.append(head(torch.einsum("bmhw,bchw->bmc", weights, level)))
    return logits


if __name__ == "__main__":
    typer.run(main)
