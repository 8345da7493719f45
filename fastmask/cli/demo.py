"""``make demo``: trains a small MaskFormer on the embedded scenes and shows what it learned and what it cost.

It ends with the criterion's time and memory with fastmask and with the PyTorch reference, measured on the model's own
predictions in the same run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from fastmask.cli._losses import plot_losses
from fastmask.cli.bench import table
from fastmask.cli.pretrain import WEIGHTS
from fastmask.data import CLASS_NAMES, PALETTE, STUFF_LABELS, ComposedScenes, SceneDataset, collate_scenes
from fastmask.models import MaskFormer, MaskFormerConfig
from fastmask.prediction import contact_sheet, side_by_side
from fastmask.targets import Targets
from fastmask.training import evaluate
from fastmask.training.benchmark import benchmark

LEARNING_RATE = 1e-3
# Shares of the learning rate: the backbone has learned already, and the transformer is the part that diverges first.
BACKBONE_SHARE = 0.3
TRANSFORMER_SHARE = 0.5
WEIGHT_DECAY = 0.05
WARMUP = 0.03  # share of the training time
MAX_GRADIENT_NORM = 1.0
PICTURED_SCENES = 6
# The class probability that a query must exceed to be a segment: low, since after three minutes few classes are sure.
THRESHOLD = 0.2

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def demo(
    minutes: Annotated[float, typer.Option(help="Training time.")] = 3.0,
    output: Annotated[Path, typer.Option(help="Folder for the pictures and the model.")] = Path("out/demo"),
    batch_size: Annotated[int, typer.Option(min=1, help="Scenes in a training step.")] = 8,
    size: Annotated[int, typer.Option(min=32, help="Height and width of the scenes, in pixels.")] = 128,
    val_scenes: Annotated[int, typer.Option(min=1, help="Held-out scenes to evaluate on.")] = 200,
    seed: Annotated[int, typer.Option(help="Of the weights and the order of scenes.")] = 0,
) -> None:
    """Train MaskFormer on scenes composed from real pixels, evaluate it on held-out ones, and write pictures."""
    torch.manual_seed(seed)
    output.mkdir(parents=True, exist_ok=True)
    train_scenes = ComposedScenes("train", size=(size, size))
    model = make_model()
    print(
        f"MaskFormer with {sum(p.numel() for p in model.parameters()) / 1e6:.2f} million parameters, "
        f"{torch.get_num_threads()} threads; scenes of {size} x {size} pixels, {len(CLASS_NAMES)} classes"
    )
    history = train(model, batches(train_scenes, batch_size, seed), minutes)
    plot_losses(history, output / "loss.png")
    model.save_pretrained(output / "model")

    scenes = ComposedScenes("val", length=val_scenes, size=(size, size))
    evaluation = evaluate(
        model,
        SceneDataset("val", length=val_scenes, size=(size, size)),
        batch_size=batch_size,
        options={"panoptic": {"threshold": THRESHOLD}},
        boundary_share=None,
        progress=True,
    )
    draw(model, scenes, output / "scenes.png")
    print(f"\non {val_scenes} held-out scenes after {len(history)} steps:")
    for name in ("mIoU", "PQ", "SQ", "RQ"):
        print(f"  {name:<12}{100 * evaluation.numbers[name]:6.1f} %")
    print(f"\npictures: {output}/scenes.png, {output}/loss.png; model: {output}/model\n")
    print("the criterion on this model's predictions, forward and backward:\n")
    print(table(benchmark(model, *next(batches(train_scenes, batch_size, seed + 1)), ["criterion"], seconds=4)))


def make_model() -> MaskFormer:
    """The tiny preset on a backbone that can name the classes; the rest starts at random."""
    model = MaskFormer(
        MaskFormerConfig.preset(
            "tiny",
            len(CLASS_NAMES),
            class_names=tuple(CLASS_NAMES),
            stuff_classes=tuple(STUFF_LABELS),
            class_weight=2.0,
        )
    )
    model.backbone.load_state_dict(load_file(WEIGHTS))
    return model.to(memory_format=torch.channels_last)


def make_optimizer(model: MaskFormer) -> torch.optim.Optimizer:
    """AdamW with a learning rate for each part, and no weight decay on biases, norms and the query embedding."""
    parts = ((model.backbone, BACKBONE_SHARE), (model.pixel_decoder, 1.0), (model.predictor, TRANSFORMER_SHARE))
    groups = []
    for part, share in parts:
        named = dict(part.named_parameters())
        kept = {name for name, parameter in named.items() if parameter.dim() <= 1 or "query_embed" in name}
        decayed = [parameter for name, parameter in named.items() if name not in kept]
        groups.append({"params": decayed, "weight_decay": WEIGHT_DECAY, "share": share})
        groups.append({"params": [named[name] for name in sorted(kept)], "weight_decay": 0.0, "share": share})
    return torch.optim.AdamW(groups, lr=LEARNING_RATE)


def batches(scenes: ComposedScenes, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Targets]]:
    """Batches without end, in an order that depends on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader(
        scenes, batch_size=batch_size, shuffle=True, generator=generator, collate_fn=collate_scenes, drop_last=True
    )
    while True:
        yield from loader


def train(model: MaskFormer, data: Iterator[tuple[Tensor, Targets]], minutes: float) -> list[dict[str, float]]:
    """Trains for a given time; the learning rate follows the clock, up in a short warm-up and down to 0 as a cosine.

    Returns:
        The losses of each step, summed over the decoder layers: "loss" and its parts.
    """
    optimizer = make_optimizer(model)
    model.train()
    history: list[dict[str, float]] = []
    start = time.perf_counter()
    with tqdm(total=100, desc="training", bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}") as bar:
        while (done := (time.perf_counter() - start) / (60 * minutes)) < 1:
            rate = LEARNING_RATE * min(done / WARMUP, 1.0) * 0.5 * (1 + math.cos(math.pi * done))
            for group in optimizer.param_groups:
                group["lr"] = group["share"] * rate
            images, targets = next(data)
            losses = model(images, targets)
            total = sum(losses.values())
            optimizer.zero_grad()
            total.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
            optimizer.step()
            history.append({"loss": total.item(), **parts(losses)})
            bar.set_postfix(step=len(history), loss=f"{history[-1]['loss']:.2f}")
            bar.update(100 * done - bar.n)
        bar.update(100 - bar.n)
    return history


def parts(losses: dict[str, Tensor]) -> dict[str, float]:
    """Each kind of loss, summed over the decoder layers."""
    return {
        label: sum(loss.item() for name, loss in losses.items() if name.startswith(kind))
        for label, kind in (("classes", "loss_ce"), ("masks (focal)", "loss_mask"), ("masks (dice)", "loss_dice"))
    }


def draw(model: MaskFormer, scenes: ComposedScenes, path: Path) -> None:
    """Writes a sheet of scenes beside their truth and both results."""
    rows = []
    for i in range(min(PICTURED_SCENES, len(scenes))):
        scene = scenes[i]
        (semantic,) = model.predict([scene.image])
        (panoptic,) = model.predict([scene.image], "panoptic", threshold=THRESHOLD)
        rows.append(side_by_side(*scene, semantic, panoptic, CLASS_NAMES, PALETTE, captions=i == 0))
    contact_sheet(rows, CLASS_NAMES, PALETTE, title="fastmask demo: held-out scenes").save(path)


if __name__ == "__main__":
    app()
