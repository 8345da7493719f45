"""Trains a small MaskFormer in a plain PyTorch loop, evaluates it, and draws what it finds.

By default on the embedded scenes; ``--data PATH`` takes a data set of yours (docs/guides/train.md says in which form).
``fastmask train`` does this and much more: recipes, checkpoints, several devices.
"""

from __future__ import annotations

import argparse
import math
from itertools import chain, islice, repeat
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

import fastmask
from fastmask.data import SegmentationDataset, collate, open_dataset
from fastmask.prediction import predict
from fastmask.training import evaluate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="composed:scenes", help="folder of a data set, or composed:scenes")
    parser.add_argument("--checkpoint", help="folder of a saved MaskFormer to start from")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--val-images", type=int, default=50)
    parser.add_argument("--output", type=Path, default=Path("out/train_loop"))
    options = parser.parse_args()

    torch.manual_seed(0)
    train, val = (open_dataset(options.data, split) for split in ("train", "val"))
    model = make_model(options.checkpoint, train)
    loader = DataLoader(train, options.batch_size, shuffle=True, drop_last=True, collate_fn=collate)
    batches = islice(chain.from_iterable(repeat(loader)), options.steps)

    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.05)
    warmup = max(1, options.steps // 20)

    def learning_rate(step: int) -> float:
        """A share of the largest rate: up in a line, then down as a cosine."""
        return min((step + 1) / warmup, 1) * 0.5 * (1 + math.cos(math.pi * step / options.steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate)
    model.train()
    with tqdm(batches, total=options.steps) as bar:
        for images, targets in bar:
            losses = model(images, targets)  # weighted already
            loss = sum(losses.values())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.3f}")

    model.save_pretrained(options.output / "model")
    count = min(options.val_images, len(val))
    evaluation = evaluate(model, with_info(val, count), ["semantic"], boundary_share=None)
    print(f"mIoU on {count} images: {100 * evaluation.numbers['mIoU']:.1f} %")
    draw(model, val, options.output)


def make_model(checkpoint: str | None, dataset: SegmentationDataset) -> fastmask.MaskFormer:
    if checkpoint is not None:
        return fastmask.MaskFormer.from_pretrained(checkpoint)
    info = dataset.info
    config = fastmask.MaskFormerConfig.preset(
        "tiny",
        info.num_classes,
        class_names=tuple(info.class_names),
        stuff_classes=tuple(info.stuff_classes),
        ignore_void=True,
    )
    return fastmask.MaskFormer(config)


def with_info(dataset: SegmentationDataset, count: int) -> Subset:
    """The first samples of a data set, which still says what its classes are."""
    subset = Subset(dataset, range(count))
    subset.info = dataset.info
    return subset


def draw(model: fastmask.MaskFormer, dataset: SegmentationDataset, folder: Path, count: int = 4) -> None:
    """Writes images and, over them, their semantic maps."""
    from PIL import Image

    (folder / "images").mkdir(parents=True, exist_ok=True)
    for i in range(min(count, len(dataset))):
        pixels = dataset[i].image.permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
    predict(model, folder / "images", folder, task="semantic", info=dataset.info, overwrite=True)
    print(f"pictures: {folder}/overlays")


if __name__ == "__main__":
    main()
