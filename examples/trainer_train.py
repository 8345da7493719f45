"""Trains a small MaskFormer under transformers' Trainer, which validates it from its logits."""

from __future__ import annotations

import argparse

from torch import Tensor, nn
from torch.utils.data import Subset
from transformers import Trainer, TrainingArguments, set_seed

import fastmask
from fastmask.data import Sample, collate, open_dataset
from fastmask.integrations.transformers import TrainerMetrics
from fastmask.metrics import SemanticMetrics
from fastmask.targets import Targets


class WithLoss(nn.Module):
    """What the Trainer expects of a model: named arguments in, a dict with "loss" out."""

    def __init__(self, model: fastmask.MaskFormer) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, mask_labels: Tensor, class_labels: list[Tensor]) -> dict[str, Tensor]:
        losses = self.model(images, Targets.from_segments(mask_labels, class_labels))  # weighted already
        results = {"loss": sum(losses.values()), **losses}
        if not self.training:
            outputs = self.model(images)
            results |= {"pred_logits": outputs["pred_logits"], "pred_masks": outputs["pred_masks"]}
        return results


def collate_named(samples: list[Sample]) -> dict[str, Tensor | list[Tensor]]:
    images, targets = collate(samples)
    labels = [of_image[:count] for of_image, count in zip(targets.labels, targets.counts, strict=True)]
    return {"images": images, "mask_labels": targets.segments, "class_labels": labels}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="composed:scenes", help="folder of a data set, or composed:scenes")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--val-images", type=int, default=48)
    parser.add_argument("--output", default="out/trainer_train")
    options = parser.parse_args()

    set_seed(0)
    dataset, val = (open_dataset(options.data, split) for split in ("train", "val"))
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
        per_device_eval_batch_size=options.batch_size,
        batch_eval_metrics=True,  # metrics take each batch; nothing is gathered
        report_to=[],
    )
    with_loss = WithLoss(model)
    metrics = TrainerMetrics(with_loss, {"semantic": SemanticMetrics(dataset.info.num_classes, boundary_share=None)})
    trainer = Trainer(
        with_loss,
        arguments,
        train_dataset=dataset,
        eval_dataset=Subset(val, range(min(options.val_images, len(val)))),
        data_collator=collate_named,
        compute_metrics=metrics.compute_metrics,
        preprocess_logits_for_metrics=metrics.preprocess_logits_for_metrics,
    )
    trainer.train()
    model.save_pretrained(f"{options.output}/model")
    print(f"last loss: {[entry['loss'] for entry in trainer.state.log_history if 'loss' in entry][-1]}")
    print(f"mIoU: {100 * trainer.evaluate()['eval_mIoU']:.1f} %")


if __name__ == "__main__":
    main()
