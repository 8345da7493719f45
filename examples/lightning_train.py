"""Trains a small MaskFormer under Lightning, which brings devices, precision, logging and checkpoints. A callback
validates it from its logits."""

from __future__ import annotations

import argparse

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import fastmask
from fastmask.data import collate, open_dataset
from fastmask.integrations.lightning import LogitMetricsCallback
from fastmask.metrics import PanopticMetrics, SemanticMetrics
from fastmask.targets import Targets

Batch = tuple[Tensor, Targets]


class Segmentation(lightning.LightningModule):
    """Losses come weighted from the model: their sum is what to minimize."""

    def __init__(self, num_classes: int, learning_rate: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = fastmask.MaskFormer(fastmask.MaskFormerConfig.preset("tiny", num_classes, ignore_void=True))

    def training_step(self, batch: Batch, index: int) -> Tensor:
        losses = self.model(*batch)
        loss = sum(losses.values())
        self.log("loss", loss, prog_bar=True, batch_size=len(batch[0]))
        return loss

    def validation_step(self, batch: Batch, index: int) -> dict[str, Tensor]:
        outputs = self.model(batch[0])
        return {"pred_logits": outputs["pred_logits"], "pred_masks": outputs["pred_masks"]}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.learning_rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="composed:scenes", help="folder of a data set, or composed:scenes")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--val-batches", type=int, default=6)
    parser.add_argument("--output", default="out/lightning_train")
    options = parser.parse_args()

    lightning.seed_everything(0)
    train, val = (open_dataset(options.data, split) for split in ("train", "val"))
    loaders = [
        DataLoader(dataset, options.batch_size, shuffle=dataset is train, collate_fn=collate)
        for dataset in (train, val)
    ]
    info = train.info
    validation = LogitMetricsCallback(
        {
            "semantic": SemanticMetrics(info.num_classes, boundary_share=None),
            "panoptic": PanopticMetrics(info.num_classes, info.stuff_classes),
        }
    )
    trainer = lightning.Trainer(
        callbacks=[validation],
        max_steps=options.steps,
        limit_val_batches=options.val_batches,
        val_check_interval=options.steps,
        check_val_every_n_epoch=None,  # the interval counts steps, also beyond an epoch
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        default_root_dir=options.output,
        logger=False,
    )
    module = Segmentation(info.num_classes, options.learning_rate)
    trainer.fit(module, *loaders)
    scores = {name: 100 * float(trainer.callback_metrics[name]) for name in ("mIoU", "PQ")}
    print(f"mIoU: {scores['mIoU']:.1f} %, PQ: {scores['PQ']:.1f} %")
    module.model.save_pretrained(f"{options.output}/model")


if __name__ == "__main__":
    main()
