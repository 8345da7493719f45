"""``make demo``: trains a small MaskFormer on the embedded scenes and shows what it learned and what it cost.

The last output compares time and memory of the criterion with fastmask and with the PyTorch reference, measured in the
same run on the predictions of the trained model.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import trange

from fastmask.cli.bench import table
from fastmask.cli.pretrain import WEIGHTS
from fastmask.data import CLASS_NAMES, PALETTE, STUFF_LABELS, ComposedScenes, SceneDataset, collate_scenes
from fastmask.models import MaskFormer, MaskFormerConfig
from fastmask.prediction import contact_sheet, side_by_side
from fastmask.targets import Targets
from fastmask.training import Recipe, Trainer, evaluate
from fastmask.training.benchmark import benchmark
from fastmask.training.curves import draw_curves
from fastmask.training.latest_losses import LossRecord

STEPS = 1500  # about three minutes on two cores
POINTS = 60  # of each loss curve
PICTURED_SCENES = 6
# The class probability that a query must exceed to be a segment: low, since after so few steps few classes are sure.
THRESHOLD = 0.2
METRICS = ("mIoU", "PQ", "SQ", "RQ")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def demo(
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = STEPS,
    output: Annotated[Path, typer.Option(help="Folder for the pictures and the model.")] = Path("out/demo"),
    batch_size: Annotated[int, typer.Option(min=1, help="Scenes in a training step.")] = 8,
    size: Annotated[int, typer.Option(min=32, help="Height and width of the scenes, in pixels.")] = 128,
    val_scenes: Annotated[int, typer.Option(min=1, help="Held-out scenes to evaluate on.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the order of the scenes.")] = 0,
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
    records = train(model, batches(train_scenes, batch_size, seed), make_recipe(steps, batch_size))
    model.save_pretrained(output / "model")
    evaluation = evaluate(
        model,
        SceneDataset("val", length=val_scenes, size=(size, size)),
        batch_size=batch_size,
        options={"panoptic": {"threshold": THRESHOLD}},
        boundary_share=None,
        progress=True,
    )
    records.append({"step": steps, "evaluation": evaluation.numbers})
    draw_curves(records, output / "loss.png", METRICS[:2])
    draw_scenes(model, ComposedScenes("val", length=val_scenes, size=(size, size)), output / "scenes.png")
    print(f"\non {val_scenes} held-out scenes after {steps} steps:")
    for name in METRICS:
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
    # PyTorch's annotations miss this argument.
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def make_recipe(steps: int, batch_size: int) -> Recipe:
    """A short training from a backbone that has learned already and changes less than the rest."""
    return Recipe(
        learning_rate=7e-4,
        weight_decay=0.05,
        backbone_multiplier=0.4,
        warmup_steps=3 * steps // 100,
        clip_norm=1.0,
        steps=steps,
        batch_size=batch_size,
        augmentation="none",
    )


def batches(scenes: ComposedScenes, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Targets]]:
    """Batches without end, in an order that depends on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader(
        scenes, batch_size=batch_size, shuffle=True, generator=generator, collate_fn=collate_scenes, drop_last=True
    )
    while True:
        yield from loader


def train(model: MaskFormer, data: Iterator[tuple[Tensor, Targets]], recipe: Recipe) -> list[dict[str, Any]]:
    """Trains the model, and returns the mean losses of every few steps for :func:`draw_curves`."""
    trainer = Trainer(model.train(), recipe)
    losses, records = LossRecord(), []
    every = max(1, recipe.steps // POINTS)
    with trange(1, recipe.steps + 1, desc="training") as bar:
        for step in bar:
            losses.append(trainer.step([next(data)]))
            if step % every == 0 or step == recipe.steps:
                losses.read()
                records.append({"step": step, **losses.take_mean()})
                bar.set_postfix(loss=f"{records[-1]['loss']:.2f}")
    return records


def draw_scenes(model: MaskFormer, scenes: ComposedScenes, path: Path) -> None:
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
