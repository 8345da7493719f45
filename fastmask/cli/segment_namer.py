"""Training a backbone to name the segments of true masks, which costs a fraction of the training of a whole network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy
from tqdm import tqdm

from fastmask.data import ComposedScenes, collate_scenes
from fastmask.models import MaskFormer
from fastmask.models.backbones import feature_maps
from fastmask.targets import PADDING_LABEL, Targets
from fastmask.training import Recipe, Trainer
from fastmask.training.step_checkpoints import load_newest, save_checkpoint

# The settings that all recipes share.
RECIPE: dict[str, Any] = {"weight_decay": 0.05, "backbone_multiplier": 1.0, "clip_norm": 1.0, "augmentation": "none"}


class SegmentNamer(nn.Module):
    """The backbone of a MaskFormer with a linear classifier of segments at each level."""

    def __init__(self, model: MaskFormer, num_classes: int) -> None:
        super().__init__()
        self.backbone, self.channels, self.preprocessor = model.backbone, model.channels, model.preprocessor
        self.heads = nn.ModuleList(nn.Linear(channels, num_classes) for channels in model.channels)

    def forward(self, images: Tensor, targets: Targets) -> dict[str, Tensor]:
        """The cross-entropy of the classes of all segments at each level: "loss_ce_0", "loss_ce_1", ..."""
        return {
            f"loss_ce_{i}": cross_entropy(logits.transpose(1, 2), targets.labels, ignore_index=PADDING_LABEL)
            for i, logits in enumerate(self.logits(images, targets))
        }

    def logits(self, images: Tensor, targets: Targets) -> list[Tensor]:
        """``(B, M, K)`` of each level, from fine to coarse: the classes of the mean features of each segment."""
        pixels = self.preprocessor.normalize(self.preprocessor(images))
        features = feature_maps(self.backbone, pixels.contiguous(memory_format=torch.channels_last), self.channels)
        masks = targets.dense_masks().float()
        logits = []
        for level, head in zip(features, self.heads, strict=True):
            height, width = level.shape[-2:]
            masks = adaptive_avg_pool2d(masks, (height, width))
            weights = masks / masks.sum((-2, -1), keepdim=True).clamp(min=1e-6)
            logits.append(head(torch.einsum("bmhw,bchw->bmc", weights, level.float())))
        return logits


def learn_names(
    model: MaskFormer,
    make_batch: Callable[[int], tuple[Tensor, Targets]],
    held_out: ComposedScenes,
    steps: int,
    batch_size: int,
    precision: str,
    folder: Path,
    every: int,
) -> None:
    """Trains the backbone of a MaskFormer to name segments.

    Args:
        model: its other parts stay as they are.
        make_batch: the batch of a step.
        held_out: scenes whose segments to name now and then.
        steps: of training.
        batch_size: scenes in a batch.
        precision: as for :class:`fastmask.training.Trainer`.
        folder: of checkpoints; training continues from the newest.
        every: steps between checkpoints.
    """
    namer = SegmentNamer(model, len(held_out.class_names)).train()
    recipe = Recipe(**RECIPE, learning_rate=2e-3, warmup_steps=min(50, steps // 2), steps=steps, batch_size=batch_size)
    trainer = Trainer(namer, recipe, precision=precision)
    fit("naming segments", trainer, make_batch, folder, lambda: naming_accuracy(namer, held_out), every)


@torch.no_grad()
def naming_accuracy(namer: SegmentNamer, scenes: ComposedScenes) -> str:
    """The share of the scenes' segments that each level names right."""
    images, targets = collate_scenes([scenes[i] for i in range(len(scenes))])
    logits = namer.eval().logits(images, targets)
    namer.train()
    known = targets.labels != PADDING_LABEL
    shares = [(level.argmax(-1) == targets.labels)[known].float().mean() for level in logits]
    return "held-out segments named right: " + ", ".join(f"{100 * float(share):.1f} %" for share in shares)


def fit(
    name: str,
    trainer: Trainer,
    make_batch: Callable[[int], tuple[Tensor, Targets]],
    folder: Path,
    report: Callable[[], str],
    every: int,
) -> None:
    """Takes the trainer's remaining steps from the newest checkpoint in a folder on, and reports now and then."""
    if (found := load_newest(folder)) is not None:
        trainer.load_state_dict(found[1])
    total = trainer.recipe.steps
    recent: list[float] = []
    with tqdm(total=total, initial=trainer.steps, desc=name, mininterval=5) as bar:
        while trainer.steps < total:
            losses = trainer.step([make_batch(trainer.steps)])
            bar.update()
            recent.append(float(losses["loss"]))
            if trainer.steps % every == 0 or trainer.steps == total:
                save_checkpoint(folder, trainer.steps, trainer.state_dict())
                mean, recent = sum(recent) / len(recent), []
                bar.write(f"{name}, step {trainer.steps}: loss {mean:.2f}, {report()}")
