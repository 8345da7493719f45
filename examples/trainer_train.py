"""Trains a small MaskFormer under transformers' Trainer."""

from __future__ import annotations

import argparse

from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, set_seed

import fastmask
from fastmask.data import Sample, collate, open_dataset
from fastmask.targets import Targets


class WithLoss(nn.Module):
    """What the Trainer expects of a model: named arguments in, a dict with "loss" out."""

    def __init__(self, model: fastmask.MaskFormer) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, targets: Targets) -> dict[str, Tensor]:
        losses = self.model(images, targets)  # weighted already
        return {"loss": sum(losses.values()), **losses}


def collate_named(samples: list[Sample]) -> dict[str, Tensor | Targets]:
    images, targets = collate(samples)
    return {"images": images, "targets": targets}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="composed:scenes", help="folder of a data set, or composed:scenes")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--output", default="out/trainer_train")
    options = parser.parse_args()

    set_seed(0)
    dataset = open_dataset(options.data, "train")
    model = fastmask.MaskFormer(fastmask.MaskFormerConfig.preset("tiny", dataset.info.num_classes, ignore_void=True))
    arguments = TrainingArguments(
        output_dir=options.output,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=options.steps // 20,
        logging_steps=max(1, options.steps // 10),
        save_steps=options.steps,
        remove_unused_columns=False,  # a sample is no row of columns
        report_to=[],
    )
    trainer = Trainer(WithLoss(model), arguments, train_dataset=dataset, data_collator=collate_named)
    trainer.train()
    model.save_pretrained(f"{options.output}/model")
    print(f"last loss: {[entry['loss'] for entry in trainer.state.log_history if 'loss' in entry][-1]}")


if __name__ == "__main__":
    main()
