"""Trains tiny models of transformers, plain and patched, as one of several processes, and saves what it saw."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import fastmask
from tests.helpers.foreign_models import random_batch, tiny_maskformer

STEPS = 3
# How each run's model is prepared.
WAYS = {
    "plain": lambda model: model,
    "patched": fastmask.patch,
    "fixed": lambda model: fastmask.patch(model, fix=True),
}


class Images(Dataset):
    """Images with one to three masks each."""

    def __len__(self) -> int:
        return 4 * STEPS

    def __getitem__(self, index: int) -> dict:
        batch = random_batch(index, (1 + index % 3,), (64,))
        return {name: value[0] for name, value in batch.items()}


def collate(images: list[dict]) -> dict:
    batch = {name: [image[name] for image in images] for name in images[0]}
    return batch | {"pixel_values": torch.stack(batch["pixel_values"])}


def loss_curve(way: str, folder: str) -> list[float]:
    """The loss that Trainer logs at each step."""
    model = WAYS[way](tiny_maskformer())
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=STEPS,
        per_device_train_batch_size=2,
        logging_steps=1,
        learning_rate=1e-4,
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
    )
    trainer = Trainer(model, arguments, train_dataset=Images(), data_collator=collate)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def named_losses(way: str) -> dict[str, float]:
    """Losses of one batch, of which each process has a share of its own."""
    model = WAYS[way](tiny_maskformer()).eval()
    batch = random_batch(PartialState().process_index, (3, 1) if PartialState().process_index == 0 else (2, 0))
    outputs = model(**batch, output_auxiliary_logits=True)
    arguments = (batch["mask_labels"], batch["class_labels"], outputs.auxiliary_logits)
    losses = model.criterion(outputs.masks_queries_logits, outputs.class_queries_logits, *arguments)
    return {name: loss.item() for name, loss in losses.items()}


def main(folder: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # that of the process that forked this one
    seen = {way: {"curve": loss_curve(way, str(folder)), "losses": named_losses(way)} for way in WAYS}
    if PartialState().is_main_process:
        torch.save(seen | {"processes": PartialState().num_processes}, folder / "seen.pt")
