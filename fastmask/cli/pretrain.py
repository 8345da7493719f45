"""Trains the tiny backbone to name garments and textures, as the start of the demo.

Published models start from a backbone that has learned to name the objects of ImageNet; the demo is too short to learn
that as well. This script gives its backbone a start of the same kind, from small scenes of the training split alone:
each segment is named from the features averaged over its true mask, at every stride. It writes the weights that the
demo reads.
"""

from __future__ import annotations

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
from fastmask.targets import PADDING_LABEL, Targets
from fastmask.training import Recipe, Trainer

WEIGHTS = Path(__file__).parent / "tiny_backbone.safetensors"
SIZE = 64
SEED = 1  # other scenes than those that the demo trains on
WEIGHT_DECAY = 0.05
SHOWN_EVERY = 20  # steps


class SegmentNamer(nn.Module):
    """The backbone of a MaskFormer with a classifier of segments at each stride."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, model: MaskFormer) -> None:
        super().__init__()
        # PyTorch's annotations miss this argument.
        self.backbone = model.backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.channels = model.channels
        self.heads = nn.ModuleList(nn.Linear(channels, len(CLASS_NAMES)) for channels in model.channels)
        self.register_buffer("pixel_mean", model.preprocessor.mean)
        self.register_buffer("pixel_std", model.preprocessor.std)

    def forward(self, images: Tensor, targets: Targets) -> dict[str, Tensor]:
        """The cross-entropy of the classes of all segments at each stride: "loss_ce_0", "loss_ce_1", ..."""
        features = feature_maps(self.backbone, (images - self.pixel_mean) / self.pixel_std, self.channels)
        masks = targets.dense_masks().float()
        losses = {}
        for i, (level, head) in enumerate(zip(features, self.heads, strict=True)):
            height, width = level.shape[-2:]
            weights = adaptive_avg_pool2d(masks, (height, width))
            weights = weights / weights.sum((-2, -1), keepdim=True).clamp(min=1e-6)
            logits = head(torch.einsum("bmhw,bchw->bmc", weights, level))
            losses[f"loss_ce_{i}"] = cross_entropy(logits.transpose(1, 2), targets.labels, ignore_index=PADDING_LABEL)
        return losses


def main(
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 2500,
    batch_size: Annotated[int, typer.Option(min=1, help="Scenes in a step.")] = 32,
    output: Annotated[Path, typer.Option(help="The file to write.")] = WEIGHTS,
) -> None:
    """Train the tiny backbone on small scenes of the training split."""
    torch.manual_seed(SEED)
    model = SegmentNamer(MaskFormer(MaskFormerConfig.preset("tiny", len(CLASS_NAMES)))).train()
    recipe = Recipe(
        learning_rate=2e-3,
        weight_decay=WEIGHT_DECAY,
        norm_weight_decay=WEIGHT_DECAY,
        backbone_multiplier=1.0,
        warmup_steps=min(50, steps // 10),
        clip_norm=0.0,
        steps=steps,
        batch_size=batch_size,
    )
    trainer = Trainer(model, recipe)
    scenes = ComposedScenes("train", length=steps * batch_size, size=(SIZE, SIZE), seed=SEED)
    for step in (bar := tqdm(range(steps), desc="naming segments")):
        losses = trainer.step([collate_scenes([scenes[step * batch_size + i] for i in range(batch_size)])])
        if step % SHOWN_EVERY == 0:
            bar.set_postfix(loss=f"{float(losses['loss']):.2f}")
    weights = {
        name: (value.half() if value.is_floating_point() else value).contiguous()
        for name, value in model.backbone.state_dict().items()
    }
    save_file(weights, output)


if __name__ == "__main__":
    typer.run(main)
