"""Trains a backbone to name icons, from which the ablation's structures then start, as the paper's start from ImageNet.

    python -m benchmarks.ablations.backbone
    python -m benchmarks.ablations --data composed:icons-150 --pretrained out/icons-backbone.safetensors ...

It has the structure of the demo's backbone and learns on the training split alone, with random distortion. An
interrupted run resumes when the same command is given again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import save_file

from fastmask.cli.distorted_scenes import DistortedScenes
from fastmask.cli.pretrain import SEED, make_model
from fastmask.cli.segment_namer import learn_names
from fastmask.data import ComposedScenes

STRENGTH = 0.5  # of the scenes' distortion


def main(
    icons: Annotated[int, typer.Option(help="Classes of icons.")] = 150,
    scenes: Annotated[int, typer.Option(min=1, help="Scenes that are composed.")] = 16384,
    size: Annotated[int, typer.Option(min=32, help="Side of the scenes in pixels.")] = 64,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 4000,
    batch_size: Annotated[int, typer.Option(min=1, help="Scenes per step.")] = 48,
    val_scenes: Annotated[int, typer.Option(min=1, help="Held-out scenes to evaluate on.")] = 200,
    precision: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
    output: Annotated[Path, typer.Option(help="File of the weights.")] = Path("out/icons-backbone.safetensors"),
    folder: Annotated[Path, typer.Option(help="Folder of the checkpoints.")] = Path("out/icons-backbone"),
) -> None:
    """Train a backbone to name icons."""
    torch.manual_seed(SEED)
    model = make_model()
    batches = DistortedScenes(ComposedScenes("train", scenes, (size, size), SEED, icons=icons), STRENGTH)
    held_out = ComposedScenes("val", val_scenes, (size, size), icons=icons)
    learn_names(
        model,
        lambda i: batches(SEED, i, batch_size, size),
        held_out,
        steps,
        batch_size,
        precision,
        folder,
        every=400,
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: weight.contiguous() for name, weight in model.backbone.state_dict().items()}, output)
    print(f"weights: {output}")


if __name__ == "__main__":
    typer.run(main)
