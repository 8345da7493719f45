"""The models train as plain modules under Lightning and under transformers' Trainer."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader

from fastmask import MaskFormer, MaskFormerConfig, PerPixelBaseline, PerPixelBaselineConfig
from fastmask.data import collate, open_dataset

STEPS, BATCH = 3, 2
CLASSES = open_dataset("composed:scenes", "train").info.num_classes
MODELS = {
    "MaskFormer": lambda: MaskFormer(MaskFormerConfig.preset("tiny", CLASSES)),
    "PerPixelBaseline": lambda: PerPixelBaseline(PerPixelBaselineConfig.preset("tiny", CLASSES)),
}

every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def loader():
    return DataLoader(open_dataset("composed:scenes", "train"), BATCH, collate_fn=collate)


def unchanged(model, make):
    """The weights of the model that are the same as at first, but for one whose gradient is 0: MaskFormer's queries
    start at zero, so that the first attention among them mixes equal values."""
    torch.manual_seed(0)
    at_first = make().state_dict()
    same = {name for name, value in model.named_parameters() if value.equal(at_first[name])}
    return same - {"predictor.decoder.layers.0.self_attn.in_proj_weight"}


@every_model
def test_lightning(make, tmp_path):
    lightning = pytest.importorskip("lightning")

    class Segmentation(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = make()
            self.seen = []

        def training_step(self, batch, index):
            losses = self.model(*batch)
            loss = sum(losses.values())
            self.log_dict(losses, batch_size=BATCH)
            self.seen.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    torch.manual_seed(0)
    module = Segmentation()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, loader())
    assert len(module.seen) == STEPS
    assert all(map(math.isfinite, module.seen))
    assert not unchanged(module.model, make)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    restored = Segmentation.load_from_checkpoint(tmp_path / "last.ckpt")
    images, _ = next(iter(loader()))
    expected, found = (one.model.predict(images) for one in (module, restored))
    assert all(map(torch.equal, found, expected))


class WithLoss(nn.Module):
    """What transformers' Trainer asks for: keywords in, a dict with "loss" out."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images, targets):
        losses = self.model(images, targets)
        return {"loss": sum(losses.values()), **losses}


@every_model
def test_transformers_trainer(make, tmp_path):
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    arguments = transformers.TrainingArguments(
        output_dir=tmp_path,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=1e-3,
        logging_steps=1,
        save_steps=STEPS,
        report_to=[],
        remove_unused_columns=False,
        use_cpu=True,
        disable_tqdm=True,
    )
    torch.manual_seed(0)
    model = make()
    trainer = transformers.Trainer(
        WithLoss(model),
        arguments,
        train_dataset=open_dataset("composed:scenes", "train"),
        data_collator=lambda samples: dict(zip(("images", "targets"), collate(samples), strict=True)),
    )
    trainer.train()
    curve = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(curve) == STEPS
    assert all(map(math.isfinite, curve))
    assert not unchanged(model, make)
    restored = WithLoss(make())
    restored.load_state_dict(load_file(tmp_path / f"checkpoint-{STEPS}" / "model.safetensors"))
    images, _ = next(iter(loader()))
    expected, found = (one.predict(images) for one in (model, restored.model))
    assert all(map(torch.equal, found, expected))
    arguments.max_steps += 1
    again = transformers.Trainer(
        restored, arguments, train_dataset=trainer.train_dataset, data_collator=trainer.data_collator
    )
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == STEPS + 1
